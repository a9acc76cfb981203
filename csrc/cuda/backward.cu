// Backward kernel: recomputes locations and weights, adds to the value's gradient with vector
// atomics, and reduces the gradients of a sample over the lanes of its group with shuffles.
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

// Adds `Count` numbers to neighboring addresses, four at a time where the GPU can.
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

template <int Group, typename A>
__device__ __forceinline__ Sample<A> from_lane(const Sample<A>& own, int lane) {
  return {__shfl_sync(kWholeWarp, own.token, lane, Group),
          __shfl_sync(kWholeWarp, own.right_step, lane, Group),
          __shfl_sync(kWholeWarp, own.down_step, lane, Group),
          __shfl_sync(kWholeWarp, own.inside, lane, Group),
          __shfl_sync(kWholeWarp, own.left, lane, Group),
          __shfl_sync(kWholeWarp, own.right, lane, Group),
          __shfl_sync(kWholeWarp, own.top, lane, Group),
          __shfl_sync(kWholeWarp, own.bottom, lane, Group)};
}

// Gradients of one sample: of its attention weight, and of its pixel coordinates before the
// attention weight is multiplied in.
template <typename A>
struct SampleGradient {
  A weight, x, y;
};

// What all samples of one query and head share on a lane: where the lane's first channel lies. The
// gradient of the value is laid out like the value, in other numbers.
template <typename T, bool Deterministic>
struct HeadView {
  using Number = typename std::conditional<Deterministic, unsigned long long, Arithmetic<T>>::type;
  const T* features;  // of token 0
  Number* grad_value;
  const T* grad_output;  // of the query
  int channels;          // of the head
  int token_bytes;
  double scale;  // of fixed-point numbers
};

// One lane's part of a sample's gradient, from the channels that begin `channel` after the lane's
// first; also adds to the value's gradient.
template <int Vector, bool Deterministic, typename T, typename A>
__device__ __forceinline__ void visit_corners(const HeadView<T, Deterministic>& head, int channel,
                                              const Sample<A>& s, A weight, const A (&grad)[Vector],
                                              SampleGradient<A>& sum) {
  const int tokens[4] = {s.token, s.token + s.right_step, s.token + s.down_step,
                         s.token + s.down_step + s.right_step};
  const A shares[4] = {s.top * s.left, s.top * s.right, s.bottom * s.left, s.bottom * s.right};
  Pack<T, Vector> rows[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    rows[corner] =
        load_pack<Vector>(step(head.features + channel, tokens[corner], head.token_bytes));
  }
  A dots[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    A numbers[Vector], addends[Vector];
    unpack(rows[corner], numbers);
    dots[corner] = 0;
#pragma unroll
    for (int k = 0; k < Vector; ++k) {
      dots[corner] += grad[k] * numbers[k];
      addends[k] = weight * shares[corner] * grad[k];
    }
    if (!(s.inside >> corner & 1)) {
      dots[corner] = 0;
      continue;
    }
    constexpr int kRatio = sizeof(*head.grad_value) / sizeof(T);
    auto* target = step(head.grad_value + channel, tokens[corner], kRatio * head.token_bytes);
    if constexpr (Deterministic) {
      atomic_add_fixed(target, head.scale, addends);
    } else {
      atomic_add(target, addends);
    }
  }
  const A top = s.left * dots[0] + s.right * dots[1], bottom = s.left * dots[2] + s.right * dots[3];
  sum.weight += s.top * top + s.bottom * bottom;
  sum.x += s.top * (dots[1] - dots[0]) + s.bottom * (dots[3] - dots[2]);
  sum.y += bottom - top;
}

template <int Vector, typename T, typename A>
__device__ __forceinline__ void load_grad(A (&grad)[Vector], const T* source) {
  unpack(load_pack<Vector>(source), grad);
}

