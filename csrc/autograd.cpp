// Autograd: one Function per op. Forward calls the op again below the Autograd key; backward calls
// rasa_backward.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rasa_ops.h"

namespace rasa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using LinearSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&,
                                                   const OptionalTensor&, const Tensor&,
                                                   const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, double, const OptionalTensor&);
using AddSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                const Tensor&, const Tensor&, const Tensor&,
                                                const Tensor&, double, const OptionalTensor&);
using BackwardSignature = Gradients(const Tensor&, const Tensor&, const OptionalTensor&,
                                    const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, double, const OptionalTensor&,
                                    WantedMask);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

void save(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
          const Adapter& adapter, const Tensor& s, double p, const OptionalTensor& seed) {
  ctx->save_for_backward({x, weight.value_or(Tensor()), adapter.A, adapter.A_shared, adapter.Bt,
                          adapter.Bt_shared, adapter.d, s, seed.value_or(Tensor())});
  ctx->saved_data["p"] = p;
  ctx->mark_non_differentiable({s});
  ctx->set_materialize_grads(false);
}

// The gradients of x and the adapter, undefined where not wanted. edges: the position of each among
// the tensors that forward received.
std::array<Tensor, kNumWanted> backward_of_adapter(AutogradContext* ctx, const Tensor& dy,
                                                   const variable_list& saved,
                                                   const std::array<size_t, kNumWanted>& edges) {
  static const auto op = find_op<BackwardSignature>("rasa_ext::rasa_backward");
  WantedMask wanted;
  bool any = false;
  for (size_t i = 0; i < kNumWanted; ++i) any |= (wanted[i] = ctx->needs_input_grad(edges[i]));
  std::array<Tensor, kNumWanted> grads;
  if (!any) return grads;
  auto [dx, dA, dA_shared, dBt, dBt_shared, dd] =
      op.call(dy, saved[0], optional(saved[1]), saved[2], saved[3], saved[4], saved[5], saved[6],
              saved[7], ctx->saved_data["p"].toDouble(), optional(saved[8]), wanted);
  const std::array<Tensor, kNumWanted> all = {dx, dA, dA_shared, dBt, dBt_shared, dd};
  for (size_t i = 0; i < kNumWanted; ++i) {
    if (wanted[i]) grads[i] = all[i];
  }
  return grads;
}

struct RasaLinear : torch::autograd::Function<RasaLinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const Tensor& A, const Tensor& A_shared,
                               const Tensor& Bt, const Tensor& Bt_shared, const Tensor& d, double p,
                               const OptionalTensor& seed) {
    static const auto op = find_op<LinearSignature>("rasa_ext::rasa_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = op.call(x, weight, bias, A, A_shared, Bt, Bt_shared, d, p, seed);
    save(ctx, x, weight, {A, A_shared, Bt, Bt_shared, d}, s, p, seed);
    ctx->saved_data["has_bias"] = bias.has_value();
    return {y, s};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);  // one for each argument of forward
    const Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const size_t first = ctx->saved_data["has_bias"].toBool() ? 3 : 2;
    const auto g =
        backward_of_adapter(ctx, dy, saved, {0, first, first + 1, first + 2, first + 3, first + 4});
    result[0] = g[kDx];
    if (ctx->needs_input_grad(1)) result[1] = at::mm(dy.t(), saved[0]);
    if (first == 3 && ctx->needs_input_grad(2)) result[2] = dy.sum(0);
    for (size_t i = kDA; i < kNumWanted; ++i) result[2 + i] = g[i];
    return result;
  }
};

struct RasaAdd : torch::autograd::Function<RasaAdd> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& base,
                               const Tensor& A, const Tensor& A_shared, const Tensor& Bt,
                               const Tensor& Bt_shared, const Tensor& d, double p,
                               const OptionalTensor& seed) {
    static const auto op = find_op<AddSignature>("rasa_ext::rasa_add");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = op.call(x, base, A, A_shared, Bt, Bt_shared, d, p, seed);
    save(ctx, x, std::nullopt, {A, A_shared, Bt, Bt_shared, d}, s, p, seed);
    return {y, s};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const auto g = backward_of_adapter(ctx, dy, ctx->get_saved_variables(), {0, 2, 3, 4, 5, 6});
    result[0] = g[kDx];
    result[1] = dy;
    for (size_t i = kDA; i < kNumWanted; ++i) result[1 + i] = g[i];
    return result;
  }
};

