// Masks in the frame of the output on a GPU: what the host calls.
//
// Shape key: R maps, h, w of a map; H, W of the output.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace maskdino {
namespace cuda {

// An axis of maps that are resized to `canvas`, cut to `image` and resized to `output`.
struct ResizedAxis {
  int map, canvas, image, output;
};

// One of logits, foreground and bits is wanted, the others are null.
struct ResizedMasks {
  const float* maps;   // (R, h, w)
  float* logits;       // (R, H, W)
  bool* foreground;    // (R, H, W), where logits are above 0
  uint8_t* bits;       // (R, (H W + 7) / 8), the same column by column, the first pixel lowest
  float* sums;         // (R, parts, 2) or null: probabilities of foreground, and its pixels
  int64_t masks;       // R
  int64_t mask_bytes;  // of a mask's bits
  int64_t parts;       // of a mask, whose sums are kept apart
  ResizedAxis y, x;
};

int64_t parts_of_mask(const ResizedAxis& x);

// The most lines of an output whose bits fit into shared memory.
constexpr int kMostLinesOfBits = 12000;

void launch_resized_masks(const ResizedMasks& in, cudaStream_t stream);

// The mean probability (R,) over each mask, of its sums.
void launch_mask_quality(const float* sums, int64_t masks, int64_t parts, float* quality,
                         cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
