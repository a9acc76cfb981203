// The operators on a CPU: prepares tensors, shares the work among torch's threads, calls kernels.
//
// Heads are processed in rounds, as many (image, head) pairs at a time as there are threads. A
// round first copies its heads out of (B, S, M, D) into rows that lie side by side, converted to
// the type of arithmetic and padded; reading D channels out of a row of M x D would use a fraction
// of the cache's sets and many more pages. The copies of a round are small enough to stay in cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "instruction_set.h"
#include "kernels.h"

namespace maskdino {
namespace cpu {
namespace {

constexpr int64_t kQueriesPerBlock = 128;

// What both forms share once their inputs are in the type of arithmetic and contiguous.
struct Inputs {
  Sizes sizes;
  at::IntArrayRef shapes;
  at::Tensor value;      // (B, S, M, D), any dtype and strides
  at::Tensor points_xy;  // locations, or offsets and logits
  at::Tensor scores;     // weights; undefined for the fused form, where logits follow the offsets
  at::Tensor reference;  // (B or 1, Q, 2 or 4); undefined for the textbook form
  bool fused() const { return !scores.defined(); }
  int64_t reference_size() const { return fused() ? reference.size(2) : 0; }
};

// Level sizes per sample, in the kernels' types.
template <typename T>
struct SampleTable {
  SampleTable(const Sizes& sizes, at::IntArrayRef shapes) {
    int64_t first = 0;
    for (int64_t level = 0; level < sizes.levels; ++level) {
      const int64_t lines_here = shapes[2 * level], columns_here = shapes[2 * level + 1];
      for (int64_t point = 0; point < sizes.points; ++point) {
        width.push_back(static_cast<T>(columns_here));
        height.push_back(static_cast<T>(lines_here));
        columns.push_back(static_cast<Integer<T>>(columns_here));
        lines.push_back(static_cast<Integer<T>>(lines_here));
        start.push_back(static_cast<Integer<T>>(first));
      }
      first += lines_here * columns_here;
    }
    const int64_t samples = padded<T>(sizes.samples());
    width.resize(samples, T(-1));
    height.resize(samples, T(-1));
    columns.resize(samples, -1);
    lines.resize(samples, -1);
    start.resize(samples, 0);
  }
  std::vector<T> width, height;
  std::vector<Integer<T>> columns, lines, start;
};

// The center of every token, (1, S, 2), computed as division so that it is rounded once.
template <typename T>
at::Tensor token_centers(const Sizes& sizes, at::IntArrayRef shapes, at::TensorOptions options) {
  at::Tensor centers = at::empty({1, sizes.tokens, 2}, options);
  T* target = centers.data_ptr<T>();
  for (int64_t level = 0; level < sizes.levels; ++level) {
    const int64_t lines = shapes[2 * level], columns = shapes[2 * level + 1];
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t column = 0; column < columns; ++column) {
        *target++ = (static_cast<T>(column) + T(0.5)) / static_cast<T>(columns);
        *target++ = (static_cast<T>(line) + T(0.5)) / static_cast<T>(lines);
      }
    }
  }
  return centers;
}

// Pointers of one (image, head) pair into the inputs, and into gradients laid out like them.
template <typename T>
HeadTask<T> make_task(const Inputs& in, const SampleTable<T>& table, int64_t pair) {
  const Sizes& z = in.sizes;
  const int64_t image = pair / z.heads, head = pair % z.heads, n = z.samples();
  HeadTask<T> task{};
  task.samples = n;
  task.points = z.points;
  task.width = table.width.data();
  task.height = table.height.data();
  task.columns = table.columns.data();
  task.lines = table.lines.data();
  task.start = table.start.data();
  task.channels = z.channels;
  task.zero_row = static_cast<Integer<T>>(z.tokens);
  task.output_stride = z.heads * z.channels;
  const T* points_xy = in.points_xy.const_data_ptr<T>();
  if (in.fused()) {
    task.points_stride = task.scores_stride = z.heads * n * 3;
    task.points_xy = points_xy + image * z.queries * task.points_stride + head * n * 2;
    task.scores = points_xy + image * z.queries * task.points_stride + z.heads * n * 2 + head * n;
    task.reference_size = in.reference.size(2);
    const int64_t reference_image = in.reference.size(0) == 1 ? 0 : image;
    task.reference =
        in.reference.const_data_ptr<T>() + reference_image * z.queries * task.reference_size;
  } else {
    task.points_stride = z.heads * n * 2;
    task.scores_stride = z.heads * n;
    task.points_xy = points_xy + image * z.queries * task.points_stride + head * n * 2;
    task.scores = in.scores.const_data_ptr<T>() + image * z.queries * task.scores_stride + head * n;
  }
  return task;
}

// The pairs [begin, begin + count) that are processed together, and the rows copied for them.
struct Round {
  int64_t begin, count;
  at::Tensor rows;  // (count, S + 1, padded D)
};

// Calls `body(round)` for all pairs, `pairs_per_round` at a time.
template <typename Body>
void for_each_round(const Inputs& in, int64_t pairs_per_round, int64_t stride, const Body& body) {
  const Sizes& z = in.sizes;
  const int64_t pairs = z.images * z.heads;
  const at::Tensor rows =
      at::zeros({pairs_per_round, z.tokens + 1, stride}, in.points_xy.options());
  for (int64_t begin = 0; begin < pairs; begin += pairs_per_round) {
    const int64_t count = std::min(pairs_per_round, pairs - begin);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (begin + i) / z.heads, head = (begin + i) % z.heads;
      rows[i]
          .narrow(0, 0, z.tokens)
          .narrow(1, 0, z.channels)
          .copy_(in.value[image].select(1, head));
    }
    body(Round{begin, count, rows});
  }
}

