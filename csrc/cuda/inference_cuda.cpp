// Steps of inference on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "inference.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int64_t kMost = std::numeric_limits<int>::max();  // blocks of a launch, channels

#define MASKDINO_DISPATCH(type, ...)                                             \
  AT_DISPATCH_SWITCH(type, "maskdino",                                           \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

// Dense float32 of a shape, on the device of the others.
at::Tensor full(const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "expected float32, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.device() == other.device(), "expected shape ",
                    shape, " on ", other.device(), ", got ", tensor.sizes(), " on ",
                    tensor.device());
  return tensor.contiguous();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_norm(
    const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, const at::Tensor& bias,
    double eps, bool with_rounded, const std::optional<at::Tensor>& position) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(x.device());
  const int64_t channels = x.size(-1), rows = channels == 0 ? 0 : x.numel() / channels;
  const at::Tensor dense = full(x, x.sizes(), x), scales = full(weight, {channels}, x),
                   shifts = full(bias, {channels}, x), added = update.contiguous();
  TORCH_CHECK_VALUE(added.sizes() == x.sizes() && added.device() == x.device() && rows <= kMost &&
                        channels <= kMost,
                    "cannot add ", added.sizes(), " to ", x.sizes());
  at::Tensor places;
  if (position.has_value()) {
    places = position->contiguous();
    TORCH_CHECK_VALUE(places.device() == x.device() && places.dim() > 0 &&
                          places.dim() <= x.dim() &&
                          places.sizes() == x.sizes().slice(x.dim() - places.dim()),
                      "cannot add positions ", places.sizes(), " to ", x.sizes());
    TORCH_CHECK_TYPE(
        places.scalar_type() == at::kFloat || places.scalar_type() == added.scalar_type(),
        "positions must be float32 or as the update, got ", places.scalar_type());
  }
  const at::Tensor normed = at::empty(x.sizes(), dense.options());
  const auto made = [&](bool wanted) {
    return wanted ? at::empty(x.sizes(), added.options()) : at::empty({0}, added.options());
  };
  const at::Tensor rounded = made(with_rounded), placed = made(places.defined());
  if (x.numel() == 0) return {normed, rounded, placed};
  MASKDINO_DISPATCH(added.scalar_type(), [&] {
    AddNorm<scalar_t> in{};
    in.x = dense.const_data_ptr<float>();
    in.update = added.const_data_ptr<scalar_t>();
    in.weight = scales.const_data_ptr<float>();
    in.bias = shifts.const_data_ptr<float>();
    in.position_rows = places.defined() ? places.numel() / channels : rows;
    if (places.defined() && places.scalar_type() == at::kFloat) {
      in.position = places.const_data_ptr<float>();
    } else if (places.defined()) {
      in.half_position = places.const_data_ptr<scalar_t>();
    }
    in.normed = normed.data_ptr<float>();
    in.rounded = with_rounded ? rounded.data_ptr<scalar_t>() : nullptr;
    in.placed = places.defined() ? placed.data_ptr<scalar_t>() : nullptr;
    in.rows = rows;
    in.channels = static_cast<int>(channels);
    in.eps = static_cast<float>(eps);
    launch_add_norm(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {normed, rounded, placed};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> refine_boxes(const at::Tensor& deltas,
                                                            const at::Tensor& anchor_logits,
                                                            const at::Tensor& rates,
                                                            const at::Tensor& phases, double most,
                                                            at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(deltas.device());
  const int64_t rows = deltas.numel() / 4, channels = rates.numel();
  TORCH_CHECK_VALUE(
      deltas.dim() > 0 && deltas.size(-1) == 4 && rows <= kMost && channels <= kMost / 4,
      "expected (..., 4) deltas, got ", deltas.sizes());
  const at::Tensor changes = full(deltas, deltas.sizes(), deltas),
                   anchors = full(anchor_logits, deltas.sizes(), deltas),
                   speeds = full(rates, {channels}, deltas),
                   starts = full(phases, {channels}, deltas);
  const at::Tensor boxes = at::empty(deltas.sizes(), changes.options());
  const at::Tensor logits = at::empty(deltas.sizes(), changes.options());
  std::vector<int64_t> shape = deltas.sizes().vec();
  shape.back() = 4 * channels;
  const at::Tensor sines = at::empty(shape, changes.options().dtype(dtype));
  if (rows == 0 || channels == 0) return {boxes, logits, sines};
  MASKDINO_DISPATCH(dtype, [&] {
    RefineBoxes<scalar_t> in{};
    in.deltas = changes.const_data_ptr<float>();
    in.anchor_logits = anchors.const_data_ptr<float>();
    in.rates = speeds.const_data_ptr<float>();
    in.phases = starts.const_data_ptr<float>();
    in.boxes = boxes.data_ptr<float>();
    in.logits = logits.data_ptr<float>();
    in.sines = sines.data_ptr<scalar_t>();
    in.rows = rows;
    in.channels = static_cast<int>(channels);
    in.most = static_cast<float>(most);
    launch_refine_boxes(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {boxes, logits, sines};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) {
  m.impl("add_norm", &add_norm);
  m.impl("refine_boxes", &refine_boxes);
}

}  // namespace cuda
}  // namespace maskdino
