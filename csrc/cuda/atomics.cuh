// Additions to global memory that other blocks add to as well.
#pragma once

#include "kernels.h"

namespace maskdino {
namespace cuda {

// Adds `Count` numbers to neighbouring addresses, four at a time where the GPU can.
template <int Count, typename A>
__device__ __forceinline__ void atomic_add(A* target, const A (&numbers)[Count]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kFours = std::is_same<A, float>::value && Count % 4 == 0;
#else
  constexpr bool kFours = false;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int k = 0; k < Count; k += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + k),
                make_float4(numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3]));
    }
  } else {
#pragma unroll
    for (int k = 0; k < Count; ++k) atomicAdd(target + k, numbers[k]);
  }
}

// Adds fixed-point numbers: integers have one sum in whatever order they arrive.
template <int Count, typename A>
__device__ __forceinline__ void atomic_add_fixed(unsigned long long* target, double scale,
                                                 const A (&numbers)[Count]) {
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const long long fixed = __double2ll_rn(static_cast<double>(numbers[k]) * scale);
    atomicAdd(target + k, static_cast<unsigned long long>(fixed));
  }
}

}  // namespace cuda
}  // namespace maskdino
