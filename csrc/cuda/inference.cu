// Boxes between two layers of the decoder on a GPU.
#include <cmath>

#include "inference.cuh"
#include "launch.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kBoxThreads = 128;

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
void launch_refine_boxes(const RefineBoxes<T>& in, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(in.rows), 1, 1};
  launch(refine_boxes_kernel<T>, grid, kBoxThreads, 0, stream, in);
}

#define MASKDINO_INSTANTIATE(T) \
  template void launch_refine_boxes<T>(const RefineBoxes<T>&, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
