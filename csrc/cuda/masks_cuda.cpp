// Masks in the frame of the output on a GPU. Nothing here reads a number back from the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../masks_checks.h"
#include "masks.cuh"

namespace maskdino {
namespace cuda {
namespace {

ResizedAxis axis_of(const at::Tensor& maps, at::IntArrayRef canvas, at::IntArrayRef image,
                    at::IntArrayRef output, int axis) {
  return {static_cast<int>(maps.size(axis + 1)), static_cast<int>(canvas[axis]),
          static_cast<int>(image[axis]), static_cast<int>(output[axis])};
}

// Launches what `in` asks for, and returns the quality of the masks where it is wanted.
at::Tensor run(ResizedMasks& in, const at::Tensor& maps, bool with_quality) {
  const at::Tensor dense = maps.contiguous();
  in.maps = dense.const_data_ptr<float>();
  in.masks = maps.size(0);
  in.parts = parts_of_mask(in.x);
  const at::Tensor quality = at::empty({with_quality ? in.masks : 0}, maps.options());
  if (in.masks == 0) return quality;
  const at::Tensor sums = at::empty({with_quality ? in.masks * in.parts * 2 : 0}, maps.options());
  in.sums = with_quality ? sums.data_ptr<float>() : nullptr;
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  launch_resized_masks(in, stream);
  if (with_quality) {
    launch_mask_quality(in.sums, in.masks, in.parts, quality.data_ptr<float>(), stream);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return quality;
}

std::tuple<at::Tensor, at::Tensor> resized_masks(const at::Tensor& maps, at::IntArrayRef canvas,
                                                 at::IntArrayRef image, at::IntArrayRef output,
                                                 bool binary, bool with_quality) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(maps.device());
  check_mask_sizes(maps, canvas, image, output);
  const at::Tensor masks = at::empty({maps.size(0), output[0], output[1]},
                                     maps.options().dtype(binary ? at::kBool : at::kFloat));
  ResizedMasks in{};
  in.y = axis_of(maps, canvas, image, output, 0);
  in.x = axis_of(maps, canvas, image, output, 1);
  if (binary) {
    in.foreground = masks.data_ptr<bool>();
  } else {
    in.logits = masks.data_ptr<float>();
  }
  return {masks, run(in, maps, binary && with_quality)};
}

std::tuple<at::Tensor, at::Tensor> resized_packed_masks(const at::Tensor& maps,
                                                        at::IntArrayRef canvas,
                                                        at::IntArrayRef image,
                                                        at::IntArrayRef output, bool with_quality) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(maps.device());
  check_mask_sizes(maps, canvas, image, output);
  TORCH_CHECK_VALUE(output[0] <= kMostLinesOfBits, "packed masks may have ", kMostLinesOfBits,
                    " lines, got output ", output);
  ResizedMasks in{};
  in.y = axis_of(maps, canvas, image, output, 0);
  in.x = axis_of(maps, canvas, image, output, 1);
  in.mask_bytes = (output[0] * output[1] + 7) / 8;
  const at::Tensor bits = at::empty({maps.size(0), in.mask_bytes}, maps.options().dtype(at::kByte));
  in.bits = bits.data_ptr<uint8_t>();
  return {bits, run(in, maps, with_quality)};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) {
  m.impl("resized_masks", &resized_masks);
  m.impl("resized_packed_masks", &resized_packed_masks);
}

}  // namespace cuda
}  // namespace maskdino
