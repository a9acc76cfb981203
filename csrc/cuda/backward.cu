// Backward kernel: recomputes locations and weights, adds to the value's gradient with vector
// atomics, and reduces the gradients of a sample over the lanes of its group with shuffles.
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

// Adds `Count` numbers to neighbouring addresses, four at a time where the GPU can.
template <int Count, typename A>
__device__ __forceinline__ void atomic_add(A* target, const A (&numbers)[Count]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kFours = std::is_same<A, float>::value && Count % 4 == 0;
#else
  constexpr bool kFours = false;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int k = 0; k < Count; k += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + k),
                make_float4(numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3]));
    }
  } else {
#pragma unroll
    for (int k = 0; k < Count; ++k) atomicAdd(target + k, numbers[k]);
  }
}

// Adds fixed-point numbers: integers have one sum in whatever order they arrive.
template <int Count, typename A>
__device__ __forceinline__ void atomic_add_fixed(unsigned long long* target, double scale,
                                                 const A (&numbers)[Count]) {
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const long long fixed = __double2ll_rn(static_cast<double>(numbers[k]) * scale);
    atomicAdd(target + k, static_cast<unsigned long long>(fixed));
  }
}

template <typename A>
__device__ __forceinline__ Sample<A> from_lane(const Sample<A>& own, int lane, int group) {
  return {__shfl_sync(kWholeWarp, own.row, lane, group),
          __shfl_sync(kWholeWarp, own.corners, lane, group),
          __shfl_sync(kWholeWarp, own.fraction_x, lane, group),
          __shfl_sync(kWholeWarp, own.fraction_y, lane, group),
          __shfl_sync(kWholeWarp, own.weight, lane, group)};
}

// Gradients of one sample: of its attention weight, and of its pixel coordinates before the
// attention weight is multiplied in.
template <typename A>
struct SampleGradient {
  A weight, x, y;
};

// One lane's part, from its channels; also adds to the value's gradient at `row_at` elements.
template <int Vector, bool Deterministic, typename T, typename A>
__device__ __forceinline__ void visit_corners(const Sample<A>& s, int64_t pitch, int64_t stride,
                                              const T* features, const A (&grad)[Vector],
                                              void* grad_value, int64_t grad_at, double scale,
                                              SampleGradient<A>& sum) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (!(s.corners >> corner & 1)) continue;
    const int64_t row = s.row + (corner & 1) + (corner & 2 ? pitch : 0);
    const auto pack = *reinterpret_cast<const Pack<T, Vector>*>(features + row * stride);
    const A share = corner_weight(s, corner);
    A dot = 0;
    A addend[Vector];
#pragma unroll
    for (int k = 0; k < Vector; ++k) {
      dot += grad[k] * static_cast<A>(pack.element[k]);
      addend[k] = s.weight * share * grad[k];
    }
    if constexpr (Deterministic) {
      auto* target = static_cast<unsigned long long*>(grad_value) + grad_at + row * stride;
      atomic_add_fixed(target, scale, addend);
    } else {
      atomic_add(static_cast<A*>(grad_value) + grad_at + row * stride, addend);
    }
    sum.weight += share * dot;
    sum.x += (corner & 1 ? dot : -dot) * (corner & 2 ? s.fraction_y : A(1) - s.fraction_y);
    sum.y += (corner & 2 ? dot : -dot) * (corner & 1 ? s.fraction_x : A(1) - s.fraction_x);
  }
}

template <int Vector, typename T, typename A>
__device__ __forceinline__ void load_grad(A (&grad)[Vector], const T* source) {
  const auto pack = *reinterpret_cast<const Pack<T, Vector>*>(source);
#pragma unroll
  for (int k = 0; k < Vector; ++k) grad[k] = static_cast<A>(pack.element[k]);
}

// What all samples of one query and head share on a lane.
template <typename T>
struct HeadView {
  const T* features;       // the head's channels of token 0
  const T* grad_output;    // the head's channels of the query
  int64_t value_at;        // features, as a number of elements
  int64_t stride;          // from token to token
  int channels;
  double scale;
};