// Gradient of one sample, the same on all lanes of the group. `grad` holds the lane's channels of
// grad_output where the group's vectors cover the head, else it is filled step by step.
template <int Vector, int Group, bool Deterministic, typename T, typename A>
__device__ __forceinline__ SampleGradient<A> visit_sample(const HeadView<T, Deterministic>& head,
                                                          const Sample<A>& s, A weight, int lane,
                                                          A (&grad)[Vector]) {
  SampleGradient<A> sum{};
  if (s.token >= 0) {
    if constexpr (Vector > 1) {
      visit_corners(head, 0, s, weight, grad, sum);
    } else {
      for (int channel = 0; lane + channel < head.channels; channel += Group) {
        load_grad(grad, head.grad_output + channel);
        visit_corners(head, channel, s, weight, grad, sum);
      }
    }
  }
  return {group_sum<Group>(sum.weight), group_sum<Group>(sum.x), group_sum<Group>(sum.y)};
}

// Writes the gradients of the logits, and of the reference where somebody wants it.
template <int Group, typename T, Form kForm, typename Sampler, typename A>
__device__ __forceinline__ void finish_query(const Inputs<T, kForm>& in,
                                             const Gradients<T, kForm>& gradients,
                                             const Sampler& sampler, const Place<A>& place,
                                             int lane, A scale, A mean, const A* weight_gradients,
                                             A (&grad_reference)[4]) {
  using Raw = typename Inputs<T, kForm>::Raw;
  const Geometry& g = in.geometry;
  mean = group_sum<Group>(mean);
  if constexpr (kForm == Form::references) {
#pragma unroll
    for (int k = 0; k < 4; ++k) grad_reference[k] = group_sum<Group>(grad_reference[k]);
  }
  if (!place.active) return;
  Raw* grad_logits = gradients.points + (sampler.scores - in.points);
  for (int i = lane; i < g.samples; i += Group) {
    grad_logits[i] = static_cast<Raw>(scale * sampler.weight(i) * (weight_gradients[i] - mean));
  }
  if (kForm != Form::references || gradients.reference == nullptr || lane != 0) return;
  A* target = gradients.reference +
              ((place.image * g.heads + place.head) * g.queries + place.query) * in.reference_size;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < in.reference_size) target[k] = grad_reference[k];
  }
}

// Writes the gradient of a sample's location or offset; adds that of the reference.
template <typename T, Form kForm, typename Sampler, typename A>
__device__ __forceinline__ void finish_sample(const Inputs<T, kForm>& in,
                                              const Gradients<T, kForm>& gradients,
                                              const Sampler& sampler, int i,
                                              const SampleLevel& level, A grad_x, A grad_y,
                                              A (&grad_reference)[4]) {
  using Raw = typename Inputs<T, kForm>::Raw;
  Raw* target = gradients.points + (sampler.points - in.points) + 2 * i;
  const A normalized_x = grad_x * static_cast<A>(level.width);
  const A normalized_y = grad_y * static_cast<A>(level.height);
  if constexpr (kForm == Form::textbook) {
    target[0] = static_cast<Raw>(normalized_x);
    target[1] = static_cast<Raw>(normalized_y);
  } else {
    const bool in_boxes = kForm == Form::references && sampler.boxes;
    target[0] = static_cast<Raw>(in_boxes ? normalized_x * sampler.step_x : grad_x);
    target[1] = static_cast<Raw>(in_boxes ? normalized_y * sampler.step_y : grad_y);
  }
  if constexpr (kForm == Form::references) {
    const Raw* offset = sampler.points + 2 * i;
    const A half_step = A(0.5) / static_cast<A>(in.geometry.points);
    grad_reference[0] += normalized_x;
    grad_reference[1] += normalized_y;
    grad_reference[2] += normalized_x * static_cast<A>(offset[0]) * half_step;
    grad_reference[3] += normalized_y * static_cast<A>(offset[1]) * half_step;
  }
}

// Blocks of a processor that registers are spared for. A decoder has too few queries to fill it.
template <Form kForm, int Vector>
constexpr int kBlocks = Vector > 1 && kForm != Form::references ? 2 : 1;

