// Mask logits at the size of the output: two bilinear resizes, of which each pixel of the output
// reads at most three rows and columns of the map; what lies between them is never made. Included
// by kernels_impl.h alone, once per instruction set.

namespace maskdino {
namespace cpu {
namespace MASKDINO_INSTRUCTION_SET {
namespace {

// One row of a map at the columns of the output. `padded` has two zeros behind the row.
MASKDINO_INLINE void resize_row(const MaskTask& task, const float* __restrict padded,
                                float* __restrict target) {
  const int32_t* __restrict first = task.x.first;
  const float* __restrict a = task.x.weight;
  const float* __restrict b = a + task.x.size;
  const float* __restrict c = b + task.x.size;
  for (int64_t i = 0; i < task.x.size; ++i) {
    const float* from = padded + first[i];
    target[i] = a[i] * from[0] + b[i] * from[1] + c[i] * from[2];
  }
}

// Probabilities of a line's foreground, summed; NaN if one of the logits is.
MASKDINO_INLINE float sum_probabilities(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i], probability = 1.0f / (1.0f + exp_nonpositive(x > 0 ? -x : 0.0f));
    values[i] = x > 0 ? probability : (x <= 0 ? 0.0f : x);
  }
  Vector<float> sums{};
  const int64_t whole = count / kLanes<float> * kLanes<float>;
  for (int64_t i = 0; i < whole; i += kLanes<float>) sums += load(values + i);
  float sum = sum_lanes<float>(sums);
  for (int64_t i = whole; i < count; ++i) sum += values[i];
  return sum;
}

// A line of logits to where they are above 0; returns how many are, or -1 if there may be none,
// neither NaN.
MASKDINO_INLINE int64_t threshold(const float* __restrict values, uint8_t* __restrict target,
                                  int64_t count) {
  int32_t above = 0, not_below = 0;
  for (int64_t i = 0; i < count; ++i) {
    target[i] = values[i] > 0;
    above += values[i] > 0;
    not_below += !(values[i] <= 0);
  }
  return not_below ? above : -1;
}

void resize_mask(const MaskTask& task, int64_t number, float* numbers) {
  const int64_t columns = task.map_columns, width = task.x.size, height = task.y.size;
  const float* map = task.maps + number * task.map_lines * columns;
  float* padded = numbers;
  float* rows = padded + columns + 2;  // three of them, row r in place r % 3
  float* line_buffer = rows + 3 * width;
  padded[columns] = padded[columns + 1] = 0;
  int64_t ready = 0, area = 0;
  double total = 0;
  for (int64_t line = 0; line < height; ++line) {
    const int64_t first = task.y.first[line];
    for (ready = ready < first ? first : ready; ready < first + 3; ++ready) {
      const int64_t row = ready < task.map_lines ? ready : task.map_lines - 1;
      __builtin_memcpy(padded, map + row * columns, columns * sizeof(float));
      resize_row(task, padded, rows + ready % 3 * width);
    }
    const int64_t at = (number * height + line) * width;
    float* __restrict target = task.logits == nullptr ? line_buffer : task.logits + at;
    const float* __restrict top = rows + first % 3 * width;
    const float* __restrict middle = rows + (first + 1) % 3 * width;
    const float* __restrict bottom = rows + (first + 2) % 3 * width;
    const float a = task.y.weight[line], b = task.y.weight[height + line];
    const float c = task.y.weight[2 * height + line];
    for (int64_t i = 0; i < width; ++i) target[i] = a * top[i] + b * middle[i] + c * bottom[i];
    if (task.logits != nullptr) continue;
    const int64_t above = threshold(target, task.foreground + at, width);
    if (above < 0) continue;
    area += above;
    if (task.quality != nullptr) total += sum_probabilities(target, width);
  }
  if (task.quality != nullptr) {
    task.quality[number] = static_cast<float>(total / (static_cast<double>(area) + 1e-6));
  }
}

}  // namespace

void get_kernels(MaskKernel& kernel) { kernel = resize_mask; }

}  // namespace MASKDINO_INSTRUCTION_SET
}  // namespace cpu
}  // namespace maskdino
