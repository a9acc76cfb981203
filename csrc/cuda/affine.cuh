// What follows a convolution, in one launch: relu(x * scale + shift + residual) of a map, and its
// gradients. T is the type of the maps; arithmetic is float32, rounded once.
//
// Shape key: B images, C channels, H, W of a map.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskdino {
namespace cuda {

// How threads walk over a map: by vectors of `width` elements, each thread `stride` vectors on.
struct Walk {
  int64_t vectors, stride;
  int64_t channels;  // C; channels-last, the vectors of a pixel
  int64_t plane;     // vectors of a plane (H, W) where the map is not channels-last
  int width;         // 1, or as many as fill 16 bytes
  bool last;         // channels-last
  unsigned blocks;
};

template <typename T>
struct Affine {
  const T* x;           // (B, C, H, W) or (B, H, W, C)
  const float* scale;   // (C,) or null
  const float* shift;   // (C,) or null, where it is in T
  const T* half_shift;  // (C,)
  const T* residual;    // as x, or null
  T* y;                 // as x; it may be x
  bool relu;
};

template <typename T>
struct AffineBackward {
  const T* grad;       // of y
  const T* y;          // null without ReLU
  const float* scale;  // (C,) or null
  T* grad_x;           // null where nobody asks for it
  T* grad_residual;    // likewise
};

// A walk over maps of `elements` bytes each, whose pointers are multiples of 16 if `aligned`.
Walk walk_over(int64_t images, int64_t channels, int64_t area, bool channels_last, bool contiguous,
               bool aligned, int element_bytes);

template <typename T>
void launch_affine(const Affine<T>& in, const Walk& walk, cudaStream_t stream);

template <typename T>
void launch_affine_backward(const AffineBackward<T>& in, const Walk& walk, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
