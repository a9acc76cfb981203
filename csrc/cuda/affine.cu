// What follows a convolution. Memory bounds it: each thread loads several vectors of 16 bytes
// before it uses any. Channels-last, the stride of a thread is a multiple of the channels, so that
// it reads the numbers of its channels once.
#include <algorithm>
#include <numeric>

#include "affine.cuh"
#include "launch.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kAffineThreads = 256;
constexpr int kLoads = 4;          // vectors of each map that a thread loads at once
constexpr int64_t kEnough = 1024;  // blocks that fill a GPU

// Division of 64 bits is slow, and seldom needed.
__device__ __forceinline__ int64_t quotient(int64_t number, int64_t divisor) {
  if (((number | divisor) >> 32) == 0) {
    return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  }
  return number / divisor;
}

// The first channel of a vector.
template <int Width, bool Last>
__device__ __forceinline__ int64_t channel_of(const Walk& walk, int64_t vector) {
  const int64_t place = Last ? vector : quotient(vector, walk.plane);
  const int64_t channel = place - quotient(place, walk.channels) * walk.channels;
  return Last ? channel * Width : channel;
}

template <int Count>
__device__ __forceinline__ void load_scale(const float* scale, int64_t channel,
                                           float (&numbers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) numbers[i] = scale == nullptr ? 1.0f : scale[channel + i];
}

template <int Count, typename T>
__device__ __forceinline__ void load_shift(const Affine<T>& in, int64_t channel,
                                           float (&numbers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    numbers[i] = in.shift != nullptr ? in.shift[channel + i]
                                     : static_cast<float>(in.half_shift[channel + i]);
  }
}

// The same vectors of two maps; the second may be missing.
template <int Width, typename T>
__device__ __forceinline__ void load_both(const T* first, const T* second, const Walk& walk,
                                          int64_t vector, Pack<T, Width> (&firsts)[kLoads],
                                          Pack<T, Width> (&seconds)[kLoads]) {
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const int64_t at = vector + k * walk.stride;
    if (at < walk.vectors) {
      firsts[k] = load_pack<Width>(first + at * Width);
      if (second != nullptr) seconds[k] = load_pack<Width>(second + at * Width);
    }
  }
}

template <int Width, typename T>
__device__ __forceinline__ void store(T* target, int64_t vector, const float (&numbers)[Width]) {
  Pack<T, Width> pack;
#pragma unroll
  for (int i = 0; i < Width; ++i) pack.element[i] = static_cast<T>(numbers[i]);
  *reinterpret_cast<Pack<T, Width>*>(target + vector * Width) = pack;
}

template <typename T, int Width, bool Last>
__global__ void __launch_bounds__(kAffineThreads)
    affine_kernel(const Affine<T> in, const Walk walk) {
  constexpr int kChannels = Last ? Width : 1;  // of a vector
  int64_t vector = static_cast<int64_t>(blockIdx.x) * kAffineThreads + threadIdx.x;
  if (vector >= walk.vectors) return;
  float scale[kChannels], shift[kChannels];
  if (Last) {
    const int64_t channel = channel_of<Width, Last>(walk, vector);
    load_scale(in.scale, channel, scale);
    load_shift(in, channel, shift);
  }
  for (; vector < walk.vectors; vector += kLoads * walk.stride) {
    Pack<T, Width> x[kLoads], residual[kLoads];
    load_both<Width>(in.x, in.residual, walk, vector, x, residual);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = vector + k * walk.stride;
      if (at >= walk.vectors) break;
      if (!Last) {
        const int64_t channel = channel_of<Width, Last>(walk, at);
        load_scale(in.scale, channel, scale);
        load_shift(in, channel, shift);
      }
      float numbers[Width], added[Width];
      unpack(x[k], numbers);
      if (in.residual != nullptr) unpack(residual[k], added);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const int channel = Last ? i : 0;
        float number = numbers[i] * scale[channel] + shift[channel];
        if (in.residual != nullptr) number += added[i];
        numbers[i] = in.relu && number < 0 ? 0.0f : number;  // not a number stays that
      }
      store<Width>(in.y, at, numbers);
    }
  }
}

