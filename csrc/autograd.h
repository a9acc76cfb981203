// What gradients of our operators share. They are in C++, because steps of training are bound by
// what the host does: in Python, autograd of one operator takes as long as several launches.
//
// No function keeps a result that has a gradient. Where what is kept is computed again, as far as
// it is needed, the result would hold the function, which would hold the result, and neither would
// ever be freed.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

namespace maskdino {

using torch::autograd::AutogradContext;
using torch::autograd::compute_requires_grad;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// An operator of this library that has the signature of a function.
template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_like(const Signature&, const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Calls an operator without its gradient.
template <typename Signature, typename... Args>
auto below(const c10::TypedOperatorHandle<Signature>& op, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Args>(args)...);
}

inline Optional given(const at::Tensor& tensor) {
  return tensor.defined() ? Optional(tensor) : Optional();
}

}  // namespace maskdino
