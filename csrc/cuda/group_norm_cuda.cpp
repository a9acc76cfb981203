// Group norm of maps on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "group_norm.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int64_t kBlocksWanted = 1056;  // eight for each of 132 processors
constexpr int64_t kSliceBytes = 128;     // of a pixel, at least: a line of the cache
constexpr int64_t kMostPixels = 1 << 30;
constexpr int64_t kMostBlocks = std::numeric_limits<int>::max();

int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_row(const at::Tensor& row, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(row.scalar_type() == at::kFloat, name, " must be float32, got ",
                   row.scalar_type());
  TORCH_CHECK_VALUE(row.dim() == 1 && row.size(0) == x.size(1) && row.device() == x.device(), name,
                    " must have shape [", x.size(1), "] on ", x.device(), ", got ", row.sizes(),
                    " on ", row.device());
}

void check_maps(const at::Tensor& x, int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (N, C, H, W), got shape ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf ||
                       x.scalar_type() == at::kBFloat16,
                   "x must be float32, float16 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(groups > 0 && x.size(1) % groups == 0, "cannot make ", groups, " groups of ",
                    x.size(1), " channels");
  // Sides of tensors without elements may have any length.
  TORCH_CHECK_VALUE(
      x.numel() == 0 || (x.size(2) * x.size(3) <= kMostPixels && x.size(1) <= kMostPixels),
      "x is too large: ", x.sizes());
}

// Whether kernels read a map pixel by pixel: channels last, and groups no wider than a block.
bool has_rows(const at::Tensor& x, int64_t groups) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.size(1) / groups <= kGroupThreads;
}

// The map as kernels read it.
at::Tensor dense(const at::Tensor& x, int64_t groups) {
  return has_rows(x, groups) ? x : x.contiguous();
}

// `aligned`: all maps that are read or written in vectors begin at 16 bytes.
Cut cut_of(const at::Tensor& x, int64_t groups, bool aligned) {
  Cut cut{};
  const int64_t pixels = x.size(2) * x.size(3), width = x.size(1) / groups;
  const int64_t bytes = x.element_size(), full = 16 / bytes;
  cut.images = x.size(0);
  cut.pixels = static_cast<int>(pixels);
  cut.channels = static_cast<int>(x.size(1));
  cut.groups = static_cast<int>(groups);
  cut.rows = has_rows(x, groups);
  const int64_t vector = aligned && (cut.rows ? width : pixels) % full == 0 ? full : 1;
  cut.vector = static_cast<int>(vector);
  int64_t parts = 1, run = pixels;
  if (cut.rows) {
    const int64_t most = kGroupThreads / (width / vector);  // groups that threads are enough for
    const int64_t slice = std::min({ratio_up(kSliceBytes, width * bytes), most, groups});
    cut.slice_groups = static_cast<int>(slice);
    cut.slices = static_cast<int>(ratio_up(groups, slice));
    const int64_t lines = kGroupThreads / (slice * width / vector);
    parts = std::min(ratio_up(kBlocksWanted, cut.images * cut.slices), ratio_up(pixels, 2 * lines));
    run = ratio_up(pixels, parts);
  } else {
    parts = std::min(ratio_up(kBlocksWanted, cut.images * cut.channels),
                     ratio_up(pixels, 2 * kGroupThreads * vector));
    run = ratio_up(ratio_up(pixels, parts), vector) * vector;
  }
  cut.part_pixels = static_cast<int>(run);
  cut.parts = static_cast<int>(ratio_up(pixels, run));
  TORCH_CHECK_VALUE(cut.blocks() <= kMostBlocks, "x is too large: ", x.sizes());
  return cut;
}

// float32, laid out as x; images may be further apart, as those of tokens of all levels are.
at::Tensor coarse_map(const at::Tensor& coarse, const at::Tensor& x, bool rows) {
  TORCH_CHECK_VALUE(coarse.dim() == 4 && coarse.size(0) == x.size(0) &&
                        coarse.size(1) == x.size(1) && coarse.device() == x.device() &&
                        coarse.size(2) > 0 && coarse.size(3) > 0,
                    "cannot resize ", coarse.sizes(), " to ", x.sizes());
  const at::Tensor full = coarse.to(at::kFloat);
  const int64_t channels = full.size(1), width = full.size(3);
  const bool is_rows =
      full.stride(1) == 1 && full.stride(3) == channels && full.stride(2) == width * channels;
  if (rows) return is_rows ? full : full.contiguous(at::MemoryFormat::ChannelsLast);
  return full.contiguous();
}

