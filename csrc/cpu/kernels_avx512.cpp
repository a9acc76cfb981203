// The CPU kernels for x86 processors with AVX-512. Nothing may be included after the target is set,
// and everything is compiled for it from there to the end of the file.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

#define MASKDINO_INSTRUCTION_SET avx512
#define MASKDINO_VECTOR_BYTES 64
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
