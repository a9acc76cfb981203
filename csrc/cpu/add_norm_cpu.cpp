// LayerNorm of sums on a CPU, where nothing is gained by one call: PyTorch's operators, as in
// maskdino/modeling/layers.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../add_norm.h"

namespace maskdino {
namespace cpu {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_norm(
    const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, const at::Tensor& bias,
    double eps, bool with_rounded, const std::optional<at::Tensor>& position) {
  const at::NoGradGuard no_grad;
  const NormCall call = check_add_norm(x, update, weight, bias, eps, position);
  return normed_outputs(
      call, at::layer_norm(call.x + call.update, {call.channels()}, call.weight, call.bias, eps),
      with_rounded);
}

NormOutputs add_norm_train(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                           const at::Tensor& bias, double eps, bool with_rounded,
                           const std::optional<at::Tensor>& position) {
  const at::NoGradGuard no_grad;
  return norm_by_torch(check_add_norm(x, update, weight, bias, eps, position), with_rounded);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward(
    const std::optional<at::Tensor>& grad_normed, const std::optional<at::Tensor>& grad_rounded,
    const std::optional<at::Tensor>& grad_placed, const at::Tensor& sum, const at::Tensor& mean,
    const at::Tensor& rstd, const at::Tensor& weight, at::ScalarType dtype, bool weights) {
  const at::NoGradGuard no_grad;
  return norm_backward_by_torch(check_add_norm_backward(grad_normed, grad_rounded, grad_placed, sum,
                                                        mean, rstd, weight, dtype, weights));
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) {
  m.impl("add_norm", &add_norm);
  m.impl("add_norm_train", &add_norm_train);
  m.impl("add_norm_backward", &add_norm_backward);
}

}  // namespace cpu
}  // namespace maskdino
