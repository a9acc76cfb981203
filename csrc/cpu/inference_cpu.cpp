// Steps of inference on a CPU, where nothing is gained by one call: PyTorch's operators, as in
// maskdino/modeling/layers.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

namespace maskdino {
namespace cpu {
namespace {

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

TORCH_LIBRARY_IMPL(maskdino, CPU, m) { m.impl("predict_boxes", &predict_boxes); }

}  // namespace cpu
}  // namespace maskdino
