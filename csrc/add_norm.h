// LayerNorm of sums, for the CPU and for CUDA: what a call is given, checked once, and PyTorch's
// operators, where no kernel serves.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"

namespace maskdino {

// Dense tensors of a call; the update is in the type in which products are computed.
struct NormCall {
  at::Tensor x, update;     // (..., C)
  at::Tensor weight, bias;  // (C,)
  at::Tensor position;      // the last dimensions of x, or undefined
  double eps;
  int64_t channels() const { return x.size(-1); }
  int64_t rows() const { return channels() == 0 ? 0 : x.numel() / channels(); }
};

inline NormCall check_add_norm(const at::Tensor& x, const at::Tensor& update,
                               const at::Tensor& weight, const at::Tensor& bias, double eps,
                               const std::optional<at::Tensor>& position) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(x.dim() > 0, "cannot norm a number");
  const int64_t channels = x.size(-1);
  NormCall call{dense_float(x, x.sizes(), x.device()),
                update.contiguous(),
                dense_float(weight, {channels}, x.device()),
                dense_float(bias, {channels}, x.device()),
                {},
                eps};
  TORCH_CHECK_VALUE(update.sizes() == x.sizes() && update.device() == x.device() &&
                        call.rows() <= kMost && channels <= kMost,
                    "cannot add ", update.sizes(), " to ", x.sizes());
  if (!position.has_value()) return call;
  call.position = position->contiguous();
  TORCH_CHECK_VALUE(position->device() == x.device() && position->dim() > 0 &&
                        position->dim() <= x.dim() &&
                        position->sizes() == x.sizes().slice(x.dim() - position->dim()),
                    "cannot add positions ", position->sizes(), " to ", x.sizes());
  TORCH_CHECK_TYPE(
      position->scalar_type() == at::kFloat || position->scalar_type() == update.scalar_type(),
      "positions must be float32 or as the update, got ", position->scalar_type());
  return call;
}

// LayerNorm of x + update; if wanted, in the update's type too, and with the position in that type.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> normed_outputs(const NormCall& call,
                                                                     const at::Tensor& normed,
                                                                     bool with_rounded) {
  const at::ScalarType type = call.update.scalar_type();
  const at::Tensor none = at::empty({0}, call.update.options());
  // Never the same memory twice.
  return {normed, with_rounded ? normed.to(type, false, true) : none,
          call.position.defined() ? (normed + call.position).to(type) : at::empty_like(none)};
}

}  // namespace maskdino
