// The CPU kernels, written once over vectors of MASKDINO_VECTOR_BYTES bytes in the namespace
// MASKDINO_INSTRUCTION_SET. Included at the end of kernels_plain.cpp, kernels_avx2.cpp and
// kernels_avx512.cpp, which choose both; it includes no library header, for the reason in
// kernels.h.
//
// A query of a head goes through three stages:
//   1. locate:     locations and weights of its samples, then 4 corner rows and 4 corner weights
//                  each (loops over samples, which the compiler vectorises);
//   2. accumulate: sum of weight x row over all corners (explicit vectors over channels), or in
//                  backward the dot products grad_output . row and the additions to grad_rows;
//   3. scatter:    backward only: from dot products to gradients of locations and scores.

#include "vectors_impl.h"

namespace maskdino {
namespace cpu {
namespace MASKDINO_INSTRUCTION_SET {
namespace {

constexpr int64_t kQueriesAhead = 6;  // how early inputs are prefetched

// Views into one thread's scratch memory. Samples are padded to whole vectors; arrays of corners
// are ordered (corner, padded sample) with corners top left, top right, bottom left, bottom right.
// Padding lanes of `weight` stay 0 and those of `corner_row` the zero row.
template <typename T>
struct Scratch {
  Scratch(T* numbers, Integer<T>* indices, int64_t samples)
      : padded((samples + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        x(numbers),
        y(numbers + padded),
        weight(numbers + 2 * padded),
        fraction_x(numbers + 3 * padded),
        fraction_y(numbers + 4 * padded),
        corner_weight(numbers + 5 * padded),
        dot(numbers + 9 * padded),
        row_buffer(numbers + 13 * padded),
        corner_row(indices) {}
  int64_t padded;
  T *x, *y, *weight, *fraction_x, *fraction_y, *corner_weight, *dot, *row_buffer;
  Integer<T>* corner_row;
};

template <typename T>
MASKDINO_INLINE void softmax(const T* logits, T* weight, int64_t count, int64_t padded) {
  const int64_t whole = count / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < whole; i += kLanes<T>) store(weight + i, load(logits + i));
  for (int64_t i = whole; i < padded; ++i) weight[i] = i < count ? logits[i] : -__builtin_inff();
  Vector<T> largest = load(weight);
  for (int64_t i = kLanes<T>; i < padded; i += kLanes<T>) {
    const Vector<T> here = load(weight + i);
    largest = here > largest ? here : largest;
  }
  const T shift = largest_lane<T>(largest);
  for (int64_t i = 0; i < padded; ++i) weight[i] = exp_nonpositive(weight[i] - shift);
  Vector<T> sum = load(weight);
  for (int64_t i = kLanes<T>; i < padded; i += kLanes<T>) sum += load(weight + i);
  const T scale = T(1) / sum_lanes<T>(sum);
  for (int64_t i = 0; i < padded; i += kLanes<T>) store(weight + i, load(weight + i) * scale);
}

// Asks for the memory of a later query: queries lie a whole row of all heads apart, too far for the
// processor to foresee.
template <bool Backward, typename T>
MASKDINO_INLINE void prefetch(const HeadTask<T>& task, int64_t query) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t xy = query * task.points_stride, scores = query * task.scores_stride;
  for (int64_t i = 0; i < 2 * task.samples; i += kLine) {
    __builtin_prefetch(task.points_xy + xy + i);
    if (Backward) __builtin_prefetch(task.grad_points_xy + xy + i, 1);
  }
  for (int64_t i = 0; i < task.samples; i += kLine) {
    __builtin_prefetch(task.scores + scores + i);
    if (Backward) __builtin_prefetch(task.grad_scores + scores + i, 1);
  }
  for (int64_t i = 0; i < task.channels; i += kLine) {
    const int64_t at = query * task.output_stride + i;
    if (Backward) {
      __builtin_prefetch(task.grad_output + at);
    } else {
      __builtin_prefetch(task.output + at, 1);
    }
  }
}

// Stage 1a: pixel coordinates (pixel centers at integers) and weights of a query's samples.
template <typename T>
MASKDINO_INLINE void locate(const HeadTask<T>& task, int64_t query, const Scratch<T>& s) {
  const int64_t n = task.samples;
  const T* xy = task.points_xy + query * task.points_stride;
  const T* scores = task.scores + query * task.scores_stride;
  const T* width = task.width;
  const T* height = task.height;
  T* __restrict x = s.x;
  T* __restrict y = s.y;
  if (task.reference_size == 0) {
    __builtin_memcpy(s.weight, scores, n * sizeof(T));
    for (int64_t i = 0; i < n; ++i) {
      x[i] = xy[2 * i] * width[i] - T(0.5);
      y[i] = xy[2 * i + 1] * height[i] - T(0.5);
    }
    return;
  }
  softmax(scores, s.weight, n, s.padded);
  const T* reference = task.reference + query * task.reference_size;
  const T center_x = reference[0], center_y = reference[1];
  if (task.reference_size == 2) {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = center_x * width[i] + xy[2 * i] - T(0.5);
      y[i] = center_y * height[i] + xy[2 * i + 1] - T(0.5);
    }
  } else {
    const T step_x = reference[2] * T(0.5) / task.points;
    const T step_y = reference[3] * T(0.5) / task.points;
    for (int64_t i = 0; i < n; ++i) {
      x[i] = (center_x + xy[2 * i] * step_x) * width[i] - T(0.5);
      y[i] = (center_y + xy[2 * i + 1] * step_y) * height[i] - T(0.5);
    }
  }
}

// Stage 1b: rows and bilinear weights of the corners. A sample that touches no pixel (or is NaN)
// is moved to (-2, -2), where all four corners are the zero row; so the conversions to integers
// below cannot overflow and every index is in range.
template <typename T>
MASKDINO_INLINE void find_corners(const HeadTask<T>& task, const Scratch<T>& s) {
  using V = Vector<T>;
  using I = Integers<T>;
  const int64_t n = s.padded;
  const V outside = V{} - T(2);
  const I zero_row = I{} + task.zero_row;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    V x = load(s.x + i), y = load(s.y + i);
    const V width = load(task.width + i), height = load(task.height + i);
    const I touches = (x > T(-1)) & (x < width) & (y > T(-1)) & (y < height);
    x = touches ? x : outside;
    y = touches ? y : outside;
    I left = __builtin_convertvector(x, I), top = __builtin_convertvector(y, I);
    left += x < __builtin_convertvector(left, V);  // a true comparison is -1: truncation to floor
    top += y < __builtin_convertvector(top, V);
    const V fx = x - __builtin_convertvector(left, V), fy = y - __builtin_convertvector(top, V);
    store(s.fraction_x + i, fx);
    store(s.fraction_y + i, fy);

    const I columns = load_as<I>(task.columns + i), lines = load_as<I>(task.lines + i);
    const I row = load_as<I>(task.start + i) + top * columns + left;
    const I left_in = left >= 0, right_in = (left >= -1) & (left < columns - 1);
    const I top_in = top >= 0, bottom_in = (top >= -1) & (top < lines - 1);
    store(s.corner_row + i, (top_in & left_in) ? row : zero_row);
    store(s.corner_row + n + i, (top_in & right_in) ? row + 1 : zero_row);
    store(s.corner_row + 2 * n + i, (bottom_in & left_in) ? row + columns : zero_row);
    store(s.corner_row + 3 * n + i, (bottom_in & right_in) ? row + columns + 1 : zero_row);

    const V bottom_weight = load(s.weight + i) * fy,
            top_weight = load(s.weight + i) - bottom_weight;
    store(s.corner_weight + i, top_weight - top_weight * fx);
    store(s.corner_weight + n + i, top_weight * fx);
    store(s.corner_weight + 2 * n + i, bottom_weight - bottom_weight * fx);
    store(s.corner_weight + 3 * n + i, bottom_weight * fx);
  }
}

// Stage 2, forward: Count vectors of channels from `channel`. Two sets of sums, because one chain
// of dependent additions would wait for its own latency.
template <typename T, int Count>
MASKDINO_INLINE void sum_rows(const HeadTask<T>& task, const Scratch<T>& s, int64_t channel,
                              T* output) {
  Vector<T> even[Count] = {}, odd[Count] = {};
  const T* rows = task.rows + channel;
  for (int corner = 0; corner < 4; ++corner) {
    const T* weight = s.corner_weight + corner * s.padded;
    const Integer<T>* row = s.corner_row + corner * s.padded;
    for (int64_t i = 0; i < task.samples; i += 2) {  // an odd count ends in a padding lane
      const T* first = rows + row[i] * task.row_stride;
      const T* second = rows + row[i + 1] * task.row_stride;
      for (int v = 0; v < Count; ++v) {
        even[v] += weight[i] * load(first + v * kLanes<T>);
        odd[v] += weight[i + 1] * load(second + v * kLanes<T>);
      }
    }
  }
  for (int v = 0; v < Count; ++v) store(output + channel + v * kLanes<T>, even[v] + odd[v]);
}

// Stage 2, backward: adds to grad_rows, and to the dot products of grad_output with the corners.
template <typename T, int Count>
MASKDINO_INLINE void spread_rows(const HeadTask<T>& task, const Scratch<T>& s, int64_t channel,
                                 const T* grad_output) {
  const int64_t n = s.padded;
  Vector<T> grad[Count];
  for (int v = 0; v < Count; ++v) grad[v] = load(grad_output + channel + v * kLanes<T>);
  for (int64_t i = 0; i < task.samples; ++i) {
    Vector<T> products[4];
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t at = s.corner_row[corner * n + i] * task.row_stride + channel;
      const T weight = s.corner_weight[corner * n + i];
      const T* row = task.rows + at;
      T* grad_row = task.grad_rows + at;
      products[corner] = grad[0] * load(row);
      for (int v = 1; v < Count; ++v) products[corner] += grad[v] * load(row + v * kLanes<T>);
      for (int v = 0; v < Count; ++v) {
        T* target = grad_row + v * kLanes<T>;
        store(target, load(target) + weight * grad[v]);
      }
    }
    T sums[4];
    sum_lanes_of_four(products, sums);
    for (int corner = 0; corner < 4; ++corner) s.dot[corner * n + i] += sums[corner];
  }
}

// Runs `Step<T, Count>` over all channels of a padded row, four vectors at a time, then the rest.
#define MASKDINO_OVER_CHANNELS(step, argument)                                     \
  do {                                                                             \
    const int64_t vectors = task.row_stride / kLanes<T>;                           \
    int64_t v = 0;                                                                 \
    for (; v + 4 <= vectors; v += 4) step<T, 4>(task, s, v * kLanes<T>, argument); \
    for (; v + 2 <= vectors; v += 2) step<T, 2>(task, s, v * kLanes<T>, argument); \
    for (; v < vectors; ++v) step<T, 1>(task, s, v * kLanes<T>, argument);         \
  } while (false)

template <typename T>
void forward(const HeadTask<T>& task, int64_t begin, int64_t end, T* numbers, Integer<T>* indices) {
  Scratch<T> s(numbers, indices, task.samples);
  const bool whole_rows = task.channels == task.row_stride;
  for (int64_t query = begin; query < end; ++query) {
    if (query + kQueriesAhead < end) prefetch<false>(task, query + kQueriesAhead);
    locate(task, query, s);
    find_corners(task, s);
    T* output = task.output + query * task.output_stride;
    T* target = whole_rows ? output : s.row_buffer;
    MASKDINO_OVER_CHANNELS(sum_rows, target);
    if (!whole_rows) __builtin_memcpy(output, target, task.channels * sizeof(T));
  }
}

// Stage 3: gradients with respect to locations (in pixels, into x and y) and weights (into dot).
template <typename T>
MASKDINO_INLINE void gradients_of_samples(const Scratch<T>& s) {
  using V = Vector<T>;
  const int64_t n = s.padded;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const V top_left = load(s.dot + i), top_slope = load(s.dot + n + i) - top_left;
    const V bottom_left = load(s.dot + 2 * n + i);
    const V bottom_slope = load(s.dot + 3 * n + i) - bottom_left;
    const V fx = load(s.fraction_x + i), fy = load(s.fraction_y + i), weight = load(s.weight + i);
    const V top = top_left + fx * top_slope, bottom = bottom_left + fx * bottom_slope;
    store(s.dot + i, top + fy * (bottom - top));
    store(s.x + i, weight * (top_slope + fy * (bottom_slope - top_slope)));
    store(s.y + i, weight * (bottom - top));
  }
}