// Splits `count` pairs x `parts` ranges of queries among the threads; `body(pair_in_round, part,
// first query, last query, numbers, indices)`.
template <typename T, typename Body>
void in_parallel(const Sizes& z, int64_t count, int64_t parts, int64_t stride, const Body& body) {
  const int64_t queries_per_part = (z.queries + parts - 1) / parts;
  at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> numbers(scratch_numbers<T>(z.samples(), stride));
    std::vector<Integer<T>> indices(scratch_indices<T>(z.samples()));
    for (int64_t work = begin; work < end; ++work) {
      const int64_t part = work % parts;
      const int64_t first = part * queries_per_part;
      const int64_t last = std::min(first + queries_per_part, z.queries);
      if (first < last) {
        body(work / parts, part, first, last, numbers.data(), indices.data());
      }
    }
  });
}

template <typename T>
at::Tensor run_forward(const Inputs& in) {
  const Sizes& z = in.sizes;
  const auto options = in.points_xy.options();
  at::Tensor output = at::empty({z.images, z.queries, z.heads * z.channels}, options);
  if (z.empty()) return output;
  const SampleTable<T> table(z, in.shapes);
  const Kernel<T> kernel = choose_kernels<Kernels<T>>().forward;
  const int64_t pairs_per_round = std::min<int64_t>(z.images * z.heads, at::get_num_threads());
  const int64_t blocks = (z.queries + kQueriesPerBlock - 1) / kQueriesPerBlock;
  const int64_t stride = padded<T>(z.channels);
  T* const target = output.data_ptr<T>();
  for_each_round(in, pairs_per_round, stride, [&](const Round& round) {
    const T* const rows = round.rows.template const_data_ptr<T>();
    const auto work = [&](int64_t i, int64_t, int64_t first, int64_t last, T* numbers,
                          Integer<T>* indices) {
      const int64_t pair = round.begin + i;
      HeadTask<T> task = make_task<T>(in, table, pair);
      task.row_stride = stride;
      task.rows = rows + i * (z.tokens + 1) * stride;
      task.output =
          target + pair / z.heads * z.queries * task.output_stride + pair % z.heads * z.channels;
      kernel(task, first, last, numbers, indices);
    };
    in_parallel<T>(z, round.count, blocks, stride, work);
  });
  return output;
}

