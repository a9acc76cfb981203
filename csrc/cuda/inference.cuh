// Steps between the products of a layer in inference, each one launch in the place of several: what
// the host calls. T is the type in which products are computed.
//
// Shape key: N rows, C channels, D of them that the box head reads.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskdino {
namespace cuda {

// The last layer of the box head, the boxes and logits that a decoder layer goes on with, and the
// sine embedding of the boxes.
template <typename T>
struct PredictBoxes {
  const float* hidden;          // (N, D) that the last layer reads
  const float *weight, *bias;   // (4, D) and (4,)
  const float* anchor_logits;   // (N, 4)
  const float *rates, *phases;  // (C,) of the embedding
  float *boxes, *logits;        // (N, 4); logits no further from 0 than `most`
  T* sines;                     // (N, 4, C) of y, x, w, h
  int64_t rows;
  int width, channels;  // D, C
  float most;
};

template <typename T>
void launch_predict_boxes(const PredictBoxes<T>& in, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
