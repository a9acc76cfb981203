// Forward kernel: every lane holds the sums of its own channels (16 bytes of them where the head
// size allows) while its group walks through the samples.
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

// Adds weight x channels of one corner. A corner outside the map has weight 0 and is not read.
template <int Vector, typename T, typename A>
__device__ __forceinline__ void add_corner(A (&sums)[Vector], A weight, const T* row) {
  if (weight == A(0)) return;
  const auto features = *reinterpret_cast<const Pack<T, Vector>*>(row);
#pragma unroll
  for (int k = 0; k < Vector; ++k) sums[k] += weight * static_cast<A>(features.element[k]);
}

template <typename T, bool Fused, int Vector, int Group>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const Inputs<T, Fused> in, T* output) {
  using A = Arithmetic<T>;
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  fill_levels(g, levels);
  const int lane = threadIdx.x % Group;
  const Place<A> place = find_place<Group, A>(g);
  const Sampler<T, Fused, Group> sampler(in, place, lane);
  const int64_t stride = static_cast<int64_t>(g.heads) * g.channels;
  const T* head = in.value + place.image * g.tokens * stride + place.head * g.channels;
  T* target = output + (place.image * g.queries + place.query) * stride + place.head * g.channels;

  for (int first = 0; first < g.channels; first += Group * Vector) {
    const int channel = first + lane * Vector;
    const bool writes = place.active && channel < g.channels;
    const T* features = head + (channel < g.channels ? channel : 0);
    A sums[Vector] = {};
    for (int base = 0; base < g.samples; base += Group) {
      int row = 0;
      A weights[4] = {};
      if (place.active && base + lane < g.samples) {
        A x, y;
        sampler.locate(base + lane, levels[base + lane], x, y);
        const auto s = place_sample(x, y, sampler.weight(base + lane), levels[base + lane]);
        row = s.row;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          // Chosen, not multiplied by zero: a NaN weight must not lead outside the map.
          weights[corner] = s.corners >> corner & 1 ? s.weight * corner_weight(s, corner) : A(0);
        }
      }
#pragma unroll 4
      for (int j = 0; j < Group; ++j) {
        if (base + j >= g.samples) break;
        const int64_t top = __shfl_sync(kWholeWarp, row, j, Group);
        const int64_t bottom = top + levels[base + j].width;
        const A top_left = __shfl_sync(kWholeWarp, weights[0], j, Group);
        const A top_right = __shfl_sync(kWholeWarp, weights[1], j, Group);
        const A bottom_left = __shfl_sync(kWholeWarp, weights[2], j, Group);
        const A bottom_right = __shfl_sync(kWholeWarp, weights[3], j, Group);
        add_corner<Vector>(sums, top_left, features + top * stride);
        add_corner<Vector>(sums, top_right, features + (top + 1) * stride);
        add_corner<Vector>(sums, bottom_left, features + bottom * stride);
        add_corner<Vector>(sums, bottom_right, features + (bottom + 1) * stride);
      }
    }
    if (writes) {
      Pack<T, Vector> result;
#pragma unroll
      for (int k = 0; k < Vector; ++k) result.element[k] = static_cast<T>(sums[k]);
      *reinterpret_cast<Pack<T, Vector>*>(target + channel) = result;
    }
  }
}

}  // namespace

template <typename T, bool Fused>
void launch_forward(const Inputs<T, Fused>& in, T* output, bool vectors, cudaStream_t stream) {
  const Geometry& g = in.geometry;
  choose_group<T>(g.channels, vectors, [&](auto vector, auto group) {
    constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
    launch(forward_kernel<T, Fused, kVector, kGroup>, count_blocks(g), threads_per_block<kGroup>(g),
           g.samples * sizeof(SampleLevel), stream, in, output);
  });
}

#define MASKDINO_INSTANTIATE(T)                                                            \
  template void launch_forward<T, false>(const Inputs<T, false>&, T*, bool, cudaStream_t); \
  template void launch_forward<T, true>(const Inputs<T, true>&, T*, bool, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(double)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
