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

// LayerNorm(x + update), as it is, in the type T, and with a position added in the type T. Outputs
// that nobody reads are null.
template <typename T>
struct AddNorm {
  const float* x;              // (N, C)
  const T* update;             // (N, C)
  const float *weight, *bias;  // (C,)
  const float* position;       // (position_rows, C), for rows again and again; or null
  const T* half_position;      // the same in T; or null
  float* normed;               // (N, C)
  T* rounded;                  // (N, C) or null
  T* placed;                   // (N, C) where there is a position
  int64_t rows, position_rows;
  int channels;
  float eps;
};

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
void launch_add_norm(const AddNorm<T>& in, cudaStream_t stream);

template <typename T>
void launch_refine_boxes(const RefineBoxes<T>& in, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
