// Steps of inference on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "inference.cuh"

namespace maskdino {
namespace cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> predict_boxes(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& anchor_logits, const at::Tensor& rates, const at::Tensor& phases, double most,
    at::ScalarType dtype) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();  // blocks of a launch, channels
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(anchor_logits.device());
  const int64_t rows = anchor_logits.numel() / 4, channels = rates.numel();
  TORCH_CHECK_VALUE(anchor_logits.dim() > 0 && anchor_logits.size(-1) == 4 && hidden.dim() > 0 &&
                        rows <= kMost && channels <= kMost / 4 && hidden.size(-1) <= kMost,
                    "expected (..., 4) anchor logits, got ", anchor_logits.sizes());
  const int64_t width = hidden.size(-1);
  std::vector<int64_t> read = anchor_logits.sizes().vec(), shape = read;
  read.back() = width;
  shape.back() = 4 * channels;
  const at::Tensor rows_read = dense_float(hidden, read, anchor_logits.device()),
                   weights = dense_float(weight, {4, width}, anchor_logits.device()),
                   biases = dense_float(bias, {4}, anchor_logits.device()),
                   anchors =
                       dense_float(anchor_logits, anchor_logits.sizes(), anchor_logits.device()),
                   speeds = dense_float(rates, {channels}, anchor_logits.device()),
                   starts = dense_float(phases, {channels}, anchor_logits.device());
  const at::Tensor boxes = at::empty(anchor_logits.sizes(), anchors.options());
  const at::Tensor logits = at::empty(anchor_logits.sizes(), anchors.options());
  const at::Tensor sines = at::empty(shape, anchors.options().dtype(dtype));
  if (rows == 0) return {boxes, logits, sines};
  MASKDINO_DISPATCH(dtype, [&] {
    PredictBoxes<scalar_t> in{};
    in.hidden = rows_read.const_data_ptr<float>();
    in.weight = weights.const_data_ptr<float>();
    in.bias = biases.const_data_ptr<float>();
    in.anchor_logits = anchors.const_data_ptr<float>();
    in.rates = speeds.const_data_ptr<float>();
    in.phases = starts.const_data_ptr<float>();
    in.boxes = boxes.data_ptr<float>();
    in.logits = logits.data_ptr<float>();
    in.sines = sines.data_ptr<scalar_t>();
    in.rows = rows;
    in.width = static_cast<int>(width);
    in.channels = static_cast<int>(channels);
    in.most = static_cast<float>(most);
    launch_predict_boxes(in, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {boxes, logits, sines};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) { m.impl("predict_boxes", &predict_boxes); }

}  // namespace cuda
}  // namespace maskdino
