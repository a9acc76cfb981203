// Bilinear samples of binary masks with eight pixels in a byte, for the CPU and for CUDA.
//
// Shape key: N masks, H, W pixels, M rows of points, P points in a row.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MASKDINO_HOST_DEVICE __host__ __device__
#else
#define MASKDINO_HOST_DEVICE
#endif

namespace maskdino {

// What a call reads and writes, dense.
struct MaskSamples {
  const uint8_t* bits;   // (N, H, line_bytes); the highest bit of a byte is its leftmost pixel
  const int64_t* index;  // (M,) below N
  const float* points;   // (M, P, 2) as (x, y), or (P, 2) that all rows share
  float* output;         // (M, P)
  int64_t masks, rows, points_per_row;
  int height, width, line_bytes;
  bool shared;
};

// The pixel of a mask, zero outside. Lines and columns are whole numbers, or not finite.
MASKDINO_HOST_DEVICE inline float pixel(const MaskSamples& in, const uint8_t* mask, float line,
                                        float column) {
  if (!(line >= 0 && line < in.height && column >= 0 && column < in.width)) return 0;
  const int x = static_cast<int>(column);
  const uint8_t byte = mask[static_cast<int64_t>(line) * in.line_bytes + (x >> 3)];
  return static_cast<float>((byte >> (7 - (x & 7))) & 1);
}

MASKDINO_HOST_DEVICE inline float sample(const MaskSamples& in, const uint8_t* mask,
                                         const float* point) {
  const float x = point[0] * in.width - 0.5f, y = point[1] * in.height - 0.5f;
  const float left = floorf(x), top = floorf(y);
  const float to_right = x - left, to_bottom = y - top;
  const float upper =
      pixel(in, mask, top, left) * (1 - to_right) + pixel(in, mask, top, left + 1) * to_right;
  const float lower = pixel(in, mask, top + 1, left) * (1 - to_right) +
                      pixel(in, mask, top + 1, left + 1) * to_right;
  return upper * (1 - to_bottom) + lower * to_bottom;
}

// Samples the point with this number in a row of points.
MASKDINO_HOST_DEVICE inline void sample_one(const MaskSamples& in, int64_t row, int64_t number) {
  const uint8_t* mask = in.bits + in.index[row] * in.height * in.line_bytes;
  const int64_t place = (in.shared ? 0 : row * in.points_per_row) + number;
  in.output[row * in.points_per_row + number] = sample(in, mask, in.points + 2 * place);
}

}  // namespace maskdino
