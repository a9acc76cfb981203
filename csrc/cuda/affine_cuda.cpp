// What follows a convolution on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "../affine_checks.h"
#include "affine.cuh"
#include "dispatch.h"

namespace maskdino {
namespace cuda {
namespace {

// Of maps that all have the sizes and strides of the first, or are none.
Walk walk_of(std::initializer_list<at::Tensor> maps) {
  const at::Tensor& map = *maps.begin();
  bool aligned = true;
  for (const at::Tensor& other : maps) {
    aligned &= !other.defined() || reinterpret_cast<uintptr_t>(other.const_data_ptr()) % 16 == 0;
  }
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() >> 24;
  TORCH_CHECK_VALUE(map.numel() < kMost, "a map is too large: ", map.sizes());
  return walk_over(map.size(0), map.size(1), map.size(2) * map.size(3),
                   map.is_contiguous(at::MemoryFormat::ChannelsLast), map.is_contiguous(), aligned,
                   static_cast<int>(map.element_size()));
}

template <typename T>
const T* read_from(const at::Tensor& map) {
  return map.defined() ? map.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* write_to(const at::Tensor& map) {
  return map.defined() ? map.data_ptr<T>() : nullptr;
}

// Writes y, which has the layout of x and may be x.
void compute(const at::Tensor& x, const std::optional<at::Tensor>& scale, const at::Tensor& shift,
             const std::optional<at::Tensor>& residual, bool relu, const at::Tensor& y) {
  at::Tensor scales, added;
  if (scale.has_value()) scales = checked_channels(*scale, "scale", x, false);
  const at::Tensor shifts = checked_channels(shift, "shift", x, true);
  if (residual.has_value()) added = checked_like(*residual, "residual", x);
  if (x.numel() == 0) return;
  const Walk walk = walk_of({x, added, y});
  MASKDINO_DISPATCH(x.scalar_type(), [&] {
    Affine<scalar_t> in{};
    in.x = x.const_data_ptr<scalar_t>();
    in.scale = read_from<float>(scales);
    if (shifts.scalar_type() == at::kFloat) {
      in.shift = shifts.const_data_ptr<float>();
    } else {
      in.half_shift = shifts.const_data_ptr<scalar_t>();
    }
    in.residual = read_from<scalar_t>(added);
    in.y = y.data_ptr<scalar_t>();
    in.relu = relu;
    launch_affine(in, walk, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor affine(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                  const at::Tensor& shift, const std::optional<at::Tensor>& residual, bool relu) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  check_map(x);
  const at::Tensor dense = x.contiguous(layout_of(x));
  const at::Tensor y = at::empty_like(dense, dense.options(), layout_of(x));
  compute(dense, scale, shift, residual, relu, y);
  return y;
}

void affine_(at::Tensor x, const std::optional<at::Tensor>& scale, const at::Tensor& shift,
             const std::optional<at::Tensor>& residual, bool relu) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  check_map(x);
  check_dense(x);
  compute(x, scale, shift, residual, relu, x);
}

std::tuple<at::Tensor, at::Tensor> affine_backward(const at::Tensor& grad,
                                                   const std::optional<at::Tensor>& y,
                                                   const std::optional<at::Tensor>& scale,
                                                   bool with_x, bool with_residual) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(grad.device());
  check_map(grad);
  const at::MemoryFormat layout = layout_of(y.has_value() ? *y : grad);
  const at::Tensor dense = grad.contiguous(layout);
  at::Tensor made, scales, grad_x, grad_residual;
  if (y.has_value()) made = checked_like(*y, "output", dense);
  if (scale.has_value()) scales = checked_channels(*scale, "scale", grad, false);
  if (with_x) grad_x = at::empty_like(dense, dense.options(), layout);
  if (with_residual) grad_residual = at::empty_like(dense, dense.options(), layout);
  if (grad.numel() != 0) {
    const Walk walk = walk_of({dense, made, grad_x, grad_residual});
    MASKDINO_DISPATCH(grad.scalar_type(), [&] {
      AffineBackward<scalar_t> in{};
      in.grad = dense.const_data_ptr<scalar_t>();
      in.y = read_from<scalar_t>(made);
      in.scale = read_from<float>(scales);
      in.grad_x = write_to<scalar_t>(grad_x);
      in.grad_residual = write_to<scalar_t>(grad_residual);
      launch_affine_backward(in, walk, c10::cuda::getCurrentCUDAStream().stream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto given = [&](const at::Tensor& gradient) {
    return gradient.defined() ? gradient : at::empty({0}, grad.options());
  };
  return {given(grad_x), given(grad_residual)};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) {
  m.impl("affine", &affine);
  m.impl("affine_", &affine_);
  m.impl("affine_backward", &affine_backward);
}

}  // namespace cuda
}  // namespace maskdino