// The gradients in the type of arithmetic, except that of the value, which has its dtype.
struct Gradients {
  at::Tensor value;
  at::Tensor points_xy;
  at::Tensor scores;     // undefined for the fused form
  at::Tensor reference;  // (B, M, Q, 2 or 4) per head; undefined when nobody wants it
};

// Where the pair's task writes its gradients.
template <typename T>
void set_gradients(HeadTask<T>& task, const Inputs& in, const Gradients& grads,
                   const at::Tensor& grad_output, int64_t pair) {
  const Sizes& z = in.sizes;
  const int64_t image = pair / z.heads, head = pair % z.heads;
  task.grad_output =
      grad_output.const_data_ptr<T>() + image * z.queries * task.output_stride + head * z.channels;
  const T* const points_xy = in.points_xy.const_data_ptr<T>();
  task.grad_points_xy = grads.points_xy.data_ptr<T>() + (task.points_xy - points_xy);
  if (in.fused()) {
    task.grad_scores = grads.points_xy.data_ptr<T>() + (task.scores - points_xy);
  } else {
    task.grad_scores = grads.scores.data_ptr<T>() + (task.scores - in.scores.const_data_ptr<T>());
  }
  if (grads.reference.defined()) {
    task.grad_reference = grads.reference.data_ptr<T>() + pair * z.queries * task.reference_size;
  }
}

// Every (image, head) pair has gradient rows of its own, and where there are more threads than
// pairs, every part of its queries too; parts are added in order. So no addition needs an atomic,
// and a given number of threads always gives the same bits.
template <typename T>
Gradients run_backward(const Inputs& in, const at::Tensor& grad_output, bool reference_gradient) {
  const Sizes& z = in.sizes;
  const auto options = in.points_xy.options();
  Gradients grads{at::empty(in.value.sizes(), in.value.options()), at::empty_like(in.points_xy),
                  in.fused() ? at::Tensor() : at::empty_like(in.scores), at::Tensor()};
  if (reference_gradient) {
    grads.reference = at::empty({z.images, z.heads, z.queries, in.reference_size()}, options);
  }
  if (z.empty()) {
    grads.value.zero_();
    grads.points_xy.zero_();
    if (grads.scores.defined()) grads.scores.zero_();
    if (grads.reference.defined()) grads.reference.zero_();
    return grads;
  }
  const SampleTable<T> table(z, in.shapes);
  const Kernel<T> kernel = choose_kernels<Kernels<T>>().backward;
  const int64_t threads = at::get_num_threads();
  const int64_t pairs_per_round = std::min<int64_t>(z.images * z.heads, threads);
  const int64_t parts = std::clamp<int64_t>(threads / pairs_per_round, 1, z.queries);
  const int64_t stride = padded<T>(z.channels);
  const at::Tensor grad_rows = at::empty({pairs_per_round, parts, z.tokens + 1, stride}, options);
  T* const grad_rows_data = grad_rows.data_ptr<T>();
  for_each_round(in, pairs_per_round, stride, [&](const Round& round) {
    const T* const rows = round.rows.template const_data_ptr<T>();
    grad_rows.zero_();
    const auto work = [&](int64_t i, int64_t part, int64_t first, int64_t last, T* numbers,
                          Integer<T>* indices) {
      const int64_t pair = round.begin + i;
      HeadTask<T> task = make_task<T>(in, table, pair);
      set_gradients(task, in, grads, grad_output, pair);
      task.row_stride = stride;
      task.rows = rows + i * (z.tokens + 1) * stride;
      task.grad_rows = grad_rows_data + (i * parts + part) * (z.tokens + 1) * stride;
      kernel(task, first, last, numbers, indices);
    };
    in_parallel<T>(z, round.count, parts, stride, work);
    for (int64_t i = 0; i < round.count; ++i) {
      const int64_t pair = round.begin + i;
      const at::Tensor sum = parts == 1 ? grad_rows[i][0] : grad_rows[i].sum(0);
      grads.value[pair / z.heads]
          .select(1, pair % z.heads)
          .copy_(sum.narrow(0, 0, z.tokens).narrow(1, 0, z.channels));
    }
  });
  return grads;
}