template <typename T, Form kForm, int Vector, int Group, bool Deterministic>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<kForm, Vector>)
    backward_kernel(const Inputs<T, kForm> in, const Gradients<T, kForm> gradients) {
  using A = Arithmetic<T>;
  using Raw = typename Inputs<T, kForm>::Raw;
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  fill_levels(g, levels);
  // Gradients of attention weights wait here for the softmax; every lane reads what it wrote.
  A* weight_gradients = reinterpret_cast<A*>(levels + g.samples) +
                        static_cast<int64_t>(threadIdx.x / Group) * g.samples;
  const int lane = threadIdx.x % Group;
  const Place<A> place = find_place<kForm, Group, A>(g);
  const Sampler<T, kForm, Group, (Vector > 1)> sampler(in, place, lane);
  const A scale = sampler.kFused ? sampler.inverse_sum(g.samples, lane) : A(1);
  const int stride = g.heads * g.channels;
  const int first = place.head * g.channels + (lane * Vector < g.channels ? lane * Vector : 0);
  const int64_t value_at = place.image * g.tokens * stride + first;
  using Head = HeadView<T, Deterministic>;
  const Head head{keep(in.value + value_at),
                  keep(static_cast<typename Head::Number*>(gradients.value) + value_at),
                  gradients.output + (place.image * g.queries + place.query) * stride + first,
                  g.channels,
                  g.token_bytes,
                  Deterministic ? *gradients.scale : 0.0};
  A grad[Vector];
  if constexpr (Vector > 1) load_grad(grad, head.grad_output);

  A mean = 0;
  A grad_reference[4] = {};
  for (int base = 0; base < g.samples; base += Group) {
    const int own_index = base + lane;
    const bool owns = place.active && own_index < g.samples;
    Sample<A> own{};
    own.token = -1;
    A own_weight = 0;
    if (owns) {
      A x, y;
      const SampleLevel level = levels[own_index];
      sampler.locate(own_index, level, x, y);
      own = place_sample(x, y, level);
      own_weight = scale * sampler.weight(own_index);
    }
    SampleGradient<A> own_gradient{};
    const int count = Group < 32 ? Group : min(Group, g.samples - base);
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const A weight = __shfl_sync(kWholeWarp, own_weight, j, Group);
      const auto gradient = visit_sample<Vector, Group, Deterministic>(
          head, from_lane<Group>(own, j), weight, lane, grad);
      if (lane == j) own_gradient = gradient;
    }
    if (!owns) continue;
    finish_sample(in, gradients, sampler, own_index, levels[own_index], own_weight * own_gradient.x,
                  own_weight * own_gradient.y, grad_reference);
    if constexpr (sampler.kFused) {
      weight_gradients[own_index] = own_gradient.weight;
      mean += own_weight * own_gradient.weight;
    } else {
      const int64_t scores_at = sampler.scores - in.scores;
      gradients.scores[scores_at + own_index] = static_cast<Raw>(own_gradient.weight);
    }
  }
  if constexpr (sampler.kFused) {
    finish_query<Group>(in, gradients, sampler, place, lane, scale, mean, weight_gradients,
                        grad_reference);
  }
}

}  // namespace

template <typename T, Form kForm>
void launch_backward(const Inputs<T, kForm>& in, const Gradients<T, kForm>& gradients, bool vectors,
                     cudaStream_t stream) {
  const Geometry& g = in.geometry;
  constexpr int kWidest = sizeof(T) <= 4 ? kBackwardVector : 1;
  choose_group<T, kWidest>(g.channels, vectors, [&](auto vector, auto group) {
    constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
    const int threads = threads_per_block<kGroup>(g);
    const size_t shared =
        (sizeof(SampleLevel) + threads / kGroup * sizeof(Arithmetic<T>)) * g.samples;
    auto kernel = backward_kernel<T, kForm, kVector, kGroup, false>;
    if constexpr (kVector == 1) {
      if (gradients.scale != nullptr) kernel = backward_kernel<T, kForm, kVector, kGroup, true>;
    }
    launch(kernel, in.grid, threads, shared, stream, in, gradients);
  });
}

#define MASKDINO_INSTANTIATE(T, form)                                                             \
  template void launch_backward<T, form>(const Inputs<T, form>&, const Gradients<T, form>&, bool, \
                                         cudaStream_t);
MASKDINO_FOR_EACH_KERNEL(MASKDINO_INSTANTIATE)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
