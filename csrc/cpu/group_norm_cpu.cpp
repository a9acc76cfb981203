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

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean_and_scale, bool relu) {
  const at::NoGradGuard no_grad;
  const auto layout = x.suggest_memory_format();
  const at::Tensor of_x = at::empty_like(x, x.options(), layout);
  if (x.numel() == 0) return {of_x, at::zeros_like(weight), at::zeros_like(bias)};
  const auto in_groups = [&](const at::Tensor& map) {
    return map.reshape({x.size(0), mean_and_scale.size(1), -1});
  };
  const at::Tensor kept = mean_and_scale.to(at::kDouble), scale = kept.select(2, 1).unsqueeze(2);
  const at::Tensor factor = weight.to(at::kDouble).view({-1, 1, 1});
  const at::Tensor normed = (in_groups(x.to(at::kDouble)) - kept.select(2, 0).unsqueeze(2)) * scale;
  const at::Tensor map = normed.reshape(x.sizes());
  at::Tensor passed = grad.to(at::kDouble);
  if (relu) passed = passed * (map * factor + bias.to(at::kDouble).view({-1, 1, 1}) > 0);
  const at::Tensor scaled = in_groups(passed * factor);
  const at::Tensor made =
      (scaled - scaled.mean(2, true) - normed * (scaled * normed).mean(2, true)) * scale;
  of_x.copy_(made.reshape(x.sizes()));
  return {of_x, (passed * map).sum({0, 2, 3}).to(at::kFloat), passed.sum({0, 2, 3}).to(at::kFloat)};
}

at::Tensor resize_backward(const at::Tensor& grad, int64_t height, int64_t width) {
  const at::NoGradGuard no_grad;
  const at::IntArrayRef size = grad.sizes();
  return at::upsample_bilinear2d_backward(grad.to(at::kDouble), size.slice(2),
                                          {size[0], size[1], height, width}, false)
      .to(at::kFloat);
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) {
  m.impl("group_norm", &group_norm);
  m.impl("group_norm_backward", &group_norm_backward);
  m.impl("resize_backward", &resize_backward);
}

}  // namespace cpu
}  // namespace maskdino
