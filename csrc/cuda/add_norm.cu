// LayerNorm of sums on a GPU. A warp has a row, which stays in its registers: lane l has
// kNormVector channels of each chunk k, from (32 k + l) kNormVector on.
#include "add_norm.cuh"

#include <cmath>

#include "launch.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kNormWarps = 4;

template <typename T>
using Channels = Pack<T, kNormVector>;

__device__ __forceinline__ int first_channel(int chunk) {
  return (chunk * kLanes + static_cast<int>(threadIdx.x) % kLanes) * kNormVector;
}

template <typename T>
__device__ __forceinline__ void store(T* target, const float (&numbers)[kNormVector]) {
  Channels<T> pack;
#pragma unroll
  for (int i = 0; i < kNormVector; ++i) pack.element[i] = static_cast<T>(numbers[i]);
  *reinterpret_cast<Channels<T>*>(target) = pack;
}

// A chunk of a row from a pointer that may be null; zeros beyond its channels.
template <typename T>
__device__ __forceinline__ Channels<T> load_chunk(const T* row, int chunk, int channels) {
  const int c = first_channel(chunk);
  Channels<T> pack;
  if (row != nullptr && c < channels) {
    pack = load_pack<kNormVector>(row + c);
  } else {
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) pack.element[i] = static_cast<T>(0.f);
  }
  return pack;
}

// x + update; all is loaded before any is used.
template <typename T, int kChunks>
__device__ __forceinline__ void add_rows(const AddNorm<T>& in, int64_t first,
                                         float (&sums)[kChunks][kNormVector]) {
  Channels<T> updates[kChunks];
  Channels<float> residuals[kChunks];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    residuals[k] = load_chunk(in.x + first, k, in.channels);
    updates[k] = load_chunk(in.update + first, k, in.channels);
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    unpack(updates[k], sums[k]);
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) sums[k][i] += residuals[k].element[i];
  }
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kNormWarps* kLanes) add_norm_kernel(const AddNorm<T> in) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kLanes;
  if (row >= in.rows) return;
  const int64_t first = row * in.channels;
  float numbers[kChunks][kNormVector];
  add_rows(in, first, numbers);
  float total = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) total += numbers[k][i];
  }
  const float mean = group_sum<kLanes>(total) / in.channels;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const bool there = first_channel(k) < in.channels;
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      numbers[k][i] = there ? numbers[k][i] - mean : 0.f;
      squares += numbers[k][i] * numbers[k][i];
    }
  }
  const float scale = 1 / sqrtf(group_sum<kLanes>(squares) / in.channels + in.eps);
  const int64_t place =
      static_cast<int64_t>(static_cast<unsigned>(row) % static_cast<unsigned>(in.position_rows)) *
      in.channels;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const int c = first_channel(k);
    if (c >= in.channels) continue;
    float weight[kNormVector], bias[kNormVector];
    unpack(load_pack<kNormVector>(in.weight + c), weight);
    unpack(load_pack<kNormVector>(in.bias + c), bias);
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      numbers[k][i] = numbers[k][i] * scale * weight[i] + bias[i];
    }
    store(in.normed + first + c, numbers[k]);
    if (in.rounded != nullptr) store(in.rounded + first + c, numbers[k]);
    if (in.placed == nullptr) continue;
    float position[kNormVector];
    if (in.position != nullptr) {
      unpack(load_pack<kNormVector>(in.position + place + c), position);
    } else {
      unpack(load_pack<kNormVector>(in.half_position + place + c), position);
    }
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) position[i] += numbers[k][i];
    store(in.placed + first + c, position);
  }
}

// `launch(chunks)` with a compile-time constant.
template <typename Launch>
void choose_chunks(int channels, const Launch& launch) {
  constexpr int kChunk = kLanes * kNormVector;
  if (channels <= kChunk) return launch(std::integral_constant<int, 1>{});
  if (channels <= 2 * kChunk) return launch(std::integral_constant<int, 2>{});
  if (channels <= 4 * kChunk) return launch(std::integral_constant<int, 4>{});
  static_assert(kMostNormChannels == 8 * kChunk);
  launch(std::integral_constant<int, 8>{});
}

}  // namespace

template <typename T>
void launch_add_norm(const AddNorm<T>& in, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>((in.rows + kNormWarps - 1) / kNormWarps), 1, 1};
  choose_chunks(in.channels, [&](auto chunks) {
    launch(add_norm_kernel<T, chunks.value>, grid, kNormWarps * kLanes, 0, stream, in);
  });
}

#define MASKDINO_INSTANTIATE(T) template void launch_add_norm<T>(const AddNorm<T>&, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
