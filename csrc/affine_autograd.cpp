// Gradients of `affine`, which follows each convolution of a backbone.
#include "autograd.h"

namespace maskdino {
namespace {

at::Tensor affine(const at::Tensor& x, const Optional& scale, const at::Tensor& shift,
                  const Optional& residual, bool relu);

const auto& forward_operator() {
  static const auto op = operator_like(affine, "maskdino::affine");
  return op;
}

std::tuple<at::Tensor, at::Tensor> backward_of(const at::Tensor& grad, const Optional& output,
                                               const Optional& scale, bool with_x,
                                               bool with_residual) {
  static const auto op = operator_like(backward_of, "maskdino::affine_backward");
  return op.call(grad, output, scale, with_x, with_residual);
}

struct Affine : public torch::autograd::Function<Affine> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Optional& scale,
                            const at::Tensor& shift, const Optional& residual, bool relu) {
    const at::Tensor y = below(forward_operator(), x, scale, shift, residual, relu);
    // Not y itself: see autograd.h. Detached out here it has the version of y, by which autograd
    // notices that somebody changed y in place.
    context->save_for_backward({relu ? y.detach() : at::Tensor(), scale.value_or(at::Tensor())});
    context->saved_data["residual"] = residual.has_value();
    return y;
  }

  // Scale and shift are frozen. What equals another gradient is that gradient.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Optional output = given(saved[0]), scale = given(saved[1]);
    const bool of_x = context->needs_input_grad(0);
    // Edges are those of the tensors that were given: x, perhaps scale, shift, residual.
    const bool of_residual = context->saved_data["residual"].toBool() &&
                             context->needs_input_grad(scale.has_value() ? 3 : 2);
    const bool own = of_x && scale.has_value();  // else that of x is that of the residual
    const bool masked = output.has_value() && (of_residual || (of_x && !own));
    at::Tensor grad_x = grads[0], grad_residual = grads[0];
    if (own || masked) {
      const auto made = backward_of(grads[0], output, scale, own, masked);
      if (masked) grad_residual = std::get<1>(made);
      grad_x = own ? std::get<0>(made) : grad_residual;
    }
    return {of_x ? grad_x : at::Tensor(), at::Tensor(), at::Tensor(),
            of_residual ? grad_residual : at::Tensor(), at::Tensor()};
  }
};

at::Tensor affine(const at::Tensor& x, const Optional& scale, const at::Tensor& shift,
                  const Optional& residual, bool relu) {
  return Affine::apply(x, scale, shift, residual, relu);
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, Autograd, m) { m.impl("affine", &affine); }

}  // namespace maskdino
