// Boxes between two layers of the decoder on a GPU.
#include <cmath>

#include "inference.cuh"
#include "launch.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kBoxThreads = 4 * kWarp;

// A block has a box, each of its four warps a coordinate, then all the embedding. Not a number
// stays that.
template <typename T>
__global__ void predict_boxes_kernel(const PredictBoxes<T> in) {
  extern __shared__ SampleLevel levels[];  // one name and type for all kernels
  float* box_logits = reinterpret_cast<float*>(levels);
  const int64_t row = blockIdx.x;
  const int own = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float product = 0;
  for (int i = lane; i < in.width; i += kWarp) {
    product += in.hidden[row * in.width + i] * in.weight[own * in.width + i];
  }
  product = group_sum<kWarp>(product);
  if (lane == 0) {
    const float logit = product + in.bias[own] + in.anchor_logits[4 * row + own];
    box_logits[own] = logit;
    in.boxes[4 * row + own] = 1 / (1 + expf(-logit));
    in.logits[4 * row + own] = logit < -in.most ? -in.most : (logit > in.most ? in.most : logit);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 4 * in.channels; i += kBoxThreads) {
    const int part = i / in.channels, channel = i % in.channels;
    const float value = 1 / (1 + expf(-box_logits[part < 2 ? 1 - part : part]));
    in.sines[4 * row * in.channels + i] =
        static_cast<T>(sinf(in.phases[channel] + value * in.rates[channel]));
  }
}

}  // namespace

template <typename T>
void launch_predict_boxes(const PredictBoxes<T>& in, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(in.rows), 1, 1};
  launch(predict_boxes_kernel<T>, grid, kBoxThreads, 4 * sizeof(float), stream, in);
}

#define MASKDINO_INSTANTIATE(T) \
  template void launch_predict_boxes<T>(const PredictBoxes<T>&, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
