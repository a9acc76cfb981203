// Tensors of a call of `affine` or its backward, checked once.
//
// Shape key: B images, C channels, H, W of a map.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace maskdino {

inline at::MemoryFormat layout_of(const at::Tensor& map) {
  return map.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                           : at::MemoryFormat::Contiguous;
}

inline void check_map(const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 4, "expected a map (B, C, H, W), got shape ", map.sizes());
}

// A number for each channel, dense.
inline at::Tensor checked_channels(const at::Tensor& numbers, const char* name,
                                   const at::Tensor& map, bool may_be_half) {
  TORCH_CHECK_TYPE(numbers.scalar_type() == at::kFloat ||
                       (may_be_half && numbers.scalar_type() == map.scalar_type()),
                   name, " must be float32, got ", numbers.scalar_type());
  TORCH_CHECK_VALUE(numbers.numel() == map.size(1) && numbers.device() == map.device(), name,
                    " must have ", map.size(1), " numbers on ", map.device(), ", got shape ",
                    numbers.sizes(), " on ", numbers.device());
  return numbers.contiguous();
}

// In the layout of the map.
inline at::Tensor checked_like(const at::Tensor& other, const char* name, const at::Tensor& map) {
  TORCH_CHECK_TYPE(other.scalar_type() == map.scalar_type(), name, " must be ", map.scalar_type(),
                   ", got ", other.scalar_type());
  TORCH_CHECK_VALUE(other.sizes() == map.sizes() && other.device() == map.device(), name,
                    " must have shape ", map.sizes(), " on ", map.device(), ", got ", other.sizes(),
                    " on ", other.device());
  return other.contiguous(layout_of(map));
}

inline void check_dense(const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.is_contiguous(layout_of(map)),
                    "in place a map must be contiguous or channels-last, got strides ",
                    map.strides());
}

}  // namespace maskdino