template <typename T>
void set_shift(GroupInput<T>& in, const std::optional<at::Tensor>& shift) {
  if (!shift.has_value()) return;
  if (shift->scalar_type() == at::kFloat) {
    in.shift = shift->const_data_ptr<float>();
  } else {
    in.half_shift = shift->const_data_ptr<T>();
  }
}

std::optional<at::Tensor> checked_shift(const std::optional<at::Tensor>& shift,
                                        const at::Tensor& x) {
  if (!shift.has_value()) return std::nullopt;
  TORCH_CHECK_TYPE(shift->scalar_type() == at::kFloat || shift->scalar_type() == x.scalar_type(),
                   "shift must be float32 or as x, got ", shift->scalar_type());
  TORCH_CHECK_VALUE(
      shift->dim() == 1 && shift->size(0) == x.size(1) && shift->device() == x.device(),
      "shift must have shape [", x.size(1), "], got ", shift->sizes());
  return shift->contiguous();
}

template <typename T, typename U>
void norm(const GroupInput<T>& in, GroupOutput<U> out, const at::Tensor& normed) {
  out.normed = normed.data_ptr<U>();
  launch_group_norm(in, out, c10::cuda::getCurrentCUDAStream().stream());
}

std::tuple<at::Tensor, at::Tensor> group_norm(const at::Tensor& x,
                                              const std::optional<at::Tensor>& shift,
                                              const at::Tensor& weight, const at::Tensor& bias,
                                              int64_t groups, double eps, bool relu,
                                              const std::optional<at::Tensor>& coarse,
                                              at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  check_maps(x, groups);
  check_row(weight, "weight", x);
  check_row(bias, "bias", x);
  const auto added = checked_shift(shift, x);
  TORCH_CHECK_VALUE(!(relu && coarse.has_value()), "a coarse map is added, or ReLU follows");
  const at::Tensor map = dense(x, groups), scales = weight.contiguous(), shifts = bias.contiguous();
  const bool rows = has_rows(map, groups);
  const at::Tensor resized =
      coarse.has_value() ? coarse_map(*coarse, map, rows) : at::empty({0}, scales.options());
  // Kernels write x's type or float32.
  const at::ScalarType written = dtype == map.scalar_type() ? dtype : at::kFloat;
  const at::Tensor normed =
      at::empty(map.sizes(), map.options().dtype(written),
                rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor kept = at::empty({map.size(0), groups, 2}, scales.options());
  if (map.numel() == 0) return {normed.to(dtype), kept.zero_()};
  const bool aligned =
      is_aligned(map.const_data_ptr()) && is_aligned(normed.const_data_ptr()) &&
      (!coarse.has_value() || (is_aligned(resized.const_data_ptr()) && resized.stride(0) % 4 == 0));
  const Cut cut = cut_of(map, groups, aligned);
  const at::Tensor moments =
      at::empty({cut.images * groups * cut.group_parts(), 4}, scales.options());
  MASKDINO_DISPATCH(map.scalar_type(), [&] {
    GroupInput<scalar_t> in{};
    in.x = map.const_data_ptr<scalar_t>();
    set_shift(in, added);
    in.weight = scales.const_data_ptr<float>();
    in.bias = shifts.const_data_ptr<float>();
    in.moments = reinterpret_cast<Moments*>(moments.data_ptr<float>());
    in.mean_and_scale = kept.data_ptr<float>();
    in.eps = static_cast<float>(eps);
    in.cut = cut;
    launch_group_moments(in, c10::cuda::getCurrentCUDAStream().stream());
    const auto write = [&](auto out) {
      out.relu = relu;
      out.height = static_cast<int>(map.size(2));
      out.width = static_cast<int>(map.size(3));
      if (coarse.has_value()) {
        out.coarse = resized.const_data_ptr<float>();
        out.coarse_step = resized.stride(0);
        out.coarse_height = static_cast<int>(resized.size(2));
        out.coarse_width = static_cast<int>(resized.size(3));
        out.scale_y = static_cast<float>(out.coarse_height) / static_cast<float>(out.height);
        out.scale_x = static_cast<float>(out.coarse_width) / static_cast<float>(out.width);
      }
      norm(in, out, normed);
    };
    if (written == at::kFloat) {
      write(GroupOutput<float>{});
    } else {
      write(GroupOutput<scalar_t>{});
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {normed.to(dtype), kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean_and_scale, bool relu) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  TORCH_CHECK_VALUE(mean_and_scale.dim() == 3 && mean_and_scale.size(2) == 2 &&
                        mean_and_scale.size(0) == x.size(0) &&
                        mean_and_scale.scalar_type() == at::kFloat &&
                        mean_and_scale.device() == x.device(),
                    "mean_and_scale must be (N, G, 2), got shape ", mean_and_scale.sizes());
  const int64_t groups = mean_and_scale.size(1);
  check_maps(x, groups);
  check_row(weight, "weight", x);
  check_row(bias, "bias", x);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.device() == x.device(), "grad must be as x, ",
                    x.sizes(), ", got ", grad.sizes());
  const at::Tensor map = dense(x, groups), scales = weight.contiguous(), shifts = bias.contiguous(),
                   kept = mean_and_scale.contiguous();
  const bool rows = has_rows(map, groups);
  const auto layout = rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  // Kernels read x's type or float32.
  const bool same = grad.scalar_type() == map.scalar_type();
  const at::Tensor grads = (same ? grad : grad.to(at::kFloat)).contiguous(layout);
  const at::Tensor of_x = at::empty(map.sizes(), map.options(), layout);
  const at::Tensor of_weight = at::zeros_like(scales), of_bias = at::zeros_like(shifts);
  if (map.numel() == 0) return {of_x, of_weight, of_bias};
  const bool aligned = is_aligned(map.const_data_ptr()) && is_aligned(of_x.const_data_ptr()) &&
                       is_aligned(grads.const_data_ptr());
  const Cut cut = cut_of(map, groups, aligned);
  const at::Tensor parts = at::empty({cut.images, cut.channels, cut.parts, 2}, scales.options());
  const at::Tensor sums = at::empty({cut.images, cut.channels, 2}, scales.options());
  MASKDINO_DISPATCH(map.scalar_type(), [&] {
    const auto run = [&](auto gradient, auto* source) {
      gradient.grad = source;
      gradient.in.x = map.const_data_ptr<scalar_t>();
      gradient.in.weight = scales.const_data_ptr<float>();
      gradient.in.bias = shifts.const_data_ptr<float>();
      gradient.in.mean_and_scale = const_cast<float*>(kept.const_data_ptr<float>());
      gradient.in.cut = cut;
      gradient.relu = relu;
      gradient.parts = parts.data_ptr<float>();
      gradient.sums = sums.data_ptr<float>();
      gradient.x = of_x.data_ptr<scalar_t>();
      gradient.weight = of_weight.data_ptr<float>();
      gradient.bias = of_bias.data_ptr<float>();
      launch_group_norm_backward(gradient, c10::cuda::getCurrentCUDAStream().stream());
    };
    if (same) {
      run(GroupGradient<scalar_t, scalar_t>{}, grads.const_data_ptr<scalar_t>());
    } else {
      run(GroupGradient<scalar_t, float>{}, grads.const_data_ptr<float>());
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {of_x, of_weight, of_bias};
}

at::Tensor resize_backward(const at::Tensor& grad, int64_t height, int64_t width) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(grad.device());
  check_maps(grad, 1);
  TORCH_CHECK_VALUE(height > 0 && width > 0 && height < kMostPixels && width < kMostPixels,
                    "cannot resize ", height, " x ", width);
  const bool rows = grad.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor grads = rows ? grad : grad.contiguous();
  const int64_t channels = grad.size(1);
  const at::Tensor coarse =
      at::empty({grad.size(0), channels, height, width}, grad.options().dtype(at::kFloat),
                rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (grad.numel() == 0) return coarse.zero_();
  TORCH_CHECK_VALUE(coarse.numel() <= kMostBlocks, "cannot resize to ", coarse.sizes());
  MASKDINO_DISPATCH(grads.scalar_type(), [&] {
    constexpr int64_t kMany = 16 / sizeof(scalar_t);
    ResizeGradient<scalar_t> in{};
    in.grad = grads.const_data_ptr<scalar_t>();
    in.coarse = coarse.data_ptr<float>();
    in.images = rows ? grad.size(0) : grad.size(0) * channels;
    in.channels = static_cast<int>(rows ? channels : 1);
    in.vector = static_cast<int>(in.channels % kMany == 0 && is_aligned(in.grad) ? kMany : 1);
    in.height = static_cast<int>(grad.size(2));
    in.width = static_cast<int>(grad.size(3));
    in.coarse_height = static_cast<int>(height);
    in.coarse_width = static_cast<int>(width);
    in.scale_y = static_cast<float>(height) / static_cast<float>(in.height);
    in.scale_x = static_cast<float>(width) / static_cast<float>(in.width);
    launch_resize_backward(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return coarse;
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) {
  m.impl("group_norm", &group_norm);
  m.impl("group_norm_backward", &group_norm_backward);
  m.impl("resize_backward", &resize_backward);
}

}  // namespace cuda
}  // namespace maskdino
