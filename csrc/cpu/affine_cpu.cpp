// What follows a convolution, on a CPU by PyTorch's operators: the network does not ask for it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../affine_checks.h"

namespace maskdino {
namespace cpu {
namespace {

at::Tensor of_channels(const at::Tensor& numbers) { return numbers.reshape({1, -1, 1, 1}); }

at::Tensor compute(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                   const at::Tensor& shift, const std::optional<at::Tensor>& residual, bool relu) {
  const at::NoGradGuard no_grad;
  check_map(x);
  at::Tensor y = x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (scale.has_value()) y = y * of_channels(checked_channels(*scale, "scale", x, false));
  y = y + of_channels(checked_channels(shift, "shift", x, true));
  if (residual.has_value()) y = y + checked_like(*residual, "residual", x);
  if (relu) y = y.relu();
  return y.to(x.scalar_type());
}

at::Tensor affine(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                  const at::Tensor& shift, const std::optional<at::Tensor>& residual, bool relu) {
  return compute(x, scale, shift, residual, relu).contiguous(layout_of(x));
}

void affine_(at::Tensor x, const std::optional<at::Tensor>& scale, const at::Tensor& shift,
             const std::optional<at::Tensor>& residual, bool relu) {
  check_map(x);
  check_dense(x);
  x.copy_(compute(x, scale, shift, residual, relu));
}

std::tuple<at::Tensor, at::Tensor> affine_backward(const at::Tensor& grad,
                                                   const std::optional<at::Tensor>& y,
                                                   const std::optional<at::Tensor>& scale,
                                                   bool with_x, bool with_residual) {
  const at::NoGradGuard no_grad;
  check_map(grad);
  const at::MemoryFormat layout = layout_of(y.has_value() ? *y : grad);
  at::Tensor masked = grad.contiguous(layout);
  if (y.has_value()) {
    masked = at::threshold_backward(masked, checked_like(*y, "output", masked), 0);
  }
  const at::Tensor none = at::empty({0}, grad.options());
  at::Tensor grad_x = none;
  if (with_x && scale.has_value()) {
    grad_x = (masked * of_channels(checked_channels(*scale, "scale", grad, false)))
                 .to(grad.scalar_type());
  } else if (with_x) {
    grad_x = masked.clone();
  }
  // Never the memory of the input.
  const at::Tensor grad_residual = with_residual ? (y.has_value() ? masked : masked.clone()) : none;
  return {grad_x.contiguous(with_x ? layout : at::MemoryFormat::Contiguous), grad_residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) {
  m.impl("affine", &affine);
  m.impl("affine_", &affine_);
  m.impl("affine_backward", &affine_backward);
}

}  // namespace cpu
}  // namespace maskdino
