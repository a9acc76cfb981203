// Samples of packed masks on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../packed_masks_checks.h"
#include "packed_masks.cuh"

namespace maskdino {
namespace cuda {
namespace {

at::Tensor sample_packed_masks(const at::Tensor& bits, int64_t width, const at::Tensor& index,
                               const at::Tensor& points) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(bits.device());
  const MaskCall call = prepare_mask_call(bits, width, index, points);
  if (call.empty()) return call.output;
  launch_sample_packed_masks(call.samples, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return call.output;
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) { m.impl("sample_packed_masks", &sample_packed_masks); }

}  // namespace cuda
}  // namespace maskdino
