// Group norm of maps on a CPU, which the network does not ask for: PyTorch's operators, in float64
// because theirs of float32 lose digits.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace maskdino {
namespace cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> group_norm(const at::Tensor& x,
                                              const std::optional<at::Tensor>& shift,
                                              const at::Tensor& weight, const at::Tensor& bias,
                                              int64_t groups, double eps, bool relu,
                                              const std::optional<at::Tensor>& coarse,
                                              at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  at::Tensor map = x.to(at::kDouble);
  if (shift.has_value()) map = map + shift->to(at::kDouble).view({-1, 1, 1});
  const auto layout = x.suggest_memory_format();
  if (x.numel() == 0) {
    return {at::empty_like(x, x.options().dtype(dtype)),
            at::zeros({x.size(0), groups, 2}, weight.options())};
  }
  auto [normed, mean, scale] =
      at::native_group_norm(map.contiguous(layout), weight.to(at::kDouble), bias.to(at::kDouble),
                            x.size(0), x.size(1), x.size(2) * x.size(3), groups, eps);
  if (relu) normed = normed.relu();
  if (coarse.has_value()) {
    const at::IntArrayRef size = x.sizes().slice(2);
    normed = normed + at::upsample_bilinear2d(coarse->to(at::kDouble), size, false);
  }
  return {normed.to(dtype).contiguous(layout), at::stack({mean, scale}, -1).to(at::kFloat)};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) { m.impl("group_norm", &group_norm); }

}  // namespace cpu
}  // namespace maskdino
