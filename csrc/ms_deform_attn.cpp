// The operators' names and signatures. spatial_shapes is [H0, W0, H1, W1, ...] on the host, so that
// nothing waits for the device. csrc/README.md describes the tensors; gradients are in the files
// *_autograd.cpp; maskdino/ops/_library.py adds shape inference.
#include <torch/library.h>

#include <string>

// The GPUs that the library holds code for, such as sm_90,compute_90: what setup.py asked nvcc for.
#ifndef MASKDINO_CUDA_ARCHITECTURES
#define MASKDINO_CUDA_ARCHITECTURES
#endif
#define MASKDINO_TEXT(...) #__VA_ARGS__
#define MASKDINO_EXPANDED_TEXT(...) MASKDINO_TEXT(__VA_ARGS__)

TORCH_LIBRARY(maskdino, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  // Gradients of value, sampling_locations and attention_weights.
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor offsets_and_logits, "
      "Tensor? reference, int num_points) -> Tensor");
  // Gradients of value, offsets_and_logits and reference; the last is empty unless asked for.
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor offsets_and_logits, Tensor? reference, int num_points, bool reference_gradient) "
      "-> (Tensor, Tensor, Tensor)");
  // Bilinear samples of masks (N, H, (W + 7) / 8) with eight pixels in a byte: for each row of
  // points (M or 1, P, 2) the mask that index (M,) names.
  m.def("sample_packed_masks(Tensor bits, int width, Tensor index, Tensor points) -> Tensor");
  // Steps of inference, without gradient. LayerNorm of x + update (..., C), in the update's type
  // too if asked for, and in that type with a position added, whose shape ends that of x.
  m.def(
      "add_norm(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps, bool rounded, "
      "Tensor? position) -> (Tensor, Tensor, Tensor)");
  // The same with gradient, and what that needs: the sum, its mean and 1 / standard deviation.
  m.def(
      "add_norm_train(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps, "
      "bool rounded, Tensor? position) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Gradients of the sum; in the update's type, dtype, unless that is float32; and of weight and
  // bias if asked for.
  m.def(
      "add_norm_backward(Tensor? grad_normed, Tensor? grad_rounded, Tensor? grad_placed, "
      "Tensor sum, Tensor mean, Tensor rstd, Tensor weight, ScalarType dtype, bool weights) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // The sigmoid (..., 4) of what a linear layer, weight (4, D) and bias (4), makes of hidden (...,
  // D), plus anchor_logits; these logits, no further from 0 than `most`; and the sine embedding
  // (..., 4 C) of y, x, w, h by rates and phases (C,).
  m.def(
      "predict_boxes(Tensor hidden, Tensor weight, Tensor bias, Tensor anchor_logits, Tensor "
      "rates, "
      "Tensor phases, float most, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  // relu(x * scale + shift + residual) of a map (B, C, H, W), scale and shift (C,): what follows a
  // convolution; and in place, without gradient.
  m.def("affine(Tensor x, Tensor? scale, Tensor shift, Tensor? residual, bool relu) -> Tensor");
  m.def("affine_(Tensor(a!) x, Tensor? scale, Tensor shift, Tensor? residual, bool relu) -> ()");
  // Gradients of x and residual, each empty unless asked for; without ReLU there is no output.
  m.def(
      "affine_backward(Tensor grad, Tensor? output, Tensor? scale, bool x_gradient, "
      "bool residual_gradient) -> (Tensor, Tensor)");
  // Group norm of x + shift (N, C, H, W), then ReLU, or the sum with a coarse map (N, C, h, w) that
  // is resized bilinearly: in the type `dtype`, laid out as x; and the mean and 1 / sqrt(variance +
  // eps) of each group (N, G, 2).
  m.def(
      "group_norm(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, "
      "bool relu, Tensor? coarse, ScalarType dtype) -> (Tensor, Tensor)");
  // Gradients of x, weight and bias where there is no shift; and of a coarse map (N, C, height,
  // width) by that of the resized one.
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor "
      "mean_and_scale, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("resize_backward(Tensor grad, SymInt height, SymInt width) -> Tensor");
  // Mask logits (R, h, w), resized to the canvas, cut to the image, and resized to the output;
  // sizes are (height, width). Binary: where they are above 0, and if asked for, the mean
  // probability (R,) there.
  m.def(
      "resized_masks(Tensor maps, SymInt[] canvas, SymInt[] image, SymInt[] output, bool binary, "
      "bool quality) -> (Tensor, Tensor)");
  // The same where they are above 0, as bits (R, (H W + 7) / 8) column by column, the first of
  // eight pixels lowest. A GPU alone has it.
  m.def(
      "resized_packed_masks(Tensor maps, SymInt[] canvas, SymInt[] image, SymInt[] output, "
      "bool quality) -> (Tensor, Tensor)");
  // Which kernels run on the CPU: "AVX-512", "AVX2" or "plain".
  m.def("cpu_instruction_set() -> str");
  // Empty where no CUDA part was built or nobody knows.
  m.def("cuda_architectures() -> str",
        [] { return std::string(MASKDINO_EXPANDED_TEXT(MASKDINO_CUDA_ARCHITECTURES)); });
}