// Gradient of one sample, the same on all lanes of the group. `grad` holds the lane's channels of
// grad_output where the group's vectors cover the head, else it is filled step by step.
template <int Vector, int Group, bool Deterministic, typename T, typename A>
__device__ __forceinline__ SampleGradient<A> visit_sample(const HeadView<T>& head,
                                                          const Sample<A>& s, int64_t pitch,
                                                          int lane, A (&grad)[Vector],
                                                          void* grad_value) {
  SampleGradient<A> sum{};
  const int step = Group * Vector;
  for (int channel = lane * Vector; channel < head.channels; channel += step) {
    if constexpr (Vector == 1) load_grad(grad, head.grad_output + channel);
    visit_corners<Vector, Deterministic>(s, pitch, head.stride, head.features + channel, grad,
                                         grad_value, head.value_at + channel, head.scale, sum);
    if constexpr (Vector > 1) break;  // one step covers the head
  }
  return {group_sum<Group>(sum.weight), group_sum<Group>(sum.x), group_sum<Group>(sum.y)};
}

// Writes the gradients of the logits, and of the reference where somebody wants it.
template <typename T, bool Fused, int Group, typename A>
__device__ __forceinline__ void finish_query(const Inputs<T, Fused>& in,
                                             const Gradients<T, Fused>& gradients,
                                             const Sampler<T, Fused, Group>& sampler,
                                             const Place<A>& place, int lane, A mean,
                                             const A* weight_gradients, A (&grad_reference)[4]) {
  using Raw = typename Inputs<T, Fused>::Raw;
  const Geometry& g = in.geometry;
  mean = group_sum<Group>(mean);
#pragma unroll
  for (int k = 0; k < 4; ++k) grad_reference[k] = group_sum<Group>(grad_reference[k]);
  if (!place.active) return;
  Raw* grad_logits = gradients.points + sampler.scores_at;
  for (int i = lane; i < g.samples; i += Group) {
    grad_logits[i] = static_cast<Raw>(sampler.weight(i) * (weight_gradients[i] - mean));
  }
  if (gradients.reference == nullptr || lane != 0) return;
  A* target = gradients.reference +
              ((place.image * g.heads + place.head) * g.queries + place.query) * in.reference_size;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < in.reference_size) target[k] = grad_reference[k];
  }
}

// Writes the gradient of a sample's location or offset; adds that of the reference.
template <typename T, bool Fused, int Group, typename A>
__device__ __forceinline__ void finish_sample(const Gradients<T, Fused>& gradients,
                                              const Sampler<T, Fused, Group>& sampler, int i,
                                              const SampleLevel& level, A grad_x, A grad_y,
                                              A inverse_points, A (&grad_reference)[4]) {
  using Raw = typename Inputs<T, Fused>::Raw;
  Raw* target = gradients.points + sampler.points_at + 2 * i;
  const A normalised_x = grad_x * static_cast<A>(level.width);
  const A normalised_y = grad_y * static_cast<A>(level.height);
  if (!Fused) {
    target[0] = static_cast<Raw>(normalised_x);
    target[1] = static_cast<Raw>(normalised_y);
    return;
  }
  target[0] = static_cast<Raw>(sampler.boxes ? normalised_x * sampler.step_x : grad_x);
  target[1] = static_cast<Raw>(sampler.boxes ? normalised_y * sampler.step_y : grad_y);
  const Raw* offset = sampler.points + sampler.points_at + 2 * i;
  grad_reference[0] += normalised_x;
  grad_reference[1] += normalised_y;
  grad_reference[2] += normalised_x * static_cast<A>(offset[0]) * A(0.5) * inverse_points;
  grad_reference[3] += normalised_y * static_cast<A>(offset[1]) * A(0.5) * inverse_points;
}

