// Steps between the products of a layer in inference, each one launch in the place of several: what
// the host calls. T is the type in which products are computed.
//
// Shape key: N rows, C channels.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskdino {
namespace cuda {

// Boxes and logits that a decoder layer goes on with, and the sine embedding of the boxes.
template <typename T>
struct RefineBoxes {
  const float *deltas, *anchor_logits;  // (N, 4)
  const float *rates, *phases;          // (C,) of the embedding
  float *boxes, *logits;                // (N, 4); logits no further from 0 than `most`
  T* sines;                             // (N, 4, C) of y, x, w, h
  int64_t rows;
  int channels;
  float most;
};

template <typename T>
void launch_refine_boxes(const RefineBoxes<T>& in, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
