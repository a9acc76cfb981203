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

std::tuple<at::Tensor, at::Tensor, at::Tensor> refine_boxes(const at::Tensor& deltas,
                                                            const at::Tensor& anchor_logits,
                                                            const at::Tensor& rates,
                                                            const at::Tensor& phases, double most,
                                                            at::ScalarType dtype) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();  // blocks of a launch, channels
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(deltas.device());
  const int64_t rows = deltas.numel() / 4, channels = rates.numel();
  TORCH_CHECK_VALUE(
      deltas.dim() > 0 && deltas.size(-1) == 4 && rows <= kMost && channels <= kMost / 4,
      "expected (..., 4) deltas, got ", deltas.sizes());
  const at::Tensor changes = dense_float(deltas, deltas.sizes(), deltas.device()),
                   anchors = dense_float(anchor_logits, deltas.sizes(), deltas.device()),
                   speeds = dense_float(rates, {channels}, deltas.device()),
                   starts = dense_float(phases, {channels}, deltas.device());
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

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) { m.impl("refine_boxes", &refine_boxes); }

}  // namespace cuda
}  // namespace maskdino
