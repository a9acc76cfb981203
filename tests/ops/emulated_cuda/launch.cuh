// Stands in for csrc/cuda/launch.cuh: runs all blocks of a kernel, one after another.
#pragma once

#include "cuda/kernels.h"
#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace maskdino {
namespace cuda {

constexpr size_t kSharedBytes = 48 * 1024;
inline char* shared_memory();

// Leaves a kernel the shared memory that it asked for: AddressSanitizer, where it is compiled in,
// ends the program at a byte beyond.
inline void offer_shared_memory([[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(shared_memory(), kSharedBytes);
  ASAN_POISON_MEMORY_REGION(shared_memory() + bytes, kSharedBytes - bytes);
#endif
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, const Grid& grid, int threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  if (shared_bytes > kSharedBytes) throw std::runtime_error("too much shared memory");
  if (threads > 512) throw std::runtime_error("too many threads");
  offer_shared_memory(shared_bytes);
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