template <typename T, bool Fused, int Vector, int Group, bool Deterministic>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const Inputs<T, Fused> in, const Gradients<T, Fused> gradients) {
  using A = Arithmetic<T>;
  using Raw = typename Inputs<T, Fused>::Raw;
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  fill_levels(g, levels);
  // Gradients of attention weights wait here for the softmax; every lane reads what it wrote.
  // Levels are padded to 16 bytes each sample so that this starts aligned.
  A* weight_gradients = reinterpret_cast<A*>(reinterpret_cast<char*>(levels) + 16 * g.samples) +
                        static_cast<int64_t>(threadIdx.x / Group) * g.samples;
  const int lane = threadIdx.x % Group;
  const Place<A> place = find_place<Group, A>(g);
  const Sampler<T, Fused, Group> sampler(in, place, lane);
  const int64_t stride = static_cast<int64_t>(g.heads) * g.channels;
  const int64_t value_at = place.image * g.tokens * stride + place.head * g.channels;
  const int64_t output_at =
      (place.image * g.queries + place.query) * stride + place.head * g.channels;
  const HeadView<T> head{in.value + value_at,
                                gradients.output + output_at,
                                value_at,
                                stride,
                                g.channels,
                                Deterministic ? *gradients.scale : 0.0};
  A grad[Vector];
  if constexpr (Vector > 1) load_grad(grad, head.grad_output + lane * Vector);

  A mean = 0;
  A grad_reference[4] = {};
  for (int base = 0; base < g.samples; base += Group) {
    const int own_index = base + lane;
    const bool owns = place.active && own_index < g.samples;
    Sample<A> own{};
    if (owns) {
      A x, y;
      sampler.locate(own_index, levels[own_index], x, y);
      own = place_sample(x, y, sampler.weight(own_index), levels[own_index]);
    }
    SampleGradient<A> own_gradient{};
#pragma unroll 4
    for (int j = 0; j < Group; ++j) {
      if (base + j >= g.samples) break;
      const auto gradient = visit_sample<Vector, Group, Deterministic>(
          head, from_lane(own, j, Group), levels[base + j].width, lane, grad, gradients.value);
      if (lane == j) own_gradient = gradient;
    }
    if (!owns) continue;
    finish_sample<T, Fused, Group, A>(gradients, sampler, own_index, levels[own_index],
                                      own.weight * own_gradient.x, own.weight * own_gradient.y,
                                      A(1) / static_cast<A>(g.points), grad_reference);
    if (Fused) {
      weight_gradients[own_index] = own_gradient.weight;
      mean += own.weight * own_gradient.weight;
    } else {
      gradients.scores[sampler.scores_at + own_index] = static_cast<Raw>(own_gradient.weight);
    }
  }
  if constexpr (Fused) {
    finish_query(in, gradients, sampler, place, lane, mean, weight_gradients, grad_reference);
  }
}

}  // namespace

template <typename T, bool Fused>
void launch_backward(const Inputs<T, Fused>& in, const Gradients<T, Fused>& gradients, bool vectors,
                     cudaStream_t stream) {
  const Geometry& g = in.geometry;
  choose_group<T>(g.channels, vectors, [&](auto vector, auto group) {
    constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
    const int threads = threads_per_block<kGroup>(g);
    const size_t shared =
        (16 + threads / kGroup * sizeof(Arithmetic<T>)) * static_cast<size_t>(g.samples);
    const auto kernel = gradients.scale != nullptr
                            ? backward_kernel<T, Fused, kVector, kGroup, true>
                            : backward_kernel<T, Fused, kVector, kGroup, false>;
    launch(kernel, count_blocks(g), threads, shared, stream, in, gradients);
  });
}

#define MASKDINO_INSTANTIATE(T)                                                        \
  template void launch_backward<T, false>(const Inputs<T, false>&,                     \
                                          const Gradients<T, false>&, bool, cudaStream_t); \
  template void launch_backward<T, true>(const Inputs<T, true>&, const Gradients<T, true>&, \
                                         bool, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(double)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
