// Gradients of `group_norm`, which is learned where there is no shift.
#include "autograd.h"

namespace maskdino {
namespace {

std::tuple<at::Tensor, at::Tensor> group_norm(const at::Tensor& x, const Optional& shift,
                                              const at::Tensor& weight, const at::Tensor& bias,
                                              int64_t groups, double eps, bool relu,
                                              const Optional& coarse, at::ScalarType dtype);

const auto& forward_operator() {
  static const auto op = operator_like(group_norm, "maskdino::group_norm");
  return op;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_of(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean_and_scale, bool relu) {
  static const auto op = operator_like(backward_of, "maskdino::group_norm_backward");
  return op.call(grad, x, weight, bias, mean_and_scale, relu);
}

at::Tensor resize_backward(const at::Tensor& grad, c10::SymInt height, c10::SymInt width) {
  static const auto op = operator_like(resize_backward, "maskdino::resize_backward");
  return op.call(grad, std::move(height), std::move(width));
}

struct GroupNorm : public torch::autograd::Function<GroupNorm> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x,
                               const at::Tensor& weight, const at::Tensor& bias, int64_t groups,
                               double eps, bool relu, const Optional& coarse,
                               at::ScalarType dtype) {
    const auto [normed, mean_and_scale] =
        below(forward_operator(), x, std::nullopt, weight, bias, groups, eps, relu, coarse, dtype);
    context->mark_non_differentiable({mean_and_scale});
    context->set_materialize_grads(false);  // else that of the constant would be made, of zeros
    context->save_for_backward({x, weight, bias, mean_and_scale});
    context->saved_data["relu"] = relu;
    if (coarse.has_value()) {
      context->saved_data["height"] = coarse->sym_size(2);
      context->saved_data["width"] = coarse->sym_size(3);
      context->saved_data["type"] = static_cast<int64_t>(coarse->scalar_type());
    }
    return {normed, mean_and_scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    at::Tensor of_coarse;
    if (data.count("type") && context->needs_input_grad(3)) {
      of_coarse = resize_backward(grads[0], data["height"].toSymInt(), data["width"].toSymInt())
                      .to(static_cast<at::ScalarType>(data["type"].toInt()));
    }
    const auto made =
        backward_of(grads[0], saved[0], saved[1], saved[2], saved[3], data["relu"].toBool());
    const at::Tensor none;
    return {
        std::get<0>(made), std::get<1>(made), std::get<2>(made), none, none, none, of_coarse, none};
  }
};

std::tuple<at::Tensor, at::Tensor> group_norm(const at::Tensor& x, const Optional& shift,
                                              const at::Tensor& weight, const at::Tensor& bias,
                                              int64_t groups, double eps, bool relu,
                                              const Optional& coarse, at::ScalarType dtype) {
  if (!compute_requires_grad(x, shift, weight, bias, coarse)) {
    return below(forward_operator(), x, shift, weight, bias, groups, eps, relu, coarse, dtype);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!shift.has_value(),
                              "group_norm has no gradient where there is a shift");
  const variable_list made = GroupNorm::apply(x, weight, bias, groups, eps, relu, coarse, dtype);
  return {made[0], made[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, Autograd, m) { m.impl("group_norm", &group_norm); }

}  // namespace maskdino
