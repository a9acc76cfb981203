// Stands in for csrc/cuda/launch.cuh: runs all blocks of a kernel, one after another.
#pragma once

#include "cuda/kernels.h"
#include "cuda_runtime_api.h"

namespace maskdino {
namespace cuda {

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, const Grid& grid, int threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) throw std::runtime_error("too much shared memory");
  if (threads > 512) throw std::runtime_error("too many threads");
  emulation::Index& block = emulation::block_index;
  for (block.z = 0; block.z < grid.images; ++block.z) {
    for (block.y = 0; block.y < grid.heads; ++block.y) {
      for (block.x = 0; block.x < grid.queries; ++block.x) {
        emulation::run_block(threads, [&] { kernel(arguments...); });
      }
    }
  }
}

}  // namespace cuda
}  // namespace maskdino
