// Products of small matrices on tensor cores: 16-bit factors, float32 sums. Compute capability 8.0;
// on what is compiled for older ones the sums become NaN. Tests that run the kernels on a CPU bring
// functions of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels.h"

#if defined(__CUDACC__)
namespace maskdino {
namespace cuda {

// Two numbers rounded to T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  uint32_t pair = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<T, c10::BFloat16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
#endif
  return pair;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8), by all lanes of a warp together. Lane 4 g + t holds
//   of a: lines g, g + 8 (both of columns 2t, 2t + 1), then the same lines of columns 2t + 8, 2t +
//   9 of b: column g of lines 2t, 2t + 1, and of lines 2t + 8, 2t + 9 of the sums: columns 2t, 2t +
//   1 of line g, then of line g + 8.
template <typename T>
__device__ __forceinline__ void add_product(float (&sums)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<T, c10::BFloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  for (float& sum : sums) sum = NAN;
#endif
}

}  // namespace cuda
}  // namespace maskdino
#endif