std::tuple<Tensor, Tensor> rasa_linear(const Tensor& x, const Tensor& weight,
                                       const OptionalTensor& bias, const Tensor& A,
                                       const Tensor& A_shared, const Tensor& Bt,
                                       const Tensor& Bt_shared, const Tensor& d, double p,
                                       const OptionalTensor& seed) {
  const auto out = RasaLinear::apply(x, weight, bias, A, A_shared, Bt, Bt_shared, d, p, seed);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> rasa_add(const Tensor& x, const Tensor& base, const Tensor& A,
                                    const Tensor& A_shared, const Tensor& Bt,
                                    const Tensor& Bt_shared, const Tensor& d, double p,
                                    const OptionalTensor& seed) {
  const auto out = RasaAdd::apply(x, base, A, A_shared, Bt, Bt_shared, d, p, seed);
  return {out[0], out[1]};
}

// Ops without a derivative refuse to be differentiated; recording nothing would give silent zeros.
void refuse_grad(const char* op, const char* what, at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (const Tensor& t : tensors) {
    TORCH_CHECK(!t.defined() || !t.requires_grad(), op, ": ", what);
  }
}
void refuse_grad_of_list(const char* op, const char* what,
                         const c10::List<OptionalTensor>& tensors) {
  for (const OptionalTensor& t : tensors) {
    if (t) refuse_grad(op, what, *t);
  }
}

Gradients rasa_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                        const Tensor& A, const Tensor& A_shared, const Tensor& Bt,
                        const Tensor& Bt_shared, const Tensor& d, const Tensor& s, double p,
                        const OptionalTensor& seed, WantedMask wanted) {
  static const auto op = find_op<BackwardSignature>("rasa_ext::rasa_backward");
  refuse_grad("rasa_backward",
              "a gradient of the gradient is not implemented; call backward without create_graph",
              {dy, x, A, A_shared, Bt, Bt_shared, d});
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(dy, x, weight, A, A_shared, Bt, Bt_shared, d, s, p, seed, wanted);
}

using GroupedGemmSignature = std::vector<Tensor>(std::string_view, at::TensorList, at::TensorList,
                                                 at::IntArrayRef, const c10::List<OptionalTensor>&,
                                                 const c10::List<OptionalTensor>&,
                                                 const c10::List<OptionalTensor>&,
                                                 std::optional<at::ScalarType>);

std::vector<Tensor> grouped_gemm(std::string_view layout, at::TensorList A, at::TensorList B,
                                 at::IntArrayRef segments, const c10::List<OptionalTensor>& C_in,
                                 const c10::List<OptionalTensor>& scale_m,
                                 const c10::List<OptionalTensor>& scale_k,
                                 std::optional<at::ScalarType> out_dtype) {
  static const auto op = find_op<GroupedGemmSignature>("rasa_ext::grouped_gemm");
  constexpr const char* what =
      "has no derivative; use rasa_linear or rasa_add, or call it under torch.no_grad()";
  refuse_grad("grouped_gemm", what, A);
  refuse_grad("grouped_gemm", what, B);
  for (const auto* list : {&C_in, &scale_m, &scale_k})
    refuse_grad_of_list("grouped_gemm", what, *list);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(layout, A, B, segments, C_in, scale_m, scale_k, out_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, Autograd, m) {
  m.impl("rasa_linear", &rasa_linear);
  m.impl("rasa_add", &rasa_add);
  m.impl("rasa_backward", &rasa_backward);
  m.impl("grouped_gemm", &grouped_gemm);
}

}  // namespace rasa
