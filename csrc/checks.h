// Sizes of a call, checked once, so that the kernels need no checks of their own.
//
// Shape key: B images, S tokens of all levels, Q queries, M heads, D channels of a head, L levels,
// P points per level and head.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <optional>

namespace maskdino {

struct Sizes {
  int64_t images, tokens, heads, channels, queries, levels, points;
  int64_t samples() const { return levels * points; }
  // True when there is nothing to compute: the output is empty.
  bool empty() const { return images == 0 || queries == 0 || heads == 0 || channels == 0; }
};

// The dtype of arithmetic, locations, weights and references.
inline at::ScalarType compute_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& value,
                       at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, " for a value of ",
                   value.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == value.device(), name, " is on ", tensor.device(),
                    ", value on ", value.device());
}

inline void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, " must have shape ", expected, ", got ",
                    tensor.sizes());
}

// Dense float32 of a shape.
inline at::Tensor dense_float(const at::Tensor& tensor, at::IntArrayRef shape, at::Device device) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "expected float32, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.device() == device, "expected shape ", shape,
                    " on ", device, ", got ", tensor.sizes(), " on ", tensor.device());
  return tensor.contiguous();
}

// Checks the value and the level sizes ([H0, W0, H1, W1, ...]); queries and points stay 0.
inline Sizes check_value(const at::Tensor& value, at::IntArrayRef shapes) {
  const auto type = value.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
      "value must be float32, float64, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(value.dim() == 4, "value must be (B, S, M, D), got shape ", value.sizes());
  TORCH_CHECK_VALUE(!shapes.empty() && shapes.size() % 2 == 0,
                    "spatial_shapes must hold H and W of each level, got ", shapes);
  int64_t area = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    // Each side below 2^31 keeps the product in range; token numbers are 32-bit in the kernels.
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
    TORCH_CHECK_VALUE(
        shapes[i] > 0 && shapes[i + 1] > 0 && shapes[i] < kLimit && shapes[i + 1] < kLimit,
        "spatial_shapes must be positive and below 2^31, got ", shapes);
    area += shapes[i] * shapes[i + 1];
    TORCH_CHECK_VALUE(area < kLimit, "spatial_shapes ", shapes, " hold more than 2^31 tokens");
  }
  TORCH_CHECK_VALUE(area == value.size(1), "spatial_shapes ", shapes, " hold ", area,
                    " tokens, value has ", value.size(1));
  Sizes sizes{};
  sizes.images = value.size(0);
  sizes.tokens = value.size(1);
  sizes.heads = value.size(2);
  sizes.channels = value.size(3);
  sizes.levels = static_cast<int64_t>(shapes.size()) / 2;
  // Tensors without elements may have sides of any length: their products must be in range, too.
  constexpr int64_t kMostChannels = 1 << 28;
  TORCH_CHECK_VALUE(sizes.heads < kMostChannels && sizes.channels < kMostChannels &&
                        sizes.heads * sizes.channels < kMostChannels,
                    "value has too many channels: ", sizes.heads, " heads of ", sizes.channels);
  return sizes;
}

// Sets P; with the bounds above it keeps M x L x P x 3 in range.
inline void set_points(Sizes& sizes, int64_t points) {
  constexpr int64_t kMostPoints = 1 << 20, kMostSamples = 1 << 30;
  TORCH_CHECK_VALUE(points > 0 && points < kMostPoints && sizes.levels * points < kMostSamples,
                    "points per level must be at least 1 and below 2^20, and below 2^30 on all ",
                    sizes.levels, " levels, got ", points);
  sizes.points = points;
}

inline Sizes check_inputs(const at::Tensor& value, at::IntArrayRef shapes,
                          const at::Tensor& locations, const at::Tensor& weights) {
  Sizes sizes = check_value(value, shapes);
  check_like(locations, "sampling_locations", value, compute_type(value));
  check_like(weights, "attention_weights", value, compute_type(value));
  TORCH_CHECK_VALUE(locations.dim() == 6, "sampling_locations must be (B, Q, M, L, P, 2), got ",
                    "shape ", locations.sizes());
  sizes.queries = locations.size(1);
  set_points(sizes, locations.size(4));
  check_shape(locations, "sampling_locations",
              {sizes.images, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2});
  check_shape(weights, "attention_weights",
              {sizes.images, sizes.queries, sizes.heads, sizes.levels, sizes.points});
  return sizes;
}

inline Sizes check_fused_inputs(const at::Tensor& value, at::IntArrayRef shapes,
                                const at::Tensor& offsets_and_logits,
                                const std::optional<at::Tensor>& reference, int64_t num_points) {
  Sizes sizes = check_value(value, shapes);
  check_like(offsets_and_logits, "offsets_and_logits", value, value.scalar_type());
  TORCH_CHECK_VALUE(offsets_and_logits.dim() == 3,
                    "offsets_and_logits must be (B, Q, M * L * P * 3), got shape ",
                    offsets_and_logits.sizes());
  sizes.queries = offsets_and_logits.size(1);
  set_points(sizes, num_points);
  check_shape(offsets_and_logits, "offsets_and_logits",
              {sizes.images, sizes.queries, sizes.heads * sizes.samples() * 3});
  if (!reference.has_value()) {
    TORCH_CHECK_VALUE(sizes.queries == sizes.tokens, "without a reference there is one query per ",
                      "token: ", sizes.tokens, ", got ", sizes.queries);
    return sizes;
  }
  check_like(*reference, "reference", value, compute_type(value));
  TORCH_CHECK_VALUE(reference->dim() == 3 && (reference->size(2) == 2 || reference->size(2) == 4),
                    "reference must be (B, Q, 2 or 4), got shape ", reference->sizes());
  check_shape(*reference, "reference", {sizes.images, sizes.queries, reference->size(2)});
  return sizes;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value,
                              const Sizes& sizes) {
  check_like(grad_output, "grad_output", value, value.scalar_type());
  check_shape(grad_output, "grad_output",
              {sizes.images, sizes.queries, sizes.heads * sizes.channels});
}

}  // namespace maskdino
