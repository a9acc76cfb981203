// LayerNorm of sums on a GPU. A warp has a row, which stays in its registers: lane l has
// kNormVector channels of each chunk k, from (32 k + l) kNormVector on.
#include "add_norm.cuh"

#include <cmath>

#include "launch.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kNormWarps = 4;
constexpr int kTotalWarps = 16;  // that add up partial sums of 32 channels

template <typename T>
using Channels = Pack<T, kNormVector>;

__device__ __forceinline__ int first_channel(int chunk) {
  return (chunk * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kNormVector;
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
__global__ void __launch_bounds__(kNormWarps* kWarp) add_norm_kernel(const AddNorm<T> in) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
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
  const float mean = group_sum<kWarp>(total) / in.channels;
  if (in.sum != nullptr) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int c = first_channel(k);
      if (c < in.channels) store(in.sum + first + c, numbers[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const bool there = first_channel(k) < in.channels;
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      numbers[k][i] = there ? numbers[k][i] - mean : 0.f;
      squares += numbers[k][i] * numbers[k][i];
    }
  }
  const float scale = 1 / sqrtf(group_sum<kWarp>(squares) / in.channels + in.eps);
  if (in.sum != nullptr && threadIdx.x % kWarp == 0) {
    in.mean[row] = mean;
    in.rstd[row] = scale;
  }
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

// What a lane has of a row: the distance from the mean in standard deviations, and the gradient of
// all that was made of the normed row. All is loaded before any is used.
template <typename T, int kChunks>
__device__ __forceinline__ void load_gradients(const AddNormBackward<T>& in, int64_t row,
                                               float (&normal)[kChunks][kNormVector],
                                               float (&grad)[kChunks][kNormVector]) {
  const int64_t first = row * in.channels;
  const auto of_row = [&](auto* pointer) { return pointer == nullptr ? pointer : pointer + first; };
  Channels<float> sums[kChunks], normed[kChunks];
  Channels<T> rounded[kChunks], placed[kChunks];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    sums[k] = load_chunk(in.sum + first, k, in.channels);
    normed[k] = load_chunk(of_row(in.grad_normed), k, in.channels);
    rounded[k] = load_chunk(of_row(in.grad_rounded), k, in.channels);
    placed[k] = load_chunk(of_row(in.grad_placed), k, in.channels);
  }
  const float mean = in.mean[row], rstd = in.rstd[row];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    float added[kNormVector];
    unpack(rounded[k], grad[k]);
    unpack(placed[k], added);
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      normal[k][i] = (sums[k].element[i] - mean) * rstd;
      grad[k][i] = normed[k].element[i] + (grad[k][i] + added[i]);
    }
  }
}

// The gradient of a row's sum, of that of the row scaled and of the row's distances.
template <typename T, int kChunks>
__device__ __forceinline__ void store_gradient(const AddNormBackward<T>& in, int64_t row,
                                               const float (&normal)[kChunks][kNormVector],
                                               const float (&scaled)[kChunks][kNormVector]) {
  float total = 0, along = 0;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      total += scaled[k][i];
      along += scaled[k][i] * normal[k][i];
    }
  }
  total = group_sum<kWarp>(total) / in.channels;
  along = group_sum<kWarp>(along) / in.channels;
  const float rstd = in.rstd[row];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const int c = first_channel(k);
    if (c >= in.channels) continue;
    float grad[kNormVector];
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      grad[i] = rstd * (scaled[k][i] - total - normal[k][i] * along);
    }
    store(in.grad_sum + row * in.channels + c, grad);
    if (in.grad_update != nullptr) store(in.grad_update + row * in.channels + c, grad);
  }
}

