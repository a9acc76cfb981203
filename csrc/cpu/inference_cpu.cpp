// Steps of inference on a CPU, where nothing is gained by one call: PyTorch's operators, as in
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> predict_boxes(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& anchor_logits, const at::Tensor& rates, const at::Tensor& phases, double most,
    at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const at::Tensor logits = at::linear(hidden, weight, bias) + anchor_logits,
                   boxes = logits.sigmoid();
  const auto parts = boxes.unbind(-1);
  const at::Tensor in_order = at::stack({parts[1], parts[0], parts[2], parts[3]}, -1);
  const at::Tensor sines = at::addcmul(phases, in_order.unsqueeze(-1), rates).sin();
  return {boxes, logits.clamp(-most, most), sines.flatten(-2).to(dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) {
  m.impl("add_norm", &add_norm);
  m.impl("predict_boxes", &predict_boxes);
}

}  // namespace cpu
}  // namespace maskdino
