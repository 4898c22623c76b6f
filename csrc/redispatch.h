// What the Autograd kernels of all ops do: call the op again below, and refuse what has no
// derivative.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

namespace rasa {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Ops without a derivative refuse to be differentiated; recording nothing would give silent zeros.
inline void refuse_grad(const char* op, const char* what, at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK(!t.defined() || !t.requires_grad(), op, ": ", what);
  }
}

}  // namespace rasa
