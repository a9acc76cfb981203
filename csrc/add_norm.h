// LayerNorm of sums, for the CPU and for CUDA: what a call is given, checked once, and PyTorch's
// operators, where no kernel serves.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace maskdino {

// Dense tensors of a call; the update is in the type in which products are computed.
struct NormCall {
  at::Tensor x, update;     // (..., C)
  at::Tensor weight, bias;  // (C,)
  at::Tensor position;      // the last dimensions of x, or undefined
  double eps;
  int64_t channels() const { return x.size(-1); }
  int64_t rows() const { return channels() == 0 ? 0 : x.numel() / channels(); }
};

inline NormCall check_add_norm(const at::Tensor& x, const at::Tensor& update,
                               const at::Tensor& weight, const at::Tensor& bias, double eps,
                               const std::optional<at::Tensor>& position) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(x.dim() > 0, "cannot norm a number");
  const int64_t channels = x.size(-1);
  NormCall call{dense_float(x, x.sizes(), x.device()),
                update.contiguous(),
                dense_float(weight, {channels}, x.device()),
                dense_float(bias, {channels}, x.device()),
                {},
                eps};
  TORCH_CHECK_VALUE(update.sizes() == x.sizes() && update.device() == x.device() &&
                        call.rows() <= kMost && channels <= kMost,
                    "cannot add ", update.sizes(), " to ", x.sizes());
  if (!position.has_value()) return call;
  call.position = position->contiguous();
  TORCH_CHECK_VALUE(position->device() == x.device() && position->dim() > 0 &&
                        position->dim() <= x.dim() &&
                        position->sizes() == x.sizes().slice(x.dim() - position->dim()),
                    "cannot add positions ", position->sizes(), " to ", x.sizes());
  TORCH_CHECK_TYPE(
      position->scalar_type() == at::kFloat || position->scalar_type() == update.scalar_type(),
      "positions must be float32 or as the update, got ", position->scalar_type());
  return call;
}

// LayerNorm of x + update; if wanted, in the update's type too, and with the position in that type.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> normed_outputs(const NormCall& call,
                                                                     const at::Tensor& normed,
                                                                     bool with_rounded) {
  const at::ScalarType type = call.update.scalar_type();
  const at::Tensor none = at::empty({0}, call.update.options());
  // Never the same memory twice.
  return {normed, with_rounded ? normed.to(type, false, true) : none,
          call.position.defined() ? (normed + call.position).to(type) : at::empty_like(none)};
}

// LayerNorm of a sum, and what the way back needs: the sum (..., C), its mean and 1 / standard
// deviation (..., 1), by PyTorch's operators.
using NormOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
inline NormOutputs norm_by_torch(const NormCall& call, bool with_rounded) {
  const at::Tensor sum = call.x + call.update;
  const auto [normed, mean, rstd] =
      at::native_layer_norm(sum, {call.channels()}, call.weight, call.bias, call.eps);
  return std::tuple_cat(normed_outputs(call, normed, with_rounded), std::tie(sum, mean, rstd));
}

// Gradients of all outputs, dense; those of what nobody read are undefined.
struct NormGradCall {
  at::Tensor normed, rounded, placed;  // (..., C)
  at::Tensor sum, mean, rstd, weight;  // (..., C), (..., 1), (..., 1), (C,)
  at::ScalarType type;                 // of the update
  bool weights;                        // whether gradients of weight and bias are wanted
  int64_t channels() const { return weight.numel(); }
  int64_t rows() const { return mean.numel(); }
};

inline NormGradCall check_add_norm_backward(const std::optional<at::Tensor>& grad_normed,
                                            const std::optional<at::Tensor>& grad_rounded,
                                            const std::optional<at::Tensor>& grad_placed,
                                            const at::Tensor& sum, const at::Tensor& mean,
                                            const at::Tensor& rstd, const at::Tensor& weight,
                                            at::ScalarType type, bool weights) {
  TORCH_CHECK_VALUE(sum.dim() > 0, "cannot norm a number");
  std::vector<int64_t> of_row = sum.sizes().vec();
  of_row.back() = 1;
  const auto dense = [&](const std::optional<at::Tensor>& grad, at::ScalarType expected) {
    if (!grad.has_value()) return at::Tensor();
    TORCH_CHECK_TYPE(grad->scalar_type() == expected, "expected a gradient of ", expected, ", got ",
                     grad->scalar_type());
    TORCH_CHECK_VALUE(grad->sizes() == sum.sizes() && grad->device() == sum.device(),
                      "expected a gradient of shape ", sum.sizes(), ", got ", grad->sizes());
    return grad->contiguous();
  };
  return {dense(grad_normed, at::kFloat),
          dense(grad_rounded, type),
          dense(grad_placed, type),
          dense_float(sum, sum.sizes(), sum.device()),
          dense_float(mean, of_row, sum.device()),
          dense_float(rstd, of_row, sum.device()),
          dense_float(weight, {sum.size(-1)}, sum.device()),
          type,
          weights};
}

// Gradients of the sum, of the update (empty where it is float32: that of the sum), of weight and
// of bias (empty where they are not wanted), by PyTorch's operators.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_backward_by_torch(
    const NormGradCall& call) {
  at::Tensor grad = at::zeros_like(call.sum);
  for (const at::Tensor& part : {call.rounded, call.placed, call.normed}) {
    if (part.defined()) grad += part;
  }
  const auto [of_sum, of_weight, of_bias] =
      at::native_layer_norm_backward(grad, call.sum, {call.channels()}, call.mean, call.rstd,
                                     call.weight, call.weight, {true, call.weights, call.weights});
  const at::Tensor none = at::empty({0}, call.sum.options());
  return {of_sum,
          call.type == at::kFloat ? at::empty({0}, call.sum.options()) : of_sum.to(call.type),
          call.weights ? of_weight : none, call.weights ? of_bias : at::empty_like(none)};
}

}  // namespace maskdino
