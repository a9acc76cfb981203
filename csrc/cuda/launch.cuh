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
  if (static_cast<int64_t>(shared_bytes) > kSharedMemory) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
    // Else the driver may leave room for one block where two would fit.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxShared);
  }
  kernel<<<dim3(grid.queries, grid.heads, grid.images), threads, shared_bytes, stream>>>(arguments...);
}

}  // namespace cuda
}  // namespace maskdino
#endif
