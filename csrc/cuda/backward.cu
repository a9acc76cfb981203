// Backward kernel: recomputes locations and weights, adds to the value's gradient with vector
// atomics, and reduces the gradients of a sample over the lanes of its group with shuffles.
#include "atomics.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

// What is added to the value's gradient.
enum class Adds { numbers, integers };

// Products of the features at a sample's corners with the gradient of the output, summed over
// channels. Those of corners outside the map mean nothing.
template <typename A>
struct Dots {
  A corner[4];
};

// Gradients of one sample: of its attention weight, and of its pixel coordinates before the
// attention weight is multiplied in.
template <typename A>
struct SampleGradient {
  A weight, x, y;
};

// What all samples of one query and head share on a lane: where the lane's first channel lies. The
// gradient of the value is laid out like the value, in other numbers.
template <typename T, Adds kAdds>
struct HeadView {
  using Number = typename std::conditional<kAdds == Adds::integers, unsigned long long,
                                           Arithmetic<T>>::type;
  const T* features;  // of token 0
  Number* grad_value;
  const T* grad_output;  // of the query
  int channels;          // of the head
  int token_bytes;
  double scale;  // of fixed-point numbers
};

// One lane's part of a sample's products, from the channels that begin `channel` after the lane's
// first; also adds to the value's gradient.
template <int Vector, Adds kAdds, typename T, typename A>
__device__ __forceinline__ void visit_corners(const HeadView<T, kAdds>& head, int channel,
                                              const Corners<A>& c, int inside,
                                              const A (&grad)[Vector], Dots<A>& dots) {
  const int tokens[4] = {c.token, c.token + c.right_step, c.token + c.down_step,
                         c.token + c.down_step + c.right_step};
  Pack<T, Vector> rows[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    rows[corner] = load_pack<Vector>(step(head.features + channel, tokens[corner], head.token_bytes));
  }
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    A numbers[Vector];
    unpack(rows[corner], numbers);
#pragma unroll
    for (int k = 0; k < Vector; ++k) dots.corner[corner] += grad[k] * numbers[k];
    if (!(inside >> corner & 1)) continue;
    A addends[Vector];
#pragma unroll
    for (int k = 0; k < Vector; ++k) addends[k] = c.weight[corner] * grad[k];
    constexpr int kRatio = sizeof(*head.grad_value) / sizeof(T);
    auto* target = step(head.grad_value + channel, tokens[corner], kRatio * head.token_bytes);
    if constexpr (kAdds == Adds::integers) {
      atomic_add_fixed(target, head.scale, addends);
    } else {
      atomic_add(target, addends);
    }
  }
}

template <typename A>
__device__ __forceinline__ SampleGradient<A> combine(const Sample<A>& s, const Dots<A>& dots) {
  A d[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) d[k] = s.inside >> k & 1 ? dots.corner[k] : A(0);
  const A top = s.left * d[0] + s.right * d[1], bottom = s.left * d[2] + s.right * d[3];
  return {s.top * top + s.bottom * bottom, s.top * (d[1] - d[0]) + s.bottom * (d[3] - d[2]),
          bottom - top};
}

template <int Vector, typename T, typename A>
__device__ __forceinline__ void load_grad(A (&grad)[Vector], const T* source) {
  unpack(load_pack<Vector>(source), grad);
}

// One lane's part of a sample's products. `grad` holds the lane's channels of grad_output where the
// group's vectors cover the head, else it is filled step by step. Bit k of `inside`: see Sample.
template <int Vector, int Group, Adds kAdds, typename T, typename A>
__device__ __forceinline__ Dots<A> visit_sample(const HeadView<T, kAdds>& head, const Corners<A>& c,
                                                int inside, int lane, A (&grad)[Vector]) {
  Dots<A> dots{};
  if (c.token < 0) return dots;
  if constexpr (Vector > 1) {
    visit_corners(head, 0, c, inside, grad, dots);
  } else {
    for (int channel = 0; lane + channel < head.channels; channel += Group) {
      load_grad(grad, head.grad_output + channel);
      visit_corners(head, channel, c, inside, grad, dots);
    }
  }
  return dots;
}

// The sum of a number over two lanes `distance` apart: of `low` for the lane whose own number lacks
// the bit `distance`, of `high` for the other.
template <int Group, typename A>
__device__ __forceinline__ A exchange(A low, A high, int distance, int lane) {
  const bool upper = lane & distance;
  return (upper ? high : low) + __shfl_xor_sync(kWholeWarp, upper ? low : high, distance, Group);
}

