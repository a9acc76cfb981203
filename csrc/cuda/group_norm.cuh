// Group norm of maps: what the host calls. T is the type of a map that is read, U of one written.
//
// Shape key: N images, P pixels, C channels, G groups of C / G channels.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskdino {
namespace cuda {

constexpr int kGroupThreads = 256;  // of a block

// Of some numbers: how many, their mean as origin + mean, of which the second is small and so knows
// more digits, and the sum of squared distances from it.
struct alignas(16) Moments {
  float count, origin, mean, squares;
};

// How maps are cut into blocks. Rows: pixel after pixel (channels last); a block takes some groups
// of a run of pixels, each of its threads a vector of channels. Planes: channel after channel; a
// block takes a run of pixels of one channel.
struct Cut {
  int64_t images;
  int pixels, channels, groups;
  bool rows;
  int parts, part_pixels;    // runs
  int slices, slice_groups;  // where there are rows
  int vector;                // neighbors in memory that a thread takes together: 16 bytes, or 1

  int group_channels() const { return channels / groups; }
  int64_t blocks() const { return images * parts * (rows ? slices : channels); }
  // Moments of one group that blocks leave.
  int64_t group_parts() const { return rows ? parts : int64_t{parts} * group_channels(); }
};

// Channels that are normed: x + shift, whose type is T or float32.
template <typename T>
struct GroupInput {
  const T* x;             // (N, P, C) or (N, C, P)
  const float* shift;     // (C,) or null
  const T* half_shift;    // (C,) or null
  const float* weight;    // (C,)
  const float* bias;      // (C,)
  Moments* moments;       // (N, G, group_parts)
  float* mean_and_scale;  // (N, G, 2): of x + shift, and 1 / sqrt(variance + eps)
  float eps;
  Cut cut;
};

// What follows the norm: ReLU, or the sum with a coarser map, resized bilinearly.
template <typename U>
struct GroupOutput {
  U* normed;  // as x
  bool relu;
  const float* coarse;  // (N, h, w, C) where x has rows, else (N, C, h, w); or null
  int64_t coarse_step;  // numbers from one image to the next
  int height, width, coarse_height, coarse_width;
  float scale_y, scale_x;  // coarse pixels of a pixel
};

// Gradients of a map of type T by those of its norm, of type G; without shift, and `moments`
// unused.
template <typename T, typename G>
struct GroupGradient {
  GroupInput<T> in;
  const G* grad;  // as x
  bool relu;
  float* parts;          // (N, C, cut.parts, 2): sums of grad, and of grad times the normed x
  float* sums;           // (N, C, 2): of all parts
  T* x;                  // as x
  float *weight, *bias;  // (C,)
};

// The gradient (N, h, w, C), or (N, C, h, w), of a coarse map by that of the resized one.
template <typename G>
struct ResizeGradient {
  const G* grad;  // (N, H, W, C) or (N, C, H, W)
  float* coarse;
  bool rows;
  int vector;      // channels that a thread takes together, 16 bytes of G, or 1
  int64_t images;  // without rows: planes, and there is one channel
  int channels, height, width, coarse_height, coarse_width;
  float scale_y, scale_x;
};

template <typename T, typename G>
void launch_group_norm_backward(const GroupGradient<T, G>& gradient, cudaStream_t stream);

template <typename G>
void launch_resize_backward(const ResizeGradient<G>& gradient, cudaStream_t stream);

template <typename T>
void launch_group_moments(const GroupInput<T>& in, cudaStream_t stream);

template <typename T, typename U>
void launch_group_norm(const GroupInput<T>& in, const GroupOutput<U>& out, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
