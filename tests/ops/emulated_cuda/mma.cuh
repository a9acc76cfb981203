// Stands in for csrc/cuda/mma.cuh: lanes exchange their fragments and multiply in float32.
#pragma once

#include "cuda/kernels.h"
#include "cuda_runtime_api.h"

namespace maskdino {
namespace cuda {

template <typename T>
uint32_t round_pair(float first, float second) {
  const T numbers[2] = {static_cast<T>(first), static_cast<T>(second)};
  uint32_t pair;
  std::memcpy(&pair, numbers, sizeof(pair));
  return pair;
}

// The lower (half 0) or upper number of the pair that begins at bit `shift`.
template <typename T>
float number_of(uint64_t pairs, int shift, int half) {
  const auto bits = static_cast<uint16_t>(pairs >> (shift + 16 * half));
  T number;
  std::memcpy(&number, &bits, sizeof(number));
  return static_cast<float>(number);
}

inline uint64_t join(uint32_t lower, uint32_t upper) { return uint64_t{upper} << 32 | lower; }

template <typename T>
void add_product(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // Of lines g and g + 8: columns 2t, 2t + 1, then 2t + 8, 2t + 9.
  const auto first = emulation::gather(join(a[0], a[2]));
  const auto second = emulation::gather(join(a[1], a[3]));
  const auto right = emulation::gather(join(b[0], b[1]));
  const int lane = threadIdx.x % 32, line = lane / 4, column = lane % 4 * 2;
  for (int k = 0; k < 16; ++k) {
    const int pair = k % 8 / 2, shift = k / 8 * 32, half = k % 2;
    for (int i = 0; i < 4; ++i) {
      const auto& left = i < 2 ? first : second;
      sums[i] += number_of<T>(left[line * 4 + pair], shift, half) *
                 number_of<T>(right[(column + i % 2) * 4 + pair], shift, half);
    }
  }
}

}  // namespace cuda
}  // namespace maskdino
