// Autograd: one Function per op. Forward calls the op again below the Autograd key; backward calls
// rasa_backward.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rasa_ops.h"
#include "redispatch.h"

namespace rasa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensorList = c10::List<OptionalTensor>;
using LinearsSignature = std::tuple<std::vector<Tensor>, Tensor>(
    const Tensor&, at::TensorList, const OptionalTensorList&, at::TensorList, at::TensorList,
    at::TensorList, at::TensorList, at::TensorList, double, const OptionalTensor&);
using AddSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                const Tensor&, const Tensor&, const Tensor&,
                                                const Tensor&, double, const OptionalTensor&);
using BackwardSignature = std::vector<Tensor>(const OptionalTensorList&, const Tensor&,
                                              const OptionalTensorList&, at::TensorList,
                                              at::TensorList, at::TensorList, at::TensorList,
                                              at::TensorList, const Tensor&, double,
                                              const OptionalTensor&, const c10::List<bool>&);

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// What forward receives and saves is one list, so that a gradient's place in it is its tensor's: x,
// then these of each layer; then the biases that there are. Of rasa_add, base stands for weight.
enum Operand { kWeight, kA, kAShared, kBt, kBtShared, kd, kNumOperands };
size_t operand(size_t layer, size_t which) { return 1 + layer * kNumOperands + which; }

// One of the operands of every layer.
variable_list column(at::TensorList operands, Operand which) {
  variable_list result;
  for (size_t i = operand(0, which); i < operands.size(); i += kNumOperands) {
    result.push_back(operands[i]);
  }
  return result;
}

OptionalTensorList optional_column(at::TensorList operands, Operand which) {
  OptionalTensorList result;
  for (const Tensor& t : column(operands, which)) result.push_back(optional(t));
  return result;
}

void save(AutogradContext* ctx, variable_list operands, const Tensor& s, double p,
          const OptionalTensor& seed) {
  operands.push_back(s);
  operands.push_back(seed.value_or(Tensor()));
  ctx->save_for_backward(std::move(operands));
  ctx->saved_data["p"] = p;
  ctx->mark_non_differentiable({s});
  ctx->set_materialize_grads(false);
}

// The gradients of x and the adapters, each at its operand's place; undefined where not wanted.
variable_list backward_of_adapters(AutogradContext* ctx, const variable_list& dy,
                                   variable_list& saved) {
  static const auto op = find_op<BackwardSignature>("rasa_ext::rasa_backward");
  const OptionalTensor seed = optional(saved.back());
  saved.pop_back();
  const Tensor s = saved.back();
  saved.pop_back();

  variable_list result(saved.size());
  std::vector<size_t> places = {0};  // of the op's gradients
  OptionalTensorList given;
  c10::List<bool> wanted;
  wanted.push_back(ctx->needs_input_grad(0));
  bool any = ctx->needs_input_grad(0);
  for (size_t i = 0; operand(i, 0) < saved.size(); ++i) {
    given.push_back(optional(dy[i]));
    for (size_t which = kA; which < kNumOperands; ++which) {
      places.push_back(operand(i, which));
      wanted.push_back(dy[i].defined() && ctx->needs_input_grad(places.back()));
      any |= wanted.get(wanted.size() - 1);
    }
  }
  if (!any) return result;
  const auto grads = op.call(given, saved[0], optional_column(saved, kWeight), column(saved, kA),
                             column(saved, kAShared), column(saved, kBt), column(saved, kBtShared),
                             column(saved, kd), s, ctx->saved_data["p"].toDouble(), seed, wanted);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (wanted.get(i)) result[places[i]] = grads[i];
  }
  return result;
}

struct RasaLinears : torch::autograd::Function<RasaLinears> {
  // The biases are there for their edges.
  static variable_list forward(AutogradContext* ctx, at::TensorList operands, at::TensorList,
                               const OptionalTensorList& bias, double p,
                               const OptionalTensor& seed) {
    static const auto op = find_op<LinearsSignature>("rasa_ext::rasa_linears");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, s] = op.call(operands[0], column(operands, kWeight), bias, column(operands, kA),
                          column(operands, kAShared), column(operands, kBt),
                          column(operands, kBtShared), column(operands, kd), p, seed);
    save(ctx, operands.vec(), s, p, seed);
    c10::List<bool> has_bias;
    for (const OptionalTensor b : bias) has_bias.push_back(b && b->defined());
    ctx->saved_data["has_bias"] = has_bias;
    y.push_back(s);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list saved = ctx->get_saved_variables();
    variable_list result = backward_of_adapters(ctx, grads, saved);
    const c10::List<bool> has_bias = ctx->saved_data["has_bias"].toBoolList();
    for (size_t i = 0; i < has_bias.size(); ++i) {
      const Tensor& dy = grads[i];
      const size_t weight = operand(i, kWeight);
      if (dy.defined() && ctx->needs_input_grad(weight)) {
        result[weight] = at::mm(dy.t(), saved[0]);
      }
      if (!has_bias.get(i)) continue;
      const bool wanted = dy.defined() && ctx->needs_input_grad(result.size());
      result.push_back(wanted ? dy.sum(0) : Tensor());
    }
    result.resize(result.size() + 3);  // bias, p, seed
    return result;
  }
};

