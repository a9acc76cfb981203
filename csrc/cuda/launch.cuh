// Starts a kernel. Only CUDA compilers know the syntax; tests that run the kernels on a CPU bring a
// `launch` of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels.h"

#if defined(__CUDACC__)
namespace maskdino {
namespace cuda {

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, const Grid& grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  kernel<<<dim3(grid.queries, grid.heads, grid.images), threads, shared_bytes, stream>>>(
      arguments...);
}

}  // namespace cuda
}  // namespace maskdino
#endif
