// Gradients of `affine`, in C++: it follows each convolution of a backbone, and steps of training
// are bound by what the host does.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace maskdino {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

at::Tensor forward_of(const at::Tensor& x, const Optional& scale, const at::Tensor& shift,
                      const Optional& residual, bool relu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("maskdino::affine", "")
                             .typed<at::Tensor(const at::Tensor&, const Optional&,
                                               const at::Tensor&, const Optional&, bool)>();
  return op.call(x, scale, shift, residual, relu);
}

std::tuple<at::Tensor, at::Tensor> backward_of(const at::Tensor& grad, const Optional& output,
                                               const Optional& scale, bool with_x,
                                               bool with_residual) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("maskdino::affine_backward", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const Optional&,
                                                    const Optional&, bool, bool)>();
  return op.call(grad, output, scale, with_x, with_residual);
}

Optional given(const at::Tensor& tensor) {
  return tensor.defined() ? Optional(tensor) : Optional();
}

struct Affine : public torch::autograd::Function<Affine> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Optional& scale,
                            const at::Tensor& shift, const Optional& residual, bool relu) {
    at::Tensor y;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      y = forward_of(x, scale, shift, residual, relu);
    }
    // Not y itself: where what is kept is computed again, as far as it is needed, y holds this
    // function, which would hold y, and neither would ever be freed. Detached out here it has the
    // version of y, by which autograd notices that somebody changed y in place.
    context->save_for_backward(
        {relu ? y.detach() : at::Tensor(), scale.has_value() ? *scale : at::Tensor()});
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