Inputs textbook_inputs(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                       const at::Tensor& weights) {
  return {check_inputs(value, shapes, locations, weights),
          shapes,
          value,
          locations.contiguous(),
          weights.contiguous(),
          at::Tensor()};
}

Inputs fused_inputs(const at::Tensor& value, at::IntArrayRef shapes,
                    const at::Tensor& offsets_and_logits,
                    const std::optional<at::Tensor>& reference, int64_t num_points) {
  const Sizes sizes = check_fused_inputs(value, shapes, offsets_and_logits, reference, num_points);
  const auto type = compute_type(value);
  at::Tensor where;
  if (reference.has_value()) {
    where = reference->contiguous();
  } else {
    const auto options = value.options().dtype(type);
    where = type == at::kDouble ? token_centers<double>(sizes, shapes, options)
                                : token_centers<float>(sizes, shapes, options);
  }
  return {sizes, shapes, value, offsets_and_logits.to(type).contiguous(), at::Tensor(), where};
}

at::Tensor forward(const Inputs& in) {
  const at::Tensor output =
      compute_type(in.value) == at::kDouble ? run_forward<double>(in) : run_forward<float>(in);
  return output.to(in.value.scalar_type());
}

Gradients backward(const Inputs& in, const at::Tensor& grad_output, bool reference_gradient) {
  check_grad_output(grad_output, in.value, in.sizes);
  const auto type = compute_type(in.value);
  const at::Tensor grad = grad_output.to(type).contiguous();
  return type == at::kDouble ? run_backward<double>(in, grad, reference_gradient)
                             : run_backward<float>(in, grad, reference_gradient);
}

at::Tensor ms_deform_attn(const at::Tensor& value, at::IntArrayRef shapes,
                          const at::Tensor& locations, const at::Tensor& weights) {
  const at::NoGradGuard no_grad;
  return forward(textbook_inputs(value, shapes, locations, weights));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const at::NoGradGuard no_grad;
  const Inputs in = textbook_inputs(value, shapes, locations, weights);
  const Gradients grads = backward(in, grad_output, false);
  return {grads.value, grads.points_xy, grads.scores};
}

at::Tensor ms_deform_attn_fused(const at::Tensor& value, at::IntArrayRef shapes,
                                const at::Tensor& offsets_and_logits,
                                const std::optional<at::Tensor>& reference, int64_t num_points) {
  const at::NoGradGuard no_grad;
  return forward(fused_inputs(value, shapes, offsets_and_logits, reference, num_points));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_fused_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef shapes,
    const at::Tensor& offsets_and_logits, const std::optional<at::Tensor>& reference,
    int64_t num_points, bool reference_gradient) {
  const at::NoGradGuard no_grad;
  const Inputs in = fused_inputs(value, shapes, offsets_and_logits, reference, num_points);
  TORCH_CHECK_VALUE(!reference_gradient || reference.has_value(),
                    "reference_gradient is asked for, but there is no reference");
  const Gradients grads = backward(in, grad_output, reference_gradient);
  const at::Tensor grad_reference =
      reference_gradient ? grads.reference.sum(1) : at::empty({0}, in.reference.options());
  return {grads.value, grads.points_xy.to(value.scalar_type()), grad_reference};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskdino, CPU, m) {
  m.impl("ms_deform_attn", &ms_deform_attn);
  m.impl("ms_deform_attn_backward", &ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", &ms_deform_attn_fused);
  m.impl("ms_deform_attn_fused_backward", &ms_deform_attn_fused_backward);
}

TORCH_LIBRARY_IMPL(maskdino, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", &instruction_set_name);
}

}  // namespace cpu
}  // namespace maskdino