// Stage 3 of the textbook form: from pixels to normalized locations.
template <typename T>
MASKDINO_INLINE void write_location_gradients(const HeadTask<T>& task, int64_t query,
                                              const Scratch<T>& s) {
  T* __restrict grad_xy = task.grad_points_xy + query * task.points_stride;
  T* __restrict grad_scores = task.grad_scores + query * task.scores_stride;
  for (int64_t i = 0; i < task.samples; ++i) {
    grad_xy[2 * i] = s.x[i] * task.width[i];
    grad_xy[2 * i + 1] = s.y[i] * task.height[i];
    grad_scores[i] = s.dot[i];
  }
}

// Stage 3 of the fused form: through the softmax, the offsets and the reference.
template <typename T>
MASKDINO_INLINE void write_offset_gradients(const HeadTask<T>& task, int64_t query,
                                            const Scratch<T>& s) {
  const int64_t n = task.samples;
  const T* __restrict xy = task.points_xy + query * task.points_stride;
  T* __restrict grad_xy = task.grad_points_xy + query * task.points_stride;
  T* __restrict grad_scores = task.grad_scores + query * task.scores_stride;
  Vector<T> products{};
  for (int64_t i = 0; i < s.padded; i += kLanes<T>)
    products += load(s.weight + i) * load(s.dot + i);
  const T mean = sum_lanes<T>(products);
  for (int64_t i = 0; i < n; ++i) grad_scores[i] = s.weight[i] * (s.dot[i] - mean);

  const bool boxes = task.reference_size == 4;
  const T* reference = task.reference + query * task.reference_size;
  const T per_point = T(0.5) / task.points;
  if (boxes) {
    const T step_x = reference[2] * per_point, step_y = reference[3] * per_point;
    for (int64_t i = 0; i < n; ++i) {
      grad_xy[2 * i] = s.x[i] * task.width[i] * step_x;
      grad_xy[2 * i + 1] = s.y[i] * task.height[i] * step_y;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      grad_xy[2 * i] = s.x[i];
      grad_xy[2 * i + 1] = s.y[i];
    }
  }
  if (task.grad_reference == nullptr) return;
  T* grad_reference = task.grad_reference + query * task.reference_size;
  for (int64_t k = 0; k < task.reference_size; ++k) grad_reference[k] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T grad_x = s.x[i] * task.width[i], grad_y = s.y[i] * task.height[i];
    grad_reference[0] += grad_x;
    grad_reference[1] += grad_y;
    if (boxes) {
      grad_reference[2] += grad_x * xy[2 * i] * per_point;
      grad_reference[3] += grad_y * xy[2 * i + 1] * per_point;
    }
  }
}