template <typename T, int Width, bool Last>
__global__ void __launch_bounds__(kAffineThreads)
    affine_backward_kernel(const AffineBackward<T> in, const Walk walk) {
  constexpr int kChannels = Last ? Width : 1;
  int64_t vector = static_cast<int64_t>(blockIdx.x) * kAffineThreads + threadIdx.x;
  if (vector >= walk.vectors) return;
  float scale[kChannels];
  if (Last) load_scale(in.scale, channel_of<Width, Last>(walk, vector), scale);
  for (; vector < walk.vectors; vector += kLoads * walk.stride) {
    Pack<T, Width> grad[kLoads], y[kLoads];
    load_both<Width>(in.grad, in.y, walk, vector, grad, y);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = vector + k * walk.stride;
      if (at >= walk.vectors) break;
      if (!Last) load_scale(in.scale, channel_of<Width, Last>(walk, at), scale);
      float numbers[Width], made[Width];
      unpack(grad[k], numbers);
      if (in.y != nullptr) {
        unpack(y[k], made);
#pragma unroll
        for (int i = 0; i < Width; ++i) numbers[i] = made[i] <= 0 ? 0.0f : numbers[i];
      }
      if (in.grad_residual != nullptr) store<Width>(in.grad_residual, at, numbers);
#pragma unroll
      for (int i = 0; i < Width; ++i) numbers[i] *= scale[Last ? i : 0];
      if (in.grad_x != nullptr) store<Width>(in.grad_x, at, numbers);
    }
  }
}

// Starts the kernel for a walk.
#define MASKDINO_LAUNCH(kernel)                                                \
  const Grid grid{walk.blocks, 1, 1};                                          \
  constexpr int wide = 16 / sizeof(T);                                         \
  if (walk.width > 1 && walk.last) {                                           \
    launch(kernel<T, wide, true>, grid, kAffineThreads, 0, stream, in, walk);  \
  } else if (walk.width > 1) {                                                 \
    launch(kernel<T, wide, false>, grid, kAffineThreads, 0, stream, in, walk); \
  } else if (walk.last) {                                                      \
    launch(kernel<T, 1, true>, grid, kAffineThreads, 0, stream, in, walk);     \
  } else {                                                                     \
    launch(kernel<T, 1, false>, grid, kAffineThreads, 0, stream, in, walk);    \
  }

}  // namespace

Walk walk_over(int64_t images, int64_t channels, int64_t area, bool channels_last, bool contiguous,
               bool aligned, int element_bytes) {
  const int wide = 16 / element_bytes;
  Walk walk{};
  // Maps of one channel or pixel are both.
  walk.last = channels_last && !(contiguous && area % wide == 0);
  walk.width = aligned && (walk.last ? channels : area) % wide == 0 ? wide : 1;
  walk.vectors = images * channels * area / walk.width;
  walk.channels = walk.last ? channels / walk.width : channels;
  walk.plane = area / walk.width;
  const auto blocks = [&](int64_t loads) {
    return (walk.vectors + kAffineThreads * loads - 1) / (kAffineThreads * loads);
  };
  int64_t wanted = std::max(std::min(blocks(1), kEnough), blocks(kLoads));
  if (walk.last) {
    const int64_t whole = walk.channels / std::gcd<int64_t>(walk.channels, kAffineThreads);
    wanted = (wanted + whole - 1) / whole * whole;
  }
  walk.blocks = static_cast<unsigned>(wanted);
  walk.stride = wanted * kAffineThreads;
  return walk;
}

template <typename T>
void launch_affine(const Affine<T>& in, const Walk& walk, cudaStream_t stream) {
  MASKDINO_LAUNCH(affine_kernel)
}

template <typename T>
void launch_affine_backward(const AffineBackward<T>& in, const Walk& walk,
                            cudaStream_t stream){MASKDINO_LAUNCH(affine_backward_kernel)}
#undef MASKDINO_LAUNCH

#define MASKDINO_INSTANTIATE(T)                                                \
  template void launch_affine<T>(const Affine<T>&, const Walk&, cudaStream_t); \
  template void launch_affine_backward<T>(const AffineBackward<T>&, const Walk&, cudaStream_t);
MASKDINO_INSTANTIATE(float) MASKDINO_INSTANTIATE(c10::Half) MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
