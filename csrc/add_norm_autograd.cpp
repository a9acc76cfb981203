// Gradients of `add_norm_train`, which ends each part of a transformer's layers.
#include <numeric>
#include <vector>

#include "autograd.h"

namespace maskdino {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results add_norm_train(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                       const at::Tensor& bias, double eps, bool rounded, const Optional& position);

const auto& forward_operator() {
  static const auto op = operator_like(add_norm_train, "maskdino::add_norm_train");
  return op;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_of(
    const Optional& grad_normed, const Optional& grad_rounded, const Optional& grad_placed,
    const at::Tensor& sum, const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& weight,
    at::ScalarType dtype, bool weights) {
  static const auto op = operator_like(backward_of, "maskdino::add_norm_backward");
  return op.call(grad_normed, grad_rounded, grad_placed, sum, mean, rstd, weight, dtype, weights);
}

// Of a position (..., C) that lacks the first dimensions of what it was added to.
at::Tensor of_position(const at::Tensor& grad, int64_t dim, at::ScalarType type) {
  if (grad.dim() == dim) return grad.to(type);
  std::vector<int64_t> shared(grad.dim() - dim);
  std::iota(shared.begin(), shared.end(), 0);
  return grad.sum(shared, /*keepdim=*/false, at::kFloat).to(type);
}

struct AddNorm : public torch::autograd::Function<AddNorm> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x,
                               const at::Tensor& update, const at::Tensor& weight,
                               const at::Tensor& bias, double eps, bool rounded,
                               const Optional& position) {
    const auto [normed, in_half, placed, sum, mean, rstd] =
        below(forward_operator(), x, update, weight, bias, eps, rounded, position);
    variable_list constant{sum, mean, rstd};
    if (!rounded) constant.push_back(in_half);
    if (!position.has_value()) constant.push_back(placed);
    context->mark_non_differentiable(constant);
    context->set_materialize_grads(false);
    context->save_for_backward({sum, mean, rstd, weight});
    context->saved_data["type"] = static_cast<int64_t>(update.scalar_type());
    if (position.has_value()) {
      context->saved_data["position"] = position->dim();
      context->saved_data["position_type"] = static_cast<int64_t>(position->scalar_type());
    }
    return {normed, in_half, placed, sum, mean, rstd};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const auto type = static_cast<at::ScalarType>(context->saved_data["type"].toInt());
    const bool of_weight = context->needs_input_grad(2), of_bias = context->needs_input_grad(3);
    const auto made = backward_of(given(grads[0]), given(grads[1]), given(grads[2]), saved[0],
                                  saved[1], saved[2], saved[3], type, of_weight || of_bias);
    at::Tensor grad_position;
    const auto position = context->saved_data.find("position");
    if (position != context->saved_data.end() && grads[2].defined() &&
        context->needs_input_grad(4)) {
      const int64_t its_type = context->saved_data["position_type"].toInt();
      grad_position =
          of_position(grads[2], position->second.toInt(), static_cast<at::ScalarType>(its_type));
    }
    const at::Tensor none;
    return {std::get<0>(made),
            type == at::kFloat ? std::get<0>(made) : std::get<1>(made),
            of_weight ? std::get<2>(made) : none,
            of_bias ? std::get<3>(made) : none,
            none,
            none,
            grad_position};
  }
};

Results add_norm_train(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                       const at::Tensor& bias, double eps, bool rounded, const Optional& position) {
  const variable_list made = AddNorm::apply(x, update, weight, bias, eps, rounded, position);
  return {made[0], made[1], made[2], made[3], made[4], made[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, Autograd, m) { m.impl("add_norm_train", &add_norm_train); }

}  // namespace maskdino
