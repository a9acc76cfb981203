// Forward kernel: every lane holds the sums of its own channels (16 bytes of them where the head
// size allows) while its group walks through the samples.
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

// What a lane hands to the others of its group about its sample: see Sample; weights of the
// corners.
template <typename A>
struct Corners {
  int token, right_step, down_step;
  A weight[4];
};

template <typename A>
__device__ __forceinline__ Corners<A> weigh_corners(const Sample<A>& s, A weight) {
  const A top = weight * s.top, bottom = weight * s.bottom;
  return {s.token,
          s.right_step,
          s.down_step,
          {top * s.left, top * s.right, bottom * s.left, bottom * s.right}};
}

template <int Group, typename A>
__device__ __forceinline__ Corners<A> from_lane(const Corners<A>& own, int lane) {
  Corners<A> corners{__shfl_sync(kWholeWarp, own.token, lane, Group),
                     __shfl_sync(kWholeWarp, own.right_step, lane, Group),
                     __shfl_sync(kWholeWarp, own.down_step, lane, Group),
                     {}};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    corners.weight[k] = __shfl_sync(kWholeWarp, own.weight[k], lane, Group);
  }
  return corners;
}

template <int Vector, typename T, typename A>
__device__ __forceinline__ void add_row(A (&sums)[Vector], A weight, const Pack<T, Vector>& row) {
  A numbers[Vector];
  unpack(row, numbers);
#pragma unroll
  for (int k = 0; k < Vector; ++k) sums[k] += weight * numbers[k];
}

template <typename T, Form kForm, int Vector, int Group>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const Inputs<T, kForm> in, T* output) {
  using A = Arithmetic<T>;
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  fill_levels(g, levels);
  const int lane = threadIdx.x % Group;
  const Place<A> place = find_place<kForm, Group, A>(g);
  const Sampler<T, kForm, Group, (Vector > 1)> sampler(in, place, lane);
  const int stride = g.heads * g.channels;
  const T* head = in.value + place.image * g.tokens * stride + place.head * g.channels;
  T* target = output + (place.image * g.queries + place.query) * stride + place.head * g.channels;

  // With vectors a group covers the head at once.
  for (int first = 0; first < (Vector > 1 ? 1 : g.channels); first += Group) {
    const int channel = first + lane * Vector;
    const bool covers = Vector > 1 || channel < g.channels;
    const T* const features = keep(head + (covers ? channel : 0));
    A sums[Vector] = {};
    A sum_of_weights = 0;
    for (int base = 0; base < g.samples; base += Group) {
      Corners<A> own{-1, 0, 0, {}};
      if (base + lane < g.samples) {
        A x, y;
        const SampleLevel level = levels[base + lane];
        sampler.locate(base + lane, level, x, y);
        const A weight = sampler.weight(base + lane);
        sum_of_weights += weight;
        own = weigh_corners(place_sample(x, y, level), weight);
      }
      // A group as large as a warp may have more lanes than there are samples.
      const int count = Group < 32 ? Group : min(Group, g.samples - base);
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const Corners<A> corners = from_lane<Group>(own, j);
        if (corners.token < 0) continue;
        const T* top_left = step(features, corners.token, g.token_bytes);
        const T* bottom_left = step(top_left, corners.down_step, g.token_bytes);
        const auto row_0 = load_pack<Vector>(top_left);
        const auto row_1 = load_pack<Vector>(step(top_left, corners.right_step, g.token_bytes));
        const auto row_2 = load_pack<Vector>(bottom_left);
        const auto row_3 = load_pack<Vector>(step(bottom_left, corners.right_step, g.token_bytes));
        add_row(sums, corners.weight[0], row_0);
        add_row(sums, corners.weight[1], row_1);
        add_row(sums, corners.weight[2], row_2);
        add_row(sums, corners.weight[3], row_3);
      }
    }
    const A scale = sampler.kFused ? A(1) / group_sum<Group>(sum_of_weights) : A(1);
    if (place.active && covers) {
      Pack<T, Vector> result;
#pragma unroll
      for (int k = 0; k < Vector; ++k) result.element[k] = static_cast<T>(sums[k] * scale);
      *reinterpret_cast<Pack<T, Vector>*>(target + channel) = result;
    }
  }
}

}  // namespace

template <typename T, Form kForm>
void launch_forward(const Inputs<T, kForm>& in, T* output, bool vectors, cudaStream_t stream) {
  const Geometry& g = in.geometry;
  constexpr int kWidest = sizeof(T) <= 4 ? forward_vector(sizeof(T)) : 1;
  choose_group<T, kWidest>(g.channels, vectors, [&](auto vector, auto group) {
    constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
    launch(forward_kernel<T, kForm, kVector, kGroup>, in.grid, threads_per_block<kGroup>(g),
           g.samples * sizeof(SampleLevel), stream, in, output);
  });
}

#define MASKDINO_INSTANTIATE(T, form) \
  template void launch_forward<T, form>(const Inputs<T, form>&, T*, bool, cudaStream_t);
MASKDINO_FOR_EACH_KERNEL(MASKDINO_INSTANTIATE)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
