// Samples of packed masks on a CPU: torch's threads share the rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../packed_masks_checks.h"

namespace maskdino {
namespace cpu {
namespace {

constexpr int64_t kPointsPerThread = 4096;  // fewer are not worth a thread

at::Tensor sample_packed_masks(const at::Tensor& bits, int64_t width, const at::Tensor& index,
                               const at::Tensor& points) {
  const at::NoGradGuard no_grad;
  const MaskCall call = prepare_mask_call(bits, width, index, points);
  if (call.empty()) return call.output;
  const MaskSamples& in = call.samples;
  for (int64_t row = 0; row < in.rows; ++row) {
    TORCH_CHECK_INDEX(in.index[row] >= 0 && in.index[row] < in.masks, "index ", in.index[row],
                      " is none of the ", in.masks, " masks");
  }
  const int64_t rows_at_once = std::max<int64_t>(1, kPointsPerThread / in.points_per_row);
  at::parallel_for(0, in.rows, rows_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t number = 0; number < in.points_per_row; ++number) sample_one(in, row, number);
    }
  });
  return call.output;
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) { m.impl("sample_packed_masks", &sample_packed_masks); }

}  // namespace cpu
}  // namespace maskdino