struct RasaAdd : torch::autograd::Function<RasaAdd> {
  static variable_list forward(AutogradContext* ctx, at::TensorList operands, double p,
                               const OptionalTensor& seed) {
    static const auto op = find_op<AddSignature>("rasa_ext::rasa_add");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto of = [&](Operand which) { return operands[operand(0, which)]; };
    auto [y, s] = op.call(operands[0], of(kWeight), of(kA), of(kAShared), of(kBt), of(kBtShared),
                          of(kd), p, seed);
    variable_list saved = operands.vec();
    saved[operand(0, kWeight)] = Tensor();  // base
    save(ctx, std::move(saved), s, p, seed);
    return {y, s};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list saved = ctx->get_saved_variables();
    variable_list result = backward_of_adapters(ctx, grads, saved);
    result[operand(0, kWeight)] = grads[0];
    result.resize(result.size() + 2);  // p, seed
    return result;
  }
};

std::tuple<std::vector<Tensor>, Tensor> rasa_linears(const Tensor& x, at::TensorList weight,
                                                     const OptionalTensorList& bias,
                                                     at::TensorList A, at::TensorList A_shared,
                                                     at::TensorList Bt, at::TensorList Bt_shared,
                                                     at::TensorList d, double p,
                                                     const OptionalTensor& seed) {
  check_linears_lists(weight.size(), bias.size(), {A, A_shared, Bt, Bt_shared, d});
  variable_list operands = {x}, biases;
  for (size_t i = 0; i < weight.size(); ++i) {
    const OptionalTensor b = bias.get(i);
    if (b && b->defined()) biases.push_back(*b);
    operands.insert(operands.end(), {weight[i], A[i], A_shared[i], Bt[i], Bt_shared[i], d[i]});
  }
  variable_list y =
      RasaLinears::apply(at::TensorList(operands), at::TensorList(biases), bias, p, seed);
  Tensor s = y.back();
  y.pop_back();
  return {std::move(y), std::move(s)};
}

std::tuple<Tensor, Tensor> rasa_add(const Tensor& x, const Tensor& base, const Tensor& A,
                                    const Tensor& A_shared, const Tensor& Bt,
                                    const Tensor& Bt_shared, const Tensor& d, double p,
                                    const OptionalTensor& seed) {
  const variable_list operands = {x, base, A, A_shared, Bt, Bt_shared, d};
  const auto out = RasaAdd::apply(at::TensorList(operands), p, seed);
  return {out[0], out[1]};
}

void refuse_grad_of_list(const char* op, const char* what, const OptionalTensorList& tensors) {
  for (const OptionalTensor& t : tensors) {
    if (t) refuse_grad(op, what, *t);
  }
}

std::vector<Tensor> rasa_backward(const OptionalTensorList& dy, const Tensor& x,
                                  const OptionalTensorList& weight, at::TensorList A,
                                  at::TensorList A_shared, at::TensorList Bt,
                                  at::TensorList Bt_shared, at::TensorList d, const Tensor& s,
                                  double p, const OptionalTensor& seed,
                                  const c10::List<bool>& wanted) {
  static const auto op = find_op<BackwardSignature>("rasa_ext::rasa_backward");
  constexpr const char* what =
      "a gradient of the gradient is not implemented; call backward without create_graph";
  refuse_grad_of_list("rasa_backward", what, dy);
  refuse_grad("rasa_backward", what, x);
  for (const at::TensorList& list : {A, A_shared, Bt, Bt_shared, d}) {
    refuse_grad("rasa_backward", what, list);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(dy, x, weight, A, A_shared, Bt, Bt_shared, d, s, p, seed, wanted);
}

using GroupedGemmSignature = std::vector<Tensor>(std::string_view, at::TensorList, at::TensorList,
                                                 at::IntArrayRef, const OptionalTensorList&,
                                                 const OptionalTensorList&,
                                                 const OptionalTensorList&,
                                                 std::optional<at::ScalarType>);

std::vector<Tensor> grouped_gemm(std::string_view layout, at::TensorList A, at::TensorList B,
                                 at::IntArrayRef segments, const OptionalTensorList& C_in,
                                 const OptionalTensorList& scale_m,
                                 const OptionalTensorList& scale_k,
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
  m.impl("rasa_linears", &rasa_linears);
  m.impl("rasa_add", &rasa_add);
  m.impl("rasa_backward", &rasa_backward);
  m.impl("grouped_gemm", &grouped_gemm);
}

}  // namespace rasa
