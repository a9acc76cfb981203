// Products of small matrices on tensor cores. Tests that run the kernels on a CPU bring their own.
#pragma once

#if defined(__CUDACC__)
namespace maskdino {
namespace cuda {

// sums (16 x 8) += a (16 x 8) b (8 x 8) over the lanes of a warp, of which lane 4 i + j holds
//   a:    (i, j), (i + 8, j), (i, j + 4), (i + 8, j + 4)
//   b:    (j, i), (j + 4, i)
//   sums: (i, 2 j), (i, 2 j + 1), (i + 8, 2 j), (i + 8, 2 j + 1).
// Factors are cut off after 11 significant bits, products and sums are float32.
__device__ __forceinline__ void add_product(float (&sums)[4], const float (&a)[4],
                                            const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

}  // namespace cuda
}  // namespace maskdino
#endif