template <typename T>
void backward(const HeadTask<T>& task, int64_t begin, int64_t end, T* numbers,
              Integer<T>* indices) {
  Scratch<T> s(numbers, indices, task.samples);
  const bool whole_rows = task.channels == task.row_stride;
  for (int64_t c = task.channels; c < task.row_stride; ++c) s.row_buffer[c] = 0;
  for (int64_t query = begin; query < end; ++query) {
    if (query + kQueriesAhead < end) prefetch<true>(task, query + kQueriesAhead);
    locate(task, query, s);
    find_corners(task, s);
    const T* grad_output = task.grad_output + query * task.output_stride;
    if (!whole_rows) {
      __builtin_memcpy(s.row_buffer, grad_output, task.channels * sizeof(T));
      grad_output = s.row_buffer;
    }
    __builtin_memset(s.dot, 0, 4 * s.padded * sizeof(T));
    MASKDINO_OVER_CHANNELS(spread_rows, grad_output);
    gradients_of_samples(s);
    if (task.reference_size == 0) {
      write_location_gradients(task, query, s);
    } else {
      write_offset_gradients(task, query, s);
    }
  }
}

#undef MASKDINO_OVER_CHANNELS

}  // namespace

void get_kernels(Kernels<float>& kernels) { kernels = {forward<float>, backward<float>}; }
void get_kernels(Kernels<double>& kernels) { kernels = {forward<double>, backward<double>}; }

}  // namespace MASKDINO_INSTRUCTION_SET
}  // namespace cpu
}  // namespace maskdino

#include "masks_impl.h"

#undef MASKDINO_INLINE
