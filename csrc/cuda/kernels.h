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
constexpr int kMaxThreads = 512;   // of a block

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
  int samples;      // levels * points
  int token_bytes;  // from a token's features to the next one's
  int height[kMaxLevels], width[kMaxLevels], first_token[kMaxLevels];
  // A block takes `queries_per_block` queries of `heads_per_block` (1 or 2) heads of one image.
  // Where every token is a query, these are a square tile of one level with sides of 2^tile_bits,
  // and the level's tiles begin at first_tile[level]; else a run of queries.
  int queries_per_block, heads_per_block;
  int tile_bits;
  int tiles_in_line[kMaxLevels], first_tile[kMaxLevels + 1];
};

// Blocks of a launch: queries, heads, images.
struct Grid {
  unsigned queries, heads, images;
};

// How samples are given. Textbook: `points` are normalized locations and `scores` weights, both of
// type A. Else (fused) `points` is the whole offsets-and-logits tensor of type T and `scores` is
// unused; offsets are around the centers of tokens, of which each is a query, or around references.
enum class Form { textbook, tokens, references };

template <typename T, Form kForm>
struct Inputs {
  using Raw = typename std::conditional<kForm == Form::textbook, Arithmetic<T>, T>::type;
  Geometry geometry;
  Grid grid;
  const T* value;  // (B, S, M, D)
  const Raw* points;
  const Raw* scores;
  const Arithmetic<T>* reference;  // (B, Q, reference_size)
  int reference_size;              // 2 or 4
};

// Where gradients go. Those of the value are added to `value`, which starts as zeros: numbers of
// type A, or where `scale` is set 64-bit integers, gradient x scale, whose sum has no order; that
// without vectors.
template <typename T, Form kForm>
struct Gradients {
  const T* output;  // (B, Q, M x D), read
  void* value;
  const double* scale;
  typename Inputs<T, kForm>::Raw* points;
  typename Inputs<T, kForm>::Raw* scores;
  Arithmetic<T>* reference;  // (B, M, Q, reference_size) or null
};

// True where vectors serve a head: it has 1, 2, 4 or 8 times the bytes of the smallest.
constexpr int kSmallestHead = 32;
constexpr bool has_vector_kernel(int64_t channels, int64_t element_size) {
  const int64_t times = channels * element_size / kSmallestHead;
  return element_size <= 4 && times * kSmallestHead == channels * element_size &&
         (times == 1 || times == 2 || times == 4 || times == 8);
}

// Neighboring channels of a lane where the head has a vector kernel: forward reads 16 bytes, and
// backward adds 16 bytes of float32 to the value's gradient, so that a group fills whole sectors.
constexpr int forward_vector(int64_t element_size) { return static_cast<int>(16 / element_size); }
constexpr int kBackwardVector = 4;

// Lanes that share one head of one query; a vector of 1 is the kernel for heads of any size.
constexpr int lanes_per_query(int64_t channels, int vector) {
  return vector > 1 ? static_cast<int>(channels / vector) : 32;
}

// `vectors` says that all pointers to features are 16-byte aligned, x and y of an offset or
// location are aligned as a pair, and has_vector_kernel holds. Both launch on `stream` and do not
// wait. The block must fit lanes_per_query() into kMaxThreads.
template <typename T, Form kForm>
void launch_forward(const Inputs<T, kForm>& inputs, T* output, bool vectors, cudaStream_t stream);

template <typename T, Form kForm>
void launch_backward(const Inputs<T, kForm>& inputs, const Gradients<T, kForm>& gradients,
                     bool vectors, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
