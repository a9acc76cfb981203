// LayerNorm of sums on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../add_norm.h"
#include "add_norm.cuh"
#include "dispatch.h"

namespace maskdino {
namespace cuda {
namespace {

// Whether rows fit registers, and packs may be read where tensors begin.
bool has_kernel(int64_t channels, std::initializer_list<at::Tensor> tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) continue;
    const auto place = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    if (place % (kNormVector * tensor.element_size()) != 0) return false;
  }
  return channels % kNormVector == 0 && channels <= kMostNormChannels;
}

template <typename T>
T* pointer(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.data_ptr<T>() : nullptr;
}

template <typename T>
AddNorm<T> arguments(const NormCall& call) {
  AddNorm<T> in{};
  in.x = call.x.const_data_ptr<float>();
  in.update = call.update.const_data_ptr<T>();
  in.weight = call.weight.const_data_ptr<float>();
  in.bias = call.bias.const_data_ptr<float>();
  in.rows = in.position_rows = call.rows();
  in.channels = static_cast<int>(call.channels());
  in.eps = static_cast<float>(call.eps);
  if (!call.position.defined()) return in;
  in.position_rows = call.position.numel() / call.channels();
  if (call.position.scalar_type() == at::kFloat) {
    in.position = call.position.const_data_ptr<float>();
  } else {
    in.half_position = call.position.const_data_ptr<T>();
  }
  return in;
}

NormOutputs outputs(const NormCall& call, bool with_rounded, bool learned) {
  if (!has_kernel(call.channels(), {call.x, call.update, call.weight, call.bias, call.position})) {
    return norm_by_torch(call, with_rounded);
  }
  const auto made = [&](bool wanted, const at::Tensor& like) {
    return wanted ? at::empty(call.x.sizes(), like.options()) : at::empty({0}, like.options());
  };
  const at::Tensor normed = made(true, call.x), rounded = made(with_rounded, call.update),
                   placed = made(call.position.defined(), call.update);
  at::Tensor sum, mean, rstd;
  if (learned) {
    std::vector<int64_t> of_row = call.x.sizes().vec();
    of_row.back() = 1;
    sum = made(true, call.x);
    mean = at::empty(of_row, call.x.options());
    rstd = at::empty_like(mean);
  }
  if (call.x.numel() == 0) return {normed, rounded, placed, sum, mean, rstd};
  MASKDINO_DISPATCH(call.update.scalar_type(), [&] {
    AddNorm<scalar_t> in = arguments<scalar_t>(call);
    in.normed = pointer<float>(normed);
    in.rounded = pointer<scalar_t>(rounded);
    in.placed = pointer<scalar_t>(placed);
    in.sum = pointer<float>(sum);
    in.mean = pointer<float>(mean);
    in.rstd = pointer<float>(rstd);
    launch_add_norm(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {normed, rounded, placed, sum, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_norm(
    const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, const at::Tensor& bias,
    double eps, bool with_rounded, const std::optional<at::Tensor>& position) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  const NormOutputs made =
      outputs(check_add_norm(x, update, weight, bias, eps, position), with_rounded, false);
  return {std::get<0>(made), std::get<1>(made), std::get<2>(made)};
}

NormOutputs add_norm_train(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                           const at::Tensor& bias, double eps, bool with_rounded,
                           const std::optional<at::Tensor>& position) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  return outputs(check_add_norm(x, update, weight, bias, eps, position), with_rounded, true);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward(
    const std::optional<at::Tensor>& grad_normed, const std::optional<at::Tensor>& grad_rounded,
    const std::optional<at::Tensor>& grad_placed, const at::Tensor& sum, const at::Tensor& mean,
    const at::Tensor& rstd, const at::Tensor& weight, at::ScalarType dtype, bool weights) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(sum.device());
  const NormGradCall call = check_add_norm_backward(grad_normed, grad_rounded, grad_placed, sum,
                                                    mean, rstd, weight, dtype, weights);
  const int64_t channels = call.channels(), rows = call.rows();
  if (call.sum.numel() == 0 ||
      !has_kernel(channels, {call.normed, call.rounded, call.placed, call.sum, call.weight})) {
    return norm_backward_by_torch(call);
  }
  const int64_t blocks =
      std::min((rows + kNormBackwardWarps - 1) / kNormBackwardWarps, kMostNormBackwardBlocks);
  const at::TensorOptions full = call.sum.options();
  const at::Tensor grad_sum = at::empty(sum.sizes(), full);
  const at::Tensor grad_update =
      dtype == at::kFloat ? at::empty({0}, full) : at::empty(sum.sizes(), full.dtype(dtype));
  const std::vector<int64_t> wanted{weights ? channels : 0};
  const at::Tensor grad_weight = at::empty(wanted, full), grad_bias = at::empty(wanted, full),
                   partial = at::empty({blocks, 2, wanted[0]}, full);
  MASKDINO_DISPATCH(dtype, [&] {
    AddNormBackward<scalar_t> in{};
    in.grad_normed = pointer<float>(call.normed);
    in.grad_rounded = pointer<scalar_t>(call.rounded);
    in.grad_placed = pointer<scalar_t>(call.placed);
    in.sum = pointer<float>(call.sum);
    in.mean = pointer<float>(call.mean);
    in.rstd = pointer<float>(call.rstd);
    in.weight = pointer<float>(call.weight);
    in.grad_sum = pointer<float>(grad_sum);
    in.grad_update = dtype == at::kFloat ? nullptr : pointer<scalar_t>(grad_update);
    in.partial = pointer<float>(partial);
    in.grad_weight = pointer<float>(grad_weight);
    in.grad_bias = pointer<float>(grad_bias);
    in.rows = rows;
    in.channels = static_cast<int>(channels);
    in.blocks = static_cast<int>(blocks);
    launch_add_norm_backward(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_sum, grad_update, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) {
  m.impl("add_norm", &add_norm);
  m.impl("add_norm_train", &add_norm_train);
  m.impl("add_norm_backward", &add_norm_backward);
}

}  // namespace cuda
}  // namespace maskdino
