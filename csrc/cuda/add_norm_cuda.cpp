// LayerNorm of sums on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>

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

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_norm(
    const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, const at::Tensor& bias,
    double eps, bool with_rounded, const std::optional<at::Tensor>& position) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  const NormCall call = check_add_norm(x, update, weight, bias, eps, position);
  if (!has_kernel(call.channels(), {call.x, call.update, call.weight, call.bias, call.position})) {
    const at::Tensor normed =
        at::layer_norm(call.x + call.update, {call.channels()}, call.weight, call.bias, eps);
    return normed_outputs(call, normed, with_rounded);
  }
  const at::Tensor normed = at::empty(x.sizes(), call.x.options());
  const auto made = [&](bool wanted) {
    return wanted ? at::empty(x.sizes(), call.update.options())
                  : at::empty({0}, call.update.options());
  };
  const at::Tensor rounded = made(with_rounded), placed = made(call.position.defined());
  if (x.numel() == 0) return {normed, rounded, placed};
  MASKDINO_DISPATCH(update.scalar_type(), [&] {
    AddNorm<scalar_t> in = arguments<scalar_t>(call);
    in.normed = pointer<float>(normed);
    in.rounded = pointer<scalar_t>(rounded);
    in.placed = pointer<scalar_t>(placed);
    launch_add_norm(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {normed, rounded, placed};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) { m.impl("add_norm", &add_norm); }

}  // namespace cuda
}  // namespace maskdino
