// Samples of packed masks on a GPU: one thread per point, which neighbors in a row read together.
#include <algorithm>
#include <cassert>

#include "launch.cuh"
#include "packed_masks.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kSampleThreads = 256;
constexpr int64_t kRowsPerLayer = 65535;  // the most blocks along y

__global__ void sample_packed_masks_kernel(const MaskSamples in) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kSampleThreads + threadIdx.x;
  const int64_t row = blockIdx.z * kRowsPerLayer + blockIdx.y;
  if (number >= in.points_per_row || row >= in.rows) return;
  assert(in.index[row] >= 0 && in.index[row] < in.masks);
  sample_one(in, row, number);
}

}  // namespace

void launch_sample_packed_masks(const MaskSamples& samples, cudaStream_t stream) {
  const int64_t blocks = (samples.points_per_row + kSampleThreads - 1) / kSampleThreads;
  const Grid grid{static_cast<unsigned>(blocks),
                  static_cast<unsigned>(std::min(samples.rows, kRowsPerLayer)),
                  static_cast<unsigned>((samples.rows + kRowsPerLayer - 1) / kRowsPerLayer)};
  launch(sample_packed_masks_kernel, grid, kSampleThreads, 0, stream, samples);
}

}  // namespace cuda
}  // namespace maskdino
