// Sum of a residual and an update, LayerNorm of it, and what the next products read of that: what
// the host calls. T is the type in which products are computed.
//
// Shape key: N rows, C channels, a multiple of kNormVector and at most kMostNormChannels. Tensors
// begin where packs of kNormVector may.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskdino {
namespace cuda {

constexpr int kNormVector = 4;           // channels that a lane moves at once
constexpr int kMostNormChannels = 1024;  // of a row that fits registers

// Outputs that nobody reads are null.
template <typename T>
struct AddNorm {
  const float* x;              // (N, C)
  const T* update;             // (N, C)
  const float *weight, *bias;  // (C,)
  const float* position;       // (position_rows, C), for rows again and again; or null
  const T* half_position;      // the same in T; or null
  float* normed;               // (N, C)
  T* rounded;                  // (N, C): the same in T, or null
  T* placed;                   // (N, C): with the position, in T, where there is one
  float *sum, *mean, *rstd;    // (N, C), (N,), (N,): what the way back needs; or null
  int64_t rows, position_rows;
  int channels;
  float eps;
};

// Gradients of all outputs at once. What is not given or not wanted is null.
template <typename T>
struct AddNormBackward {
  const float* grad_normed;                 // (N, C)
  const T *grad_rounded, *grad_placed;      // (N, C)
  const float *sum, *mean, *rstd, *weight;  // (N, C), (N,), (N,), (C,)
  float* grad_sum;                          // (N, C)
  T* grad_update;                           // (N, C): the same in T, or null
  float* partial;                           // (blocks, 2, C) of weight and bias; or null
  float *grad_weight, *grad_bias;           // (C,)
  int64_t rows;
  int channels, blocks;
};

// Blocks that go through the rows together: each of a large GPU's processors has four. The same on
// all GPUs, so that sums are.
constexpr int kNormBackwardWarps = 8;
constexpr int64_t kMostNormBackwardBlocks = 528;

template <typename T>
void launch_add_norm(const AddNorm<T>& in, cudaStream_t stream);

template <typename T>
void launch_add_norm_backward(const AddNormBackward<T>& in, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
