// Stands in for csrc/cuda/launch.cuh: runs all blocks of a kernel, one after another.
#pragma once

#include "cuda_runtime_api.h"

namespace maskdino {
namespace cuda {

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) throw std::runtime_error("too much shared memory");
  if (threads > 512) throw std::runtime_error("too many threads");
  for (int64_t index = 0; index < blocks; ++index) {
    emulation::block_index.x = static_cast<unsigned>(index);
    emulation::run_block(threads, [&] { kernel(arguments...); });
  }
}

}  // namespace cuda
}  // namespace maskdino
