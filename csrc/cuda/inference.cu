// Steps of inference on a GPU. A warp norms a row; what it reads again is still in its cache.
#include <cmath>

#include "inference.cuh"
#include "launch.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kNormThreads = 128;
constexpr int kBoxThreads = 128;

template <typename T>
__device__ __forceinline__ float sum_at(const AddNorm<T>& in, int64_t place) {
  return in.x[place] + static_cast<float>(in.update[place]);
}

template <typename T>
__global__ void add_norm_kernel(const AddNorm<T> in) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= in.rows) return;
  const int64_t first = row * in.channels;
  float total = 0;
  for (int c = lane; c < in.channels; c += kWarp) total += sum_at(in, first + c);
  const float mean = group_sum<kWarp>(total) / in.channels;
  float squares = 0;
  for (int c = lane; c < in.channels; c += kWarp) {
    const float distance = sum_at(in, first + c) - mean;
    squares += distance * distance;
  }
  const float scale = 1 / sqrtf(group_sum<kWarp>(squares) / in.channels + in.eps);
  const int64_t position = row % in.position_rows * in.channels;
  for (int c = lane; c < in.channels; c += kWarp) {
    const int64_t place = first + c;
    const float normed = (sum_at(in, place) - mean) * scale * in.weight[c] + in.bias[c];
    in.normed[place] = normed;
    if (in.rounded != nullptr) in.rounded[place] = static_cast<T>(normed);
    if (in.position != nullptr) {
      in.placed[place] = static_cast<T>(normed + in.position[position + c]);
    } else if (in.half_position != nullptr) {
      in.placed[place] =
          static_cast<T>(normed + static_cast<float>(in.half_position[position + c]));
    }
  }
}

// A block has a box. Not a number stays that.
template <typename T>
__global__ void refine_boxes_kernel(const RefineBoxes<T> in) {
  const int64_t row = blockIdx.x;
  const float* deltas = in.deltas + 4 * row;
  const float* anchors = in.anchor_logits + 4 * row;
  for (int i = threadIdx.x; i < 4 * in.channels; i += kBoxThreads) {
    const int part = i / in.channels, channel = i % in.channels;
    const int coordinate = part < 2 ? 1 - part : part;
    const float logit = deltas[coordinate] + anchors[coordinate];
    const float value = 1 / (1 + expf(-logit));
    if (channel == 0) {
      in.boxes[4 * row + coordinate] = value;
      in.logits[4 * row + coordinate] =
          logit < -in.most ? -in.most : (logit > in.most ? in.most : logit);
    }
    in.sines[4 * row * in.channels + i] =
        static_cast<T>(sinf(in.phases[channel] + value * in.rates[channel]));
  }
}

}  // namespace

template <typename T>
void launch_add_norm(const AddNorm<T>& in, cudaStream_t stream) {
  constexpr int64_t rows = kNormThreads / kWarp;
  const Grid grid{static_cast<unsigned>((in.rows + rows - 1) / rows), 1, 1};
  launch(add_norm_kernel<T>, grid, kNormThreads, 0, stream, in);
}

template <typename T>
void launch_refine_boxes(const RefineBoxes<T>& in, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(in.rows), 1, 1};
  launch(refine_boxes_kernel<T>, grid, kBoxThreads, 0, stream, in);
}

#define MASKDINO_INSTANTIATE(T)                                      \
  template void launch_add_norm<T>(const AddNorm<T>&, cudaStream_t); \
  template void launch_refine_boxes<T>(const RefineBoxes<T>&, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
