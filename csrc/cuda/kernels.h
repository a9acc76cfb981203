// Multi-scale deformable attention on a GPU: what the host hands to the kernels. Plain C++ without
// torch's tensors, so that the .cu files compile in seconds.
//
// T is the type of features, A = Arithmetic<T> that of arithmetic, locations and references.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace maskdino {
namespace cuda {

constexpr int kMaxLevels = 16;
constexpr int kMaxSamples = 1024;  // L x P; bounds shared memory
constexpr int kMaxThreads = 512;    // of a block

template <typename T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <typename T>
using Arithmetic = typename ArithmeticOf<T>::type;

struct Geometry {
  int64_t images, tokens, queries;
  int heads, channels, levels, points;
  int samples;  // levels * points
  int height[kMaxLevels], width[kMaxLevels], first_token[kMaxLevels];
  // Queries of a block. Where every token is a query (tile_side > 0), a block takes a square tile
  // of one level, whose tiles begin at first_tile[level]; else a run of queries.
  int tile_side;
  int first_tile[kMaxLevels + 1];
  int queries_per_block;
  int64_t blocks_per_head;
};

// Textbook form: `points` are normalised locations and `scores` weights, both of type A.
// Fused form: `points` is the whole offsets-and-logits tensor of type T, `scores` is unused, and
// reference_size is 0 (token centres), 2 or 4.
template <typename T, bool Fused>
struct Inputs {
  using Raw = typename std::conditional<Fused, T, Arithmetic<T>>::type;
  Geometry geometry;
  const T* value;  // (B, S, M, D)
  const Raw* points;
  const Raw* scores;
  const Arithmetic<T>* reference;  // (B, Q, reference_size)
  int reference_size;
};

// Where gradients go. Those of the value are added to `value`, which starts as zeros: numbers of
// type A, or where `scale` is set 64-bit integers, gradient x scale, whose sum has no order.
template <typename T, bool Fused>
struct Gradients {
  const T* output;  // (B, Q, M x D), read
  void* value;
  const double* scale;
  typename Inputs<T, Fused>::Raw* points;
  typename Inputs<T, Fused>::Raw* scores;
  Arithmetic<T>* reference;  // (B, M, Q, reference_size) or null
};

// True where 16-byte accesses serve a head: its bytes are 64, 128 or 256.
constexpr bool has_vector_kernel(int64_t channels, int64_t element_size) {
  const int64_t bytes = channels * element_size;
  return element_size <= 4 && (bytes == 64 || bytes == 128 || bytes == 256);
}

// Lanes that share one head of one query.
constexpr int lanes_per_query(int64_t channels, int64_t element_size, bool vectors) {
  return vectors ? static_cast<int>(channels * element_size / 16) : 32;
}

// `vectors` says that all pointers to features are 16-byte aligned and has_vector_kernel holds.
// Both launch on `stream` and do not wait. The block must fit lanes_per_query() into kMaxThreads.
template <typename T, bool Fused>
void launch_forward(const Inputs<T, Fused>& inputs, T* output, bool vectors, cudaStream_t stream);

template <typename T, bool Fused>
void launch_backward(const Inputs<T, Fused>& inputs, const Gradients<T, Fused>& gradients,
                     bool vectors, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