// Products of `Count` samples: lane k of each `Count` lanes gets what these lanes have of sample
// `first` + k. One shuffle serves several samples, where a sum of each by itself needs log2(Count).
template <int Count, int Group, typename A, typename Visit>
__device__ __forceinline__ Dots<A> visit_samples(int first, int lane, const Visit& visit) {
  if constexpr (Count == 1) {
    return visit(first);
  } else {
    constexpr int kHalf = Count / 2;
    const auto low = visit_samples<kHalf, Group, A>(first, lane, visit);
    const auto high = visit_samples<kHalf, Group, A>(first + kHalf, lane, visit);
    Dots<A> dots;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      dots.corner[k] = exchange<Group>(low.corner[k], high.corner[k], kHalf, lane);
    }
    return dots;
  }
}

// Sum over the lanes of a group whose numbers differ by multiples of `Count`.
template <int Count, int Group, typename A>
__device__ __forceinline__ A sum_across(A number) {
#pragma unroll
  for (int distance = Count; distance < Group; distance *= 2) {
    number += __shfl_xor_sync(kWholeWarp, number, distance, Group);
  }
  return number;
}

// Writes the gradients of the logits, and of the reference where somebody wants it.
template <int Group, typename T, Form kForm, typename Sampler, typename A>
__device__ __forceinline__ void finish_query(const Inputs<T, kForm>& in,
                                             const Gradients<T, kForm>& gradients,
                                             const Sampler& sampler,
                                             const Place<A>& place, int lane, A scale, A mean,
                                             const A* weight_gradients, A (&grad_reference)[4]) {
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
  const A normalised_x = grad_x * static_cast<A>(level.width);
  const A normalised_y = grad_y * static_cast<A>(level.height);
  if constexpr (kForm == Form::textbook) {
    target[0] = static_cast<Raw>(normalised_x);
    target[1] = static_cast<Raw>(normalised_y);
  } else {
    const bool in_boxes = kForm == Form::references && sampler.boxes;
    target[0] = static_cast<Raw>(in_boxes ? normalised_x * sampler.step_x : grad_x);
    target[1] = static_cast<Raw>(in_boxes ? normalised_y * sampler.step_y : grad_y);
  }
  if constexpr (kForm == Form::references) {
    const Raw* offset = sampler.points + 2 * i;
    const A half_step = A(0.5) / static_cast<A>(in.geometry.points);
    grad_reference[0] += normalised_x;
    grad_reference[1] += normalised_y;
    grad_reference[2] += normalised_x * static_cast<A>(offset[0]) * half_step;
    grad_reference[3] += normalised_y * static_cast<A>(offset[1]) * half_step;
  }
}

// Blocks of a processor that registers are spared for. A decoder has too few queries to fill it.
template <Form kForm, int Vector>
constexpr int kBlocks = Vector > 1 && kForm != Form::references ? 2 : 1;

template <typename T, Form kForm, int Vector, int Group, Adds kAdds>
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
  using Head = HeadView<T, kAdds>;
  const Head head{keep(in.value + value_at),
                  keep(static_cast<typename Head::Number*>(gradients.value) + value_at),
                  gradients.output + (place.image * g.queries + place.query) * stride + first,
                  g.channels,
                  g.token_bytes,
                  kAdds == Adds::integers ? *gradients.scale : 0.0};
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
    const Corners<A> own_corners = weigh_corners(own, own_weight);
    Dots<A> own_dots{};
    const int count = Group < 32 ? Group : min(Group, g.samples - base);
    constexpr int kTogether = Group < 4 ? Group : 4;
#pragma unroll 1
    for (int j = 0; j < count; j += kTogether) {
      auto dots = visit_samples<kTogether, Group, A>(j, lane, [&](int k) {
        const auto corners = from_lane<Group>(own_corners, k);
        const int inside = __shfl_sync(kWholeWarp, own.inside, k, Group);
        return visit_sample<Vector, Group, kAdds>(head, corners, inside, lane, grad);
      });
#pragma unroll
      for (int k = 0; k < 4; ++k) dots.corner[k] = sum_across<kTogether, Group>(dots.corner[k]);
      if (lane / kTogether == j / kTogether) own_dots = dots;
    }
    if (!owns) continue;
    const SampleGradient<A> own_gradient = combine(own, own_dots);
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
    auto kernel = backward_kernel<T, kForm, kVector, kGroup, Adds::numbers>;
    if constexpr (kVector == 1) {
      if (gradients.scale != nullptr) {
        kernel = backward_kernel<T, kForm, kVector, kGroup, Adds::integers>;
      }
    }
    launch(kernel, in.grid, threads, shared, stream, in, gradients);
  });
}

#define MASKDINO_INSTANTIATE(T, form)                                                            \
  template void launch_backward<T, form>(const Inputs<T, form>&, const Gradients<T, form>&, bool, \
                                         cudaStream_t);
MASKDINO_FOR_EACH_KERNEL(MASKDINO_INSTANTIATE)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
