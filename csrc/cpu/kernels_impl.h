// The CPU kernels, written once over vectors of MASKDINO_VECTOR_BYTES bytes in the namespace
// MASKDINO_INSTRUCTION_SET. Included at the end of kernels_plain.cpp, kernels_avx2.cpp and
// kernels_avx512.cpp, which choose both; it includes nothing itself, for the reason in kernels.h.
//
// A query of a head goes through three stages:
//   1. locate:     locations and weights of its samples, then 4 corner rows and 4 corner weights
//                  each (loops over samples, which the compiler vectorises);
//   2. accumulate: sum of weight x row over all corners (explicit vectors over channels), or in
//                  backward the dot products grad_output . row and the additions to grad_rows;
//   3. scatter:    backward only: from dot products to gradients of locations and scores.

namespace maskdino {
namespace cpu {
namespace MASKDINO_INSTRUCTION_SET {
namespace {

#define MASKDINO_INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MASKDINO_VECTOR_BYTES)));
  typedef T quarter __attribute__((vector_size(16)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kLanes = MASKDINO_VECTOR_BYTES / sizeof(T);

template <typename T>
MASKDINO_INLINE Vector<T> load(const T* source) {
  Vector<T> vector;
  __builtin_memcpy(&vector, source, sizeof(vector));
  return vector;
}

template <typename T>
MASKDINO_INLINE void store(T* target, Vector<T> vector) {
  __builtin_memcpy(target, &vector, sizeof(vector));
}

// Sums the lanes of each of four vectors.
template <typename T>
MASKDINO_INLINE void sum_lanes(const Vector<T>* vectors, T* sums) {
  constexpr int kParts = MASKDINO_VECTOR_BYTES / 16;
  constexpr int kLanesOfPart = 16 / sizeof(T);
  for (int corner = 0; corner < 4; ++corner) {
    typename VectorOf<T>::quarter parts[kParts];
    __builtin_memcpy(parts, &vectors[corner], sizeof(parts));
    for (int count = kParts / 2; count >= 1; count /= 2) {
      for (int part = 0; part < count; ++part) parts[part] += parts[part + count];
    }
    T sum = parts[0][0] + parts[0][kLanesOfPart / 2];
    if (kLanesOfPart == 4) sum += parts[0][1] + parts[0][kLanesOfPart - 1];
    sums[corner] = sum;
  }
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87, NaN for NaN. Free of branches
// and library calls, so that a loop over it vectorises.
MASKDINO_INLINE float exp_nonpositive(float x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float power = shifted - kRound;
  const float rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
  float series = 1.9875691e-4f;
  series = series * rest + 1.3981999e-3f;
  series = series * rest + 8.3334519e-3f;
  series = series * rest + 4.1665795e-2f;
  series = series * rest + 1.6666665e-1f;
  series = series * rest + 5.0000001e-1f;
  series = series * rest * rest + rest + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;  // the low bits of `shifted` hold the power of two
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return x < -87.0f ? 0.0f : series * scale;
}

MASKDINO_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }

// Views into one thread's scratch memory; arrays of 4 * samples are ordered (corner, sample) with
// corners top left, top right, bottom left, bottom right.
template <typename T>
struct Scratch {
  Scratch(T* numbers, int32_t* indices, int64_t samples)
      : x(numbers),
        y(numbers + samples),
        weight(numbers + 2 * samples),
        fraction_x(numbers + 3 * samples),
        fraction_y(numbers + 4 * samples),
        corner_weight(numbers + 5 * samples),
        dot(numbers + 9 * samples),
        row_buffer(numbers + 13 * samples),
        corner_row(indices) {}
  T *__restrict x, *__restrict y, *__restrict weight;
  T *__restrict fraction_x, *__restrict fraction_y;
  T *__restrict corner_weight, *__restrict dot, *__restrict row_buffer;
  int32_t* __restrict corner_row;
};

template <typename T>
MASKDINO_INLINE void softmax(const T* __restrict logits, T* __restrict weight, int64_t count) {
  T largest = logits[0];
  for (int64_t i = 1; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
  for (int64_t i = 0; i < count; ++i) weight[i] = exp_nonpositive(logits[i] - largest);
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weight[i];
  const T scale = T(1) / sum;
  for (int64_t i = 0; i < count; ++i) weight[i] *= scale;
}

// Stage 1a: pixel coordinates (pixel centres at integers) and weights of a query's samples.
template <typename T>
MASKDINO_INLINE void locate(const HeadTask<T>& task, int64_t query, Scratch<T>& s) {
  const int64_t n = task.samples;
  const T* __restrict xy = task.points_xy + query * task.points_stride;
  const T* __restrict scores = task.scores + query * task.scores_stride;
  const T* __restrict width = task.width;
  const T* __restrict height = task.height;
  if (task.reference_size == 0) {
    for (int64_t i = 0; i < n; ++i) {
      s.x[i] = xy[2 * i] * width[i] - T(0.5);
      s.y[i] = xy[2 * i + 1] * height[i] - T(0.5);
      s.weight[i] = scores[i];
    }
    return;
  }
  softmax(scores, s.weight, n);
  const T* reference = task.reference + query * task.reference_size;
  const T centre_x = reference[0], centre_y = reference[1];
  if (task.reference_size == 2) {
    for (int64_t i = 0; i < n; ++i) {
      s.x[i] = centre_x * width[i] + xy[2 * i] - T(0.5);
      s.y[i] = centre_y * height[i] + xy[2 * i + 1] - T(0.5);
    }
  } else {
    const T step_x = reference[2] * T(0.5) / task.points, step_y = reference[3] * T(0.5) / task.points;
    for (int64_t i = 0; i < n; ++i) {
      s.x[i] = (centre_x + xy[2 * i] * step_x) * width[i] - T(0.5);
      s.y[i] = (centre_y + xy[2 * i + 1] * step_y) * height[i] - T(0.5);
    }
  }
}

// Stage 1b: rows and bilinear weights of the corners. A sample that touches no pixel (or is NaN)
// is moved to (-2, -2), where all four corners are the zero row; so the conversions to integers
// below cannot overflow and every index is in range.
template <typename T>
MASKDINO_INLINE void find_corners(const HeadTask<T>& task, Scratch<T>& s) {
  const int64_t n = task.samples;
  const T* __restrict width = task.width;
  const T* __restrict height = task.height;
  const int32_t* __restrict columns = task.columns;
  const int32_t* __restrict lines = task.lines;
  const int32_t* __restrict start = task.start;
  const int32_t zero_row = task.zero_row;
  for (int64_t i = 0; i < n; ++i) {
    const bool touches =
        (s.x[i] > T(-1)) & (s.x[i] < width[i]) & (s.y[i] > T(-1)) & (s.y[i] < height[i]);
    const T x = touches ? s.x[i] : T(-2);
    const T y = touches ? s.y[i] : T(-2);
    int32_t left = static_cast<int32_t>(x);
    int32_t top = static_cast<int32_t>(y);
    left -= x < static_cast<T>(left) ? 1 : 0;  // truncation to floor
    top -= y < static_cast<T>(top) ? 1 : 0;
    s.fraction_x[i] = x - static_cast<T>(left);
    s.fraction_y[i] = y - static_cast<T>(top);
    const int32_t row = start[i] + top * columns[i] + left;
    const bool left_in = left >= 0, right_in = (left >= -1) & (left + 1 < columns[i]);
    const bool top_in = top >= 0, bottom_in = (top >= -1) & (top + 1 < lines[i]);
    s.corner_row[i] = top_in & left_in ? row : zero_row;
    s.corner_row[n + i] = top_in & right_in ? row + 1 : zero_row;
    s.corner_row[2 * n + i] = bottom_in & left_in ? row + columns[i] : zero_row;
    s.corner_row[3 * n + i] = bottom_in & right_in ? row + columns[i] + 1 : zero_row;
    const T top_weight = s.weight[i] * (T(1) - s.fraction_y[i]);
    const T bottom_weight = s.weight[i] * s.fraction_y[i];
    s.corner_weight[i] = top_weight * (T(1) - s.fraction_x[i]);
    s.corner_weight[n + i] = top_weight * s.fraction_x[i];
    s.corner_weight[2 * n + i] = bottom_weight * (T(1) - s.fraction_x[i]);
    s.corner_weight[3 * n + i] = bottom_weight * s.fraction_x[i];
  }
}

// Stage 2, forward: Count vectors of channels from `channel`. Two sets of sums, because one chain
// of dependent additions would wait for its own latency.
template <typename T, int Count>
MASKDINO_INLINE void sum_rows(const HeadTask<T>& task, const Scratch<T>& s, int64_t channel,
                              T* output) {
  Vector<T> even[Count] = {}, odd[Count] = {};
  const T* rows = task.rows + channel;
  for (int64_t i = 0; i < 4 * task.samples; i += 2) {
    const T* first = rows + s.corner_row[i] * task.row_stride;
    const T* second = rows + s.corner_row[i + 1] * task.row_stride;
    for (int v = 0; v < Count; ++v) {
      even[v] += s.corner_weight[i] * load<T>(first + v * kLanes<T>);
      odd[v] += s.corner_weight[i + 1] * load<T>(second + v * kLanes<T>);
    }
  }
  for (int v = 0; v < Count; ++v) store<T>(output + channel + v * kLanes<T>, even[v] + odd[v]);
}

// Stage 2, backward: adds to grad_rows, and to the dot products of grad_output with the corners.
template <typename T, int Count>
MASKDINO_INLINE void spread_rows(const HeadTask<T>& task, const Scratch<T>& s, int64_t channel,
                                 const T* grad_output) {
  const int64_t n = task.samples;
  Vector<T> grad[Count];
  for (int v = 0; v < Count; ++v) grad[v] = load<T>(grad_output + channel + v * kLanes<T>);
  for (int64_t i = 0; i < n; ++i) {
    Vector<T> products[4];
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t at = s.corner_row[corner * n + i] * task.row_stride + channel;
      const T weight = s.corner_weight[corner * n + i];
      const T* row = task.rows + at;
      T* grad_row = task.grad_rows + at;
      products[corner] = grad[0] * load<T>(row);
      for (int v = 1; v < Count; ++v) products[corner] += grad[v] * load<T>(row + v * kLanes<T>);
      for (int v = 0; v < Count; ++v) {
        T* target = grad_row + v * kLanes<T>;
        store<T>(target, load<T>(target) + weight * grad[v]);
      }
    }
    T sums[4];
    sum_lanes<T>(products, sums);
    for (int corner = 0; corner < 4; ++corner) s.dot[corner * n + i] += sums[corner];
  }
}

// Runs `Step<T, Count>` over all channels of a padded row, four vectors at a time, then the rest.
#define MASKDINO_OVER_CHANNELS(step, argument)                                            \
  do {                                                                                    \
    const int64_t vectors = task.row_stride / kLanes<T>;                                  \
    int64_t v = 0;                                                                        \
    for (; v + 4 <= vectors; v += 4) step<T, 4>(task, s, v * kLanes<T>, argument);        \
    for (; v + 2 <= vectors; v += 2) step<T, 2>(task, s, v * kLanes<T>, argument);        \
    for (; v < vectors; ++v) step<T, 1>(task, s, v * kLanes<T>, argument);                \
  } while (false)

template <typename T>
void forward(const HeadTask<T>& task, int64_t begin, int64_t end, T* numbers, int32_t* indices) {
  Scratch<T> s(numbers, indices, task.samples);
  const bool whole_rows = task.channels == task.row_stride;
  for (int64_t query = begin; query < end; ++query) {
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
MASKDINO_INLINE void gradients_of_samples(Scratch<T>& s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T top_left = s.dot[i], top_right = s.dot[n + i];
    const T bottom_left = s.dot[2 * n + i], bottom_right = s.dot[3 * n + i];
    const T fx = s.fraction_x[i], fy = s.fraction_y[i];
    const T top = top_left + fx * (top_right - top_left);
    const T bottom = bottom_left + fx * (bottom_right - bottom_left);
    const T slope_x =
        (T(1) - fy) * (top_right - top_left) + fy * (bottom_right - bottom_left);
    s.dot[i] = top + fy * (bottom - top);
    s.x[i] = s.weight[i] * slope_x;
    s.y[i] = s.weight[i] * (bottom - top);
  }
}

// Stage 3 of the textbook form: from pixels to normalised locations.
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
  T mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += s.weight[i] * s.dot[i];
  for (int64_t i = 0; i < n; ++i) grad_scores[i] = s.weight[i] * (s.dot[i] - mean);

  // Gradients of normalised locations, summed over the samples for the reference.
  T centre_x = 0, centre_y = 0, size_x = 0, size_y = 0;
  const bool boxes = task.reference_size == 4;
  const T* reference = task.reference + query * task.reference_size;
  const T per_point = T(0.5) / task.points;
  for (int64_t i = 0; i < n; ++i) {
    const T grad_x = s.x[i] * task.width[i], grad_y = s.y[i] * task.height[i];
    centre_x += grad_x;
    centre_y += grad_y;
    size_x += grad_x * xy[2 * i] * per_point;
    size_y += grad_y * xy[2 * i + 1] * per_point;
    grad_xy[2 * i] = boxes ? grad_x * reference[2] * per_point : s.x[i];
    grad_xy[2 * i + 1] = boxes ? grad_y * reference[3] * per_point : s.y[i];
  }
  if (task.grad_reference == nullptr) return;
  T* grad_reference = task.grad_reference + query * task.reference_size;
  grad_reference[0] = centre_x;
  grad_reference[1] = centre_y;
  if (boxes) {
    grad_reference[2] = size_x;
    grad_reference[3] = size_y;
  }
}

template <typename T>
void backward(const HeadTask<T>& task, int64_t begin, int64_t end, T* numbers, int32_t* indices) {
  Scratch<T> s(numbers, indices, task.samples);
  const bool whole_rows = task.channels == task.row_stride;
  for (int64_t c = task.channels; c < task.row_stride; ++c) s.row_buffer[c] = 0;
  for (int64_t query = begin; query < end; ++query) {
    locate(task, query, s);
    find_corners(task, s);
    const T* grad_output = task.grad_output + query * task.output_stride;
    if (!whole_rows) {
      __builtin_memcpy(s.row_buffer, grad_output, task.channels * sizeof(T));
      grad_output = s.row_buffer;
    }
    for (int64_t i = 0; i < 4 * task.samples; ++i) s.dot[i] = 0;
    MASKDINO_OVER_CHANNELS(spread_rows, grad_output);
    gradients_of_samples(s, task.samples);
    if (task.reference_size == 0) {
      write_location_gradients(task, query, s);
    } else {
      write_offset_gradients(task, query, s);
    }
  }
}

#undef MASKDINO_OVER_CHANNELS
#undef MASKDINO_INLINE

}  // namespace

void get_kernels(Kernels<float>& kernels) { kernels = {forward<float>, backward<float>}; }
void get_kernels(Kernels<double>& kernels) { kernels = {forward<double>, backward<double>}; }

}  // namespace MASKDINO_INSTRUCTION_SET
}  // namespace cpu
}  // namespace maskdino
