// What is asked of maps that become masks of the output, on any device.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

namespace maskdino {

inline void check_mask_sizes(const at::Tensor& maps, at::IntArrayRef canvas, at::IntArrayRef image,
                             at::IntArrayRef output) {
  constexpr int64_t kMost = 1 << 24;  // whole numbers up to it are exact in float32
  TORCH_CHECK_TYPE(maps.scalar_type() == at::kFloat, "maps must be float32, got ",
                   maps.scalar_type());
  TORCH_CHECK_VALUE(
      maps.dim() == 3 && canvas.size() == 2 && image.size() == 2 && output.size() == 2,
      "maps must be (R, h, w) and sizes (height, width), got shape ", maps.sizes(), " and sizes ",
      canvas, ", ", image, ", ", output);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t map = maps.size(axis + 1);
    TORCH_CHECK_VALUE(0 < map && map <= canvas[axis] && 0 < image[axis] &&
                          image[axis] <= canvas[axis] && 0 < output[axis] &&
                          std::max(canvas[axis], output[axis]) < kMost,
                      "sizes must be positive, below 2^24, and those of the canvas the largest "
                      "but for the output's: maps ",
                      maps.sizes(), ", canvas ", canvas, ", image ", image, ", output ", output);
  }
}

}  // namespace maskdino
