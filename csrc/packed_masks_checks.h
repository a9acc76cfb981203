// Tensors of a call that samples packed masks: checked once, dense, and what the kernels need.
#pragma once

#include <ATen/ATen.h>

#include <limits>

#include "packed_masks.h"

namespace maskdino {

// Keeps the memory of a call alive.
struct MaskCall {
  at::Tensor bits, index, points, output;
  MaskSamples samples;
  bool empty() const { return output.numel() == 0; }
};

inline MaskCall prepare_mask_call(const at::Tensor& bits, int64_t width, const at::Tensor& index,
                                  const at::Tensor& points) {
  constexpr int64_t kMost = 1 << 24;  // whole numbers up to it are exact in float32
  TORCH_CHECK_TYPE(bits.scalar_type() == at::kByte, "bits must be uint8, got ", bits.scalar_type());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64, got ",
                   index.scalar_type());
  TORCH_CHECK_TYPE(points.scalar_type() == at::kFloat, "points must be float32, got ",
                   points.scalar_type());
  TORCH_CHECK_VALUE(index.device() == bits.device() && points.device() == bits.device(),
                    "bits are on ", bits.device(), ", index on ", index.device(), ", points on ",
                    points.device());
  TORCH_CHECK_VALUE(bits.dim() == 3 && width >= 0 && width < kMost && bits.size(1) < kMost &&
                        bits.size(2) == (width + 7) / 8,
                    "bits must be (N, H, (W + 7) / 8) with H and W below 2^24, got shape ",
                    bits.sizes(), " for a width of ", width);
  TORCH_CHECK_VALUE(index.dim() == 1 && points.dim() == 3 && points.size(2) == 2 &&
                        (points.size(0) == index.size(0) || points.size(0) == 1),
                    "index must be (M,) and points (M or 1, P, 2), got shapes ", index.sizes(),
                    " and ", points.sizes());
  MaskCall call{bits.contiguous(),
                index.contiguous(),
                points.contiguous(),
                at::empty({index.size(0), points.size(1)}, points.options()),
                {}};
  MaskSamples& samples = call.samples;
  samples.bits = call.bits.const_data_ptr<uint8_t>();
  samples.index = call.index.const_data_ptr<int64_t>();
  samples.points = call.points.const_data_ptr<float>();
  samples.output = call.output.data_ptr<float>();
  samples.masks = bits.size(0);
  samples.rows = index.size(0);
  samples.points_per_row = points.size(1);
  samples.height = static_cast<int>(bits.size(1));
  samples.width = static_cast<int>(width);
  samples.line_bytes = static_cast<int>(bits.size(2));
  samples.shared = points.size(0) == 1;
  return call;
}

}  // namespace maskdino
