// The operators on a GPU: prepares tensors, chooses the shape of the launch, calls kernels. Nothing
// here reads a number back from the device.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace maskdino {
namespace cuda {
namespace {

constexpr int64_t kSharedMemory = 48 * 1024;  // what a block has without asking for more
constexpr int64_t kBackwardBlocks = 512;      // a few for each processor

bool is_aligned(const at::Tensor& tensor, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Queries of a block that takes no tile, at most `most`: few, because a decoder has few queries and
// every processor should get some; still fewer where there would be less than `blocks` blocks.
int queries_without_tiles(const Sizes& sizes, int most, int lanes, int64_t blocks) {
  constexpr int64_t kWarp = 32;
  int64_t queries = std::min(most, 16);
  while (queries * lanes > kWarp &&
         (sizes.queries + queries - 1) / queries * sizes.heads * sizes.images < blocks) {
    queries /= 2;
  }
  return static_cast<int>(queries);
}

// `lanes` work on one head of one query; `number_size` is that of an arithmetic number; `blocks` is
// for queries_without_tiles().
Geometry make_geometry(const Sizes& sizes, at::IntArrayRef shapes, bool tokens_are_queries,
                       int lanes, int heads_per_block, int64_t number_size, int64_t blocks) {
  TORCH_CHECK_VALUE(sizes.levels <= kMaxLevels && sizes.samples() <= kMaxSamples,
                    "the CUDA kernels take at most ", kMaxLevels, " levels and ", kMaxSamples,
                    " samples, got ", sizes.levels, " levels of ", sizes.points, " points");
  TORCH_CHECK_VALUE(sizes.heads * sizes.channels < (1 << 27), "too many channels: ", sizes.heads,
                    " heads of ", sizes.channels);
  Geometry g{};
  g.images = sizes.images;
  g.tokens = sizes.tokens;
  g.queries = sizes.queries;
  g.heads = static_cast<int>(sizes.heads);
  g.channels = static_cast<int>(sizes.channels);
  g.levels = static_cast<int>(sizes.levels);
  g.points = static_cast<int>(sizes.points);
  g.samples = g.levels * g.points;
  // A block takes as many queries as its threads and shared memory hold: 16 bytes per sample for
  // its level, and in backward one number per sample, query and head.
  const int64_t most =
      std::min<int64_t>(kMaxThreads / lanes, (kSharedMemory / g.samples - 16) / number_size);
  int bits = 3;
  while ((heads_per_block << 2 * bits) > most) --bits;
  const int side = 1 << bits;
  g.queries_per_block =
      tokens_are_queries ? side * side : queries_without_tiles(sizes, side * side, lanes, blocks);
  g.heads_per_block = heads_per_block;
  g.tile_bits = bits;
  int64_t tiles = 0, tokens = 0;
  for (int level = 0; level < g.levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    g.height[level] = static_cast<int>(height);
    g.width[level] = static_cast<int>(width);
    g.first_token[level] = static_cast<int>(tokens);
    g.first_tile[level] = static_cast<int>(tiles);
    g.tiles_in_line[level] = static_cast<int>((width + side - 1) / side);
    tokens += height * width;
    tiles += (height + side - 1) / side * g.tiles_in_line[level];
  }
  g.first_tile[g.levels] = static_cast<int>(tiles);
  return g;
}

Grid make_grid(const Geometry& g, bool tokens_are_queries) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max(), kMostOfOthers = 65535;
  const int64_t blocks = tokens_are_queries
                             ? g.first_tile[g.levels]
                             : (g.queries + g.queries_per_block - 1) / g.queries_per_block;
  TORCH_CHECK_VALUE(g.queries <= kMost && g.heads <= kMostOfOthers && g.images <= kMostOfOthers,
                    "too much for one launch: ", g.queries, " queries, ", g.heads, " heads, ",
                    g.images, " images");
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(g.heads / g.heads_per_block),
          static_cast<unsigned>(g.images)};
}

// Tensors that keep the memory of a launch alive, contiguous.
struct Prepared {
  Sizes sizes;
  at::IntArrayRef shapes;
  at::Tensor value, points, scores, reference;  // scores and reference may be undefined
  bool fused() const { return !scores.defined(); }
};

// See launch_forward(). A query's offsets begin at a multiple of M x L x P x 3 numbers.
bool can_use_vectors(const Prepared& in) {
  const Sizes& z = in.sizes;
  const bool pairs = !in.fused() || z.heads * z.samples() % 2 == 0;
  return has_vector_kernel(z.channels, in.value.element_size()) && is_aligned(in.value) && pairs &&
         is_aligned(in.points, 2 * in.points.element_size());
}

template <typename T, Form kForm>
Inputs<T, kForm> make_inputs(const Prepared& in, int vector, int heads_per_block, int64_t blocks) {
  using Raw = typename Inputs<T, kForm>::Raw;
  const Sizes& z = in.sizes;
  Inputs<T, kForm> inputs{};
  inputs.geometry =
      make_geometry(z, in.shapes, kForm == Form::tokens, lanes_per_query(z.channels, vector),
                    heads_per_block, sizeof(Arithmetic<T>), blocks);
  inputs.geometry.token_bytes = static_cast<int>(z.heads * z.channels * sizeof(T));
  inputs.grid = make_grid(inputs.geometry, kForm == Form::tokens);
  inputs.value = in.value.const_data_ptr<T>();
  inputs.points = in.points.const_data_ptr<Raw>();
  if (kForm == Form::textbook) inputs.scores = in.scores.const_data_ptr<Raw>();
  if (in.reference.defined()) {
    inputs.reference = in.reference.const_data_ptr<Arithmetic<T>>();
    inputs.reference_size = static_cast<int>(in.reference.size(2));
  }
  return inputs;
}

template <Form kForm>
using FormConstant = std::integral_constant<Form, kForm>;

// Calls `body(T{}, form as a compile-time constant)`.
template <typename Body>
void dispatch(const Prepared& in, const Body& body) {
  const auto with_type = [&](auto number) {
    if (!in.fused()) return body(number, FormConstant<Form::textbook>{});
    if (!in.reference.defined()) return body(number, FormConstant<Form::tokens>{});
    return body(number, FormConstant<Form::references>{});
  };
  switch (in.value.scalar_type()) {
    case at::kDouble:
      return with_type(double{});
    case at::kHalf:
      return with_type(c10::Half{});
    case at::kBFloat16:
      return with_type(c10::BFloat16{});
    default:
      return with_type(float{});
  }
}

at::Tensor forward(const Prepared& in) {
  const Sizes& z = in.sizes;
  at::Tensor output = at::empty({z.images, z.queries, z.heads * z.channels}, in.value.options());
  if (z.empty()) return output;
  const bool vectors = can_use_vectors(in) && is_aligned(output);
  dispatch(in, [&](auto number, auto form) {
    using T = decltype(number);
    // Two heads of one cache line of 128 bytes go together: lanes read from different banks.
    const bool half_lines = vectors && z.channels * sizeof(T) <= 64 && z.heads % 2 == 0;
    const int vector = vectors ? forward_vector(sizeof(T)) : 1;
    const auto inputs = make_inputs<T, decltype(form)::value>(in, vector, half_lines ? 2 : 1, 0);
    launch_forward(inputs, output.data_ptr<T>(), vectors,
                   c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

struct Result {
  at::Tensor value, points, scores, reference;
};

// The power of two by which gradients of the value are multiplied to become 64-bit integers: as
// large as it can be without overflow of a sum of all contributions. One number, on the device;
// NaN or infinite where a gradient is, which then shows in the result.
at::Tensor fixed_point_scale(const Prepared& in, const at::Tensor& grad_output) {
  at::Tensor bound = grad_output.abs().amax().to(at::kDouble);
  if (!in.fused()) bound = bound * in.scores.abs().amax().to(at::kDouble);
  const double contributions = 4.0 * static_cast<double>(in.sizes.queries * in.sizes.samples());
  const double bits = 60.0 - std::ceil(std::log2(contributions));
  return at::exp2(bits - at::ceil(at::log2(bound.clamp_min(1e-200))));
}

Result backward(const Prepared& in, const at::Tensor& grad, bool reference_gradient) {
  check_grad_output(grad, in.value, in.sizes);
  const at::Tensor grad_output = grad.contiguous();
  const Sizes& z = in.sizes;
  const auto type = compute_type(in.value);
  const auto options = in.value.options().dtype(type);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  Result result{at::zeros(in.value.sizes(), options.dtype(deterministic ? at::kLong : type)),
                at::empty_like(in.points), in.fused() ? at::Tensor() : at::empty_like(in.scores),
                at::Tensor()};
  if (reference_gradient) {
    result.reference = at::empty({z.images, z.heads, z.queries, in.reference.size(2)}, options);
  }
  if (z.empty()) {
    result.value = at::zeros(in.value.sizes(), in.value.options());
    result.points.zero_();
    if (result.scores.defined()) result.scores.zero_();
    if (reference_gradient) result.reference.zero_();
    return result;
  }
  const at::Tensor scale = deterministic ? fixed_point_scale(in, grad_output) : at::Tensor();
  // Integers are added one by one, so that vectors gain little and would double what is compiled.
  const bool vectors =
      !deterministic && can_use_vectors(in) && is_aligned(grad_output) && is_aligned(result.value);
  dispatch(in, [&](auto number, auto form) {
    using T = decltype(number);
    constexpr Form kForm = decltype(form)::value;
    using Raw = typename Inputs<T, kForm>::Raw;
    const int vector = vectors ? kBackwardVector : 1;
    const auto inputs = make_inputs<T, kForm>(in, vector, 1, kBackwardBlocks);
    Gradients<T, kForm> gradients{};
    gradients.output = grad_output.const_data_ptr<T>();
    gradients.value = result.value.data_ptr();
    gradients.scale = deterministic ? scale.const_data_ptr<double>() : nullptr;
    gradients.points = result.points.data_ptr<Raw>();
    if (kForm == Form::textbook) gradients.scores = result.scores.data_ptr<Raw>();
    if (reference_gradient) gradients.reference = result.reference.data_ptr<Arithmetic<T>>();
    launch_backward(inputs, gradients, vectors, c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (deterministic) result.value = result.value.to(at::kDouble) / scale;
  result.value = result.value.to(in.value.scalar_type());
  return result;
}

Prepared prepare(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                 const at::Tensor& weights) {
  return {check_inputs(value, shapes, locations, weights),
          shapes,
          value.contiguous(),
          locations.contiguous(),
          weights.contiguous(),
          at::Tensor()};
}

Prepared prepare_fused(const at::Tensor& value, at::IntArrayRef shapes,
                       const at::Tensor& offsets_and_logits,
                       const std::optional<at::Tensor>& reference, int64_t num_points) {
  return {check_fused_inputs(value, shapes, offsets_and_logits, reference, num_points),
          shapes,
          value.contiguous(),
          offsets_and_logits.contiguous(),
          at::Tensor(),
          reference.has_value() ? reference->contiguous() : at::Tensor()};
}

at::Tensor ms_deform_attn(const at::Tensor& value, at::IntArrayRef shapes,
                          const at::Tensor& locations, const at::Tensor& weights) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(value.device());
  return forward(prepare(value, shapes, locations, weights));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(value.device());
  const Result result = backward(prepare(value, shapes, locations, weights), grad_output, false);
  return {result.value, result.points, result.scores};
}

at::Tensor ms_deform_attn_fused(const at::Tensor& value, at::IntArrayRef shapes,
                                const at::Tensor& offsets_and_logits,
                                const std::optional<at::Tensor>& reference, int64_t num_points) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(value.device());
  return forward(prepare_fused(value, shapes, offsets_and_logits, reference, num_points));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_fused_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef shapes,
    const at::Tensor& offsets_and_logits, const std::optional<at::Tensor>& reference,
    int64_t num_points, bool reference_gradient) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard device(value.device());
  TORCH_CHECK_VALUE(!reference_gradient || reference.has_value(),
                    "reference_gradient is asked for, but there is no reference");
  const Prepared in = prepare_fused(value, shapes, offsets_and_logits, reference, num_points);
  const Result result = backward(in, grad_output, reference_gradient);
  const at::Tensor grad_reference =
      reference_gradient ? result.reference.sum(1)
                         : at::empty({0}, value.options().dtype(compute_type(value)));
  return {result.value, result.points, grad_reference};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CUDA, m) {
  m.impl("ms_deform_attn", &ms_deform_attn);
  m.impl("ms_deform_attn_backward", &ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", &ms_deform_attn_fused);
  m.impl("ms_deform_attn_fused_backward", &ms_deform_attn_fused_backward);
}

}  // namespace cuda
}  // namespace maskdino
