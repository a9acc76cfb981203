// Masks in the frame of the output on a CPU: torch's threads share the masks.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../masks_checks.h"
#include "instruction_set.h"
#include "kernels.h"

namespace maskdino {
namespace cpu {
namespace {

// What a position reads of an axis of `from` cells that is enlarged to `to`.
struct Neighbors {
  Neighbors(int64_t from, int64_t to, int64_t position) {
    const float scale = static_cast<float>(from) / static_cast<float>(to);
    const float place = std::max(0.0f, scale * (static_cast<float>(position) + 0.5f) - 0.5f);
    low = std::min(static_cast<int64_t>(place), from - 1);
    high = std::min(low + 1, from - 1);
    above = std::min(place - static_cast<float>(low), 1.0f);
  }
  int64_t low, high;
  float above;  // weight of `high`; that of `low` is the rest
};

// The cells of a map that each pixel of the output reads along an axis.
struct AxisTable {
  // The map is resized to `canvas`, which is not smaller, cut to `image`, and resized to `output`.
  AxisTable(int64_t map, int64_t canvas, int64_t image, int64_t output)
      : first(output), weight(3 * output) {
    for (int64_t i = 0; i < output; ++i) {
      const Neighbors of_image(image, output, i);
      const Neighbors low(map, canvas, of_image.low), high(map, canvas, of_image.high);
      first[i] = static_cast<int32_t>(low.low);
      const auto add = [&](int64_t cell, float share) {
        // At most two cells further, but for the rounding of places.
        weight[std::min<int64_t>(cell - low.low, 2) * output + i] += share;
      };
      add(low.low, (1 - of_image.above) * (1 - low.above));
      add(low.high, (1 - of_image.above) * low.above);
      add(high.low, of_image.above * (1 - high.above));
      add(high.high, of_image.above * high.above);
    }
  }
  Axis axis() const { return {first.data(), weight.data(), static_cast<int64_t>(first.size())}; }
  std::vector<int32_t> first;
  std::vector<float> weight;
};

std::tuple<at::Tensor, at::Tensor> resized_masks(const at::Tensor& maps, at::IntArrayRef canvas,
                                                 at::IntArrayRef image, at::IntArrayRef output,
                                                 bool binary, bool with_quality) {
  const at::NoGradGuard no_grad;
  check_mask_sizes(maps, canvas, image, output);
  const at::Tensor dense = maps.contiguous();
  const int64_t number = maps.size(0);
  const at::Tensor masks = at::empty({number, output[0], output[1]},
                                     maps.options().dtype(binary ? at::kBool : at::kFloat));
  const at::Tensor quality = at::empty({binary && with_quality ? number : 0}, maps.options());
  const AxisTable x(maps.size(2), canvas[1], image[1], output[1]);
  const AxisTable y(maps.size(1), canvas[0], image[0], output[0]);
  MaskTask task{};
  task.maps = dense.const_data_ptr<float>();
  task.map_lines = maps.size(1);
  task.map_columns = maps.size(2);
  task.x = x.axis();
  task.y = y.axis();
  if (binary) {
    task.foreground = reinterpret_cast<uint8_t*>(masks.data_ptr<bool>());
    task.quality = with_quality ? quality.data_ptr<float>() : nullptr;
  } else {
    task.logits = masks.data_ptr<float>();
  }
  const MaskKernel kernel = choose_kernels<MaskKernel>();
  at::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> numbers(scratch_numbers(task));
    for (int64_t i = begin; i < end; ++i) kernel(task, i, numbers.data());
  });
  return {masks, quality};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) { m.impl("resized_masks", &resized_masks); }

}  // namespace cpu
}  // namespace maskdino
