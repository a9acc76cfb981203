// Multi-scale deformable attention on a CPU: what one head of one image needs, and who computes it.
//
// Plain C++ without torch or standard-library functions: the sources that implement it are compiled
// for several instruction sets, and shared inline functions compiled for one set must not leak into
// code that runs where that set is missing.
#pragma once

#include <cstdint>
#include <utility>

namespace maskdino {
namespace cpu {

// Bytes of the longest vector register; rows (a token's channels) and samples are padded to it.
constexpr int64_t kLongestVector = 64;

// Row numbers, as wide as T, so that a vector of T has a vector of row numbers.
template <typename T>
struct IntegerOf {
  using type = int64_t;
};
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <typename T>
using Integer = typename IntegerOf<T>::type;

// One head of one image. "Samples" are the L x P points of a query, in (level, point) order; T is
// the type of arithmetic, float or double. Strides count elements from one query to the next.
template <typename T>
struct HeadTask {
  // The samples' levels: sizes as numbers, sizes as integers, and the first token of the level.
  // Padded to padded<T>(samples) with sizes of -1, so that no location is inside a padding sample.
  int64_t samples;
  int64_t points;  // P
  const T* width;
  const T* height;
  const Integer<T>* columns;
  const Integer<T>* lines;
  const Integer<T>* start;

  // Head-major feature rows, padded with zeros; row `zero_row` is all zeros and stands for every
  // corner outside the map, so that no sample needs a branch.
  const T* rows;
  int64_t row_stride;
  int64_t channels;
  Integer<T> zero_row;

  // reference_size 0: `points_xy` are normalized locations and `scores` are weights.
  // reference_size 2 or 4: `points_xy` are offsets around `reference` and `scores` are logits.
  const T* points_xy;
  int64_t points_stride;
  const T* scores;
  int64_t scores_stride;
  const T* reference;
  int64_t reference_size;

  // Forward writes `output`; backward reads `grad_output` and fills the rest, laid out like the
  // inputs. `grad_rows` is added to; `grad_reference` may be null when nobody wants it.
  T* output;
  const T* grad_output;
  int64_t output_stride;
  T* grad_rows;
  T* grad_points_xy;
  T* grad_scores;
  T* grad_reference;
};

// Samples, or channels, rounded up to whole vectors of any length.
template <typename T>
constexpr int64_t padded(int64_t count) {
  constexpr int64_t lanes = kLongestVector / static_cast<int64_t>(sizeof(T));
  return (count + lanes - 1) / lanes * lanes;
}

// Memory for one thread: numbers, set to zero, and row numbers.
template <typename T>
constexpr int64_t scratch_numbers(int64_t samples, int64_t row_stride) {
  return 13 * padded<T>(samples) + row_stride;
}
template <typename T>
constexpr int64_t scratch_indices(int64_t samples) {
  return 4 * padded<T>(samples);
}

// Computes queries [begin, end) of a task.
template <typename T>
using Kernel = void (*)(const HeadTask<T>& task, int64_t begin, int64_t end, T* numbers,
                        Integer<T>* indices);

template <typename T>
struct Kernels {
  Kernel<T> forward;
  Kernel<T> backward;
};

// What the pixels of an axis of the output read of a map: three cells, from `first` on, which may
// lie behind its end with weight 0.
struct Axis {
  const int32_t* first;  // (size)
  const float* weight;   // (3, size)
  int64_t size;
};

// Masks in the frame of the output. Of `logits` and `foreground`, one is there; `quality`, the mean
// probability over the foreground, only with the latter.
struct MaskTask {
  const float* maps;  // (masks, map_lines, map_columns)
  int64_t map_lines, map_columns;
  Axis x, y;
  float* logits;        // (masks, y.size, x.size)
  uint8_t* foreground;  // likewise
  float* quality;       // (masks), or null
};

// Memory for one thread that makes masks.
inline int64_t scratch_numbers(const MaskTask& task) {
  return task.map_columns + 2 + 4 * task.x.size;
}

// Makes one of the masks.
using MaskKernel = void (*)(const MaskTask& task, int64_t number, float* numbers);

#define MASKDINO_DECLARE_KERNELS(instruction_set) \
  namespace instruction_set {                     \
  void get_kernels(Kernels<float>& kernels);      \
  void get_kernels(Kernels<double>& kernels);     \
  void get_kernels(MaskKernel& kernel);           \
  }
MASKDINO_DECLARE_KERNELS(plain)
MASKDINO_DECLARE_KERNELS(avx2)
MASKDINO_DECLARE_KERNELS(avx512)
#undef MASKDINO_DECLARE_KERNELS

}  // namespace cpu
}  // namespace maskdino