// Sums of a block's warps, one warp after another.
template <int kChunks>
__device__ __forceinline__ void store_partial(int channels, float* partial,
                                              const float (&of_weight)[kChunks][kNormVector],
                                              const float (&of_bias)[kChunks][kNormVector]) {
  extern __shared__ SampleLevel levels[];
  float* const totals = reinterpret_cast<float*>(levels);  // (2, C)
  for (int i = threadIdx.x; i < 2 * channels; i += kNormBackwardWarps * kWarp) totals[i] = 0;
  __syncthreads();
  for (int turn = 0; turn < kNormBackwardWarps; ++turn) {
    if (static_cast<int>(threadIdx.x) / kWarp == turn) {
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int c = first_channel(k);
        if (c >= channels) continue;
#pragma unroll
        for (int i = 0; i < kNormVector; ++i) {
          totals[c + i] += of_weight[k][i];
          totals[channels + c + i] += of_bias[k][i];
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < 2 * channels; i += kNormBackwardWarps * kWarp) {
    partial[static_cast<int64_t>(blockIdx.x) * 2 * channels + i] = totals[i];
  }
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kNormBackwardWarps* kWarp)
    add_norm_backward_kernel(const AddNormBackward<T> in) {
  float of_weight[kChunks][kNormVector] = {}, of_bias[kChunks][kNormVector] = {};
  const int64_t step = static_cast<int64_t>(in.blocks) * kNormBackwardWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kNormBackwardWarps + threadIdx.x / kWarp;
       row < in.rows; row += step) {
    float normal[kChunks][kNormVector], grad[kChunks][kNormVector];
    load_gradients(in, row, normal, grad);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const Channels<float> weight = load_chunk(in.weight, k, in.channels);
#pragma unroll
      for (int i = 0; i < kNormVector; ++i) {
        of_weight[k][i] += grad[k][i] * normal[k][i];
        of_bias[k][i] += grad[k][i];
        grad[k][i] *= weight.element[i];
      }
    }
    store_gradient(in, row, normal, grad);
  }
  if (in.partial != nullptr) store_partial(in.channels, in.partial, of_weight, of_bias);
}

// Adds up what blocks have of weight and bias: a block 32 columns, always in the same order.
template <typename T>
__global__ void add_partial_kernel(const AddNormBackward<T> in) {
  extern __shared__ SampleLevel levels[];
  float* const totals = reinterpret_cast<float*>(levels);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = blockIdx.x * kWarp + lane, columns = 2 * in.channels;
  float total = 0;
  if (column < columns) {
#pragma unroll 8
    for (int row = warp; row < in.blocks; row += kTotalWarps) {
      total += in.partial[static_cast<int64_t>(row) * columns + column];
    }
  }
  totals[threadIdx.x] = total;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int other = 1; other < kTotalWarps; ++other) total += totals[other * kWarp + lane];
  float& target =
      column < in.channels ? in.grad_weight[column] : in.grad_bias[column - in.channels];
  target = total;
}

// `launch(chunks)` with a compile-time constant.
template <typename Launch>
void choose_chunks(int channels, const Launch& launch) {
  constexpr int kChunk = kWarp * kNormVector;
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
    launch(add_norm_kernel<T, chunks.value>, grid, kNormWarps * kWarp, 0, stream, in);
  });
}

template <typename T>
void launch_add_norm_backward(const AddNormBackward<T>& in, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(in.blocks), 1, 1};
  choose_chunks(in.channels, [&](auto chunks) {
    launch(add_norm_backward_kernel<T, chunks.value>, grid, kNormBackwardWarps * kWarp,
           2 * in.channels * sizeof(float), stream, in);
  });
  if (in.partial == nullptr) return;
  const Grid columns{static_cast<unsigned>((2 * in.channels + kWarp - 1) / kWarp), 1, 1};
  constexpr int kThreads = kTotalWarps * kWarp;
  launch(add_partial_kernel<T>, columns, kThreads, kThreads * sizeof(float), stream, in);
}

#define MASKDINO_INSTANTIATE(T)                                                       \
  template void launch_add_norm_backward<T>(const AddNormBackward<T>&, cudaStream_t); \
  template void launch_add_norm<T>(const AddNorm<T>&, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
