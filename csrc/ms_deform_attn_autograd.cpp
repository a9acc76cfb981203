// Gradients of both forms of deformable attention, which keep their inputs alone.
#include "autograd.h"

namespace maskdino {
namespace {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor ms_deform_attn(const at::Tensor& value, c10::SymIntArrayRef shapes,
                          const at::Tensor& locations, const at::Tensor& weights);
at::Tensor ms_deform_attn_fused(const at::Tensor& value, c10::SymIntArrayRef shapes,
                                const at::Tensor& offsets_and_logits, const Optional& reference,
                                int64_t num_points);

const auto& textbook_operator() {
  static const auto op = operator_like(ms_deform_attn, "maskdino::ms_deform_attn");
  return op;
}

const auto& fused_operator() {
  static const auto op = operator_like(ms_deform_attn_fused, "maskdino::ms_deform_attn_fused");
  return op;
}

Three textbook_backward(const at::Tensor& grad, const at::Tensor& value, c10::SymIntArrayRef shapes,
                        const at::Tensor& locations, const at::Tensor& weights) {
  static const auto op = operator_like(textbook_backward, "maskdino::ms_deform_attn_backward");
  return op.call(grad, value, shapes, locations, weights);
}

Three fused_backward(const at::Tensor& grad, const at::Tensor& value, c10::SymIntArrayRef shapes,
                     const at::Tensor& offsets_and_logits, const Optional& reference,
                     int64_t num_points, bool reference_gradient) {
  static const auto op = operator_like(fused_backward, "maskdino::ms_deform_attn_fused_backward");
  return op.call(grad, value, shapes, offsets_and_logits, reference, num_points,
                 reference_gradient);
}

struct Textbook : public torch::autograd::Function<Textbook> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            c10::SymIntArrayRef shapes, const at::Tensor& locations,
                            const at::Tensor& weights) {
    context->save_for_backward({value, locations, weights});
    context->saved_data["shapes"] = shapes;
    return below(textbook_operator(), value, shapes, locations, weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const auto shapes = context->saved_data["shapes"].toSymIntVector();
    const auto [of_value, of_locations, of_weights] =
        textbook_backward(grads[0], saved[0], shapes, saved[1], saved[2]);
    return {of_value, at::Tensor(), of_locations, of_weights};
  }
};

struct Fused : public torch::autograd::Function<Fused> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            c10::SymIntArrayRef shapes, const at::Tensor& offsets_and_logits,
                            const Optional& reference, int64_t num_points) {
    context->save_for_backward({value, offsets_and_logits, reference.value_or(at::Tensor())});
    context->saved_data["shapes"] = shapes;
    context->saved_data["points"] = num_points;
    return below(fused_operator(), value, shapes, offsets_and_logits, reference, num_points);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const auto shapes = context->saved_data["shapes"].toSymIntVector();
    const bool wanted = saved[2].defined() && context->needs_input_grad(2);
    const auto [of_value, of_offsets, of_reference] =
        fused_backward(grads[0], saved[0], shapes, saved[1], given(saved[2]),
                       context->saved_data["points"].toInt(), wanted);
    return {of_value, at::Tensor(), of_offsets, wanted ? of_reference : at::Tensor(), at::Tensor()};
  }
};

at::Tensor ms_deform_attn(const at::Tensor& value, c10::SymIntArrayRef shapes,
                          const at::Tensor& locations, const at::Tensor& weights) {
  return Textbook::apply(value, shapes, locations, weights);
}

at::Tensor ms_deform_attn_fused(const at::Tensor& value, c10::SymIntArrayRef shapes,
                                const at::Tensor& offsets_and_logits, const Optional& reference,
                                int64_t num_points) {
  return Fused::apply(value, shapes, offsets_and_logits, reference, num_points);
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, Autograd, m) {
  m.impl("ms_deform_attn", &ms_deform_attn);
  m.impl("ms_deform_attn_fused", &ms_deform_attn_fused);
}

}  // namespace maskdino
