// The schemas of the ops on many layers, and their Meta and Autocast kernels.
#include "register_layers.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "adapter_list.h"
#include "autocast.h"

namespace rasa {

TORCH_LIBRARY_FRAGMENT(rasa_ext, m) {
  m.def(
      "rasa_delta_weights(Tensor[] A, Tensor[] Bt, Tensor[] d, Tensor[] A_shared, "
      "Tensor[] Bt_shared, int[] pools) -> Tensor[]");
  m.def(
      "rasa_merge_(Tensor(a!)[] weights, Tensor[] A, Tensor[] Bt, Tensor[] d, Tensor[] A_shared, "
      "Tensor[] Bt_shared, int[] pools) -> ()");
  m.def(
      "rasa_grouped_linear(Tensor[] xs, Tensor?[] weights, Tensor?[] biases, Tensor?[] bases, "
      "Tensor[] A, Tensor[] Bt, Tensor[] d, Tensor[] A_shared, Tensor[] Bt_shared, int[] pools, "
      "float[] p, Tensor?[] seeds) -> (Tensor[] ys, Tensor[] s)");
  m.def(
      "rasa_grouped_backward(Tensor?[] dys, Tensor[] xs, Tensor?[] weights, Tensor[] A, "
      "Tensor[] Bt, Tensor[] d, Tensor[] A_shared, Tensor[] Bt_shared, int[] pools, Tensor[] s, "
      "float[] p, Tensor?[] seeds, bool[] output_mask) -> (Tensor[] dx, Tensor[] dA, "
      "Tensor[] dBt, Tensor[] dd, Tensor[] g, Tensor[] dA_shared, Tensor[] dBt_shared)");
  m.def(
      "rasa_pool_gradients_(Tensor(a!)[] dA_shared, Tensor(b!)[] dBt_shared, Tensor[] xs, "
      "Tensor[] dys, Tensor[] g, Tensor[] s, Tensor[] d, int[] pools, float[] p, "
      "Tensor?[] seeds) -> ()");
}

namespace {

void check_adapter_devices(const char* op, const LayerTensors& layers, const Tensor& like) {
  check_devices(op, layers.A, "A", like, "the first layer");
  check_devices(op, layers.Bt, "Bt", like, "the first layer");
  check_devices(op, layers.d, "d", like, "the first layer");
  check_devices(op, layers.A_shared, "A_shared", like, "the first layer");
  check_devices(op, layers.Bt_shared, "Bt_shared", like, "the first layer");
}

std::vector<Tensor> delta_weights_meta(at::TensorList A, at::TensorList Bt, at::TensorList d,
                                       at::TensorList A_shared, at::TensorList Bt_shared,
                                       at::IntArrayRef pools) {
  check_lists("rasa_delta_weights", {A, Bt, d, A_shared, Bt_shared, pools});
  if (A.empty()) return {};
  check_adapter_devices("rasa_delta_weights", {A, Bt, d, A_shared, Bt_shared, pools}, A[0]);
  std::vector<Tensor> deltas;
  for (size_t i = 0; i < A.size(); ++i) {
    deltas.push_back(at::empty_symint({Bt[i].sym_size(1), A[i].sym_size(1)},
                                      A[i].options().dtype(delta_dtype(A[i].scalar_type()))));
  }
  return deltas;
}

void merge_meta(at::TensorList weights, at::TensorList A, at::TensorList Bt, at::TensorList d,
                at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools) {
  check_lists("rasa_merge_", {A, Bt, d, A_shared, Bt_shared, pools});
  if (A.empty()) return;
  check_devices("rasa_merge_", weights, "weight", A[0], "the first layer");
  check_adapter_devices("rasa_merge_", {A, Bt, d, A_shared, Bt_shared, pools}, A[0]);
}

Tensor empty_s(const Tensor& x, const Tensor& d) {
  return at::empty_symint({x.sym_size(0), padded_rank(d.sym_size(0))}, x.options());
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> grouped_linear_meta(
    at::TensorList xs, const OptionalTensorList& weights, const OptionalTensorList& biases,
    const OptionalTensorList& bases, at::TensorList A, at::TensorList Bt, at::TensorList d,
    at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools, at::ArrayRef<double>,
    const OptionalTensorList&) {
  constexpr const char* op = "rasa_grouped_linear";
  check_lists(op, {A, Bt, d, A_shared, Bt_shared, pools});
  check_length(op, xs, "xs", A.size());
  check_length(op, weights, "weights", A.size());
  check_length(op, bases, "bases", A.size());
  if (xs.empty()) return {};
  check_devices(op, xs, "x", xs[0], "the first x");
  check_devices(op, weights, "weight", xs[0], "the first x");
  check_devices(op, biases, "bias", xs[0], "the first x");
  check_devices(op, bases, "base", xs[0], "the first x");
  check_adapter_devices(op, {A, Bt, d, A_shared, Bt_shared, pools}, xs[0]);
  std::vector<Tensor> ys, s;
  for (size_t i = 0; i < xs.size(); ++i) {
    const OptionalTensor weight = weights[i], base = bases[i];
    const bool has_weight = weight && weight->defined();
    TORCH_CHECK(has_weight || (base && base->defined()), op, ": layer ", i,
                ": must have a weight or a base, got neither");
    const c10::SymInt N = has_weight ? weight->sym_size(0) : base->sym_size(1);
    ys.push_back(at::empty_symint({xs[i].sym_size(0), N}, xs[i].options()));
    s.push_back(empty_s(xs[i], d[i]));
  }
  return {ys, s};
}

GradientLists grouped_backward_meta(const OptionalTensorList& dys, at::TensorList xs,
                                    const OptionalTensorList&, at::TensorList A, at::TensorList Bt,
                                    at::TensorList d, at::TensorList A_shared,
                                    at::TensorList Bt_shared, at::IntArrayRef pools, at::TensorList,
                                    at::ArrayRef<double>, const OptionalTensorList&,
                                    const c10::List<bool>& output_mask) {
  constexpr const char* op = "rasa_grouped_backward";
  check_lists(op, {A, Bt, d, A_shared, Bt_shared, pools});
  const size_t L = A.size(), num_pools = A_shared.size();
  check_length(op, xs, "xs", L);
  check_length(op, dys, "dys", L);
  TORCH_CHECK(output_mask.size() == num_gradients(L, num_pools), op,
              ": output_mask must have 5 entries for each layer and 2 for each pool = ",
              num_gradients(L, num_pools), ", got ", output_mask.size());
  size_t next = 0;
  const auto grads_of = [&](at::TensorList tensors) {
    std::vector<Tensor> grads;
    for (const Tensor& t : tensors) {
      grads.push_back(output_mask[next++] ? at::empty_symint(t.sym_sizes(), t.options())
                                          : at::empty({0}, t.options()));
    }
    return grads;
  };
  GroupedGradients grads;
  grads.dx = grads_of(xs);
  grads.dA = grads_of(A);
  grads.dBt = grads_of(Bt);
  grads.dd = grads_of(d);
  for (size_t i = 0; i < L; ++i) {
    const bool pool_wants = pools[i] >= 0 && output_mask[5 * L + pools[i]];
    const OptionalTensor dy = dys[i];
    const bool needs_g = dy && (output_mask[i] || output_mask[L + i] || output_mask[3 * L + i] ||
                                output_mask[4 * L + i] || pool_wants);
    const Tensor g = empty_s(xs[i], d[i]);
    grads.g.push_back(needs_g ? g : at::empty_symint({0, g.sym_size(1)}, g.options()));
  }
  next = 5 * L;
  grads.dA_shared = grads_of(A_shared);
  grads.dBt_shared = grads_of(Bt_shared);
  return to_lists(std::move(grads));
}

void pool_gradients_meta(at::TensorList dA_shared, at::TensorList dBt_shared, at::TensorList xs,
                         at::TensorList dys, at::TensorList g, at::TensorList s, at::TensorList d,
                         at::IntArrayRef, at::ArrayRef<double>, const OptionalTensorList&) {
  constexpr const char* op = "rasa_pool_gradients_";
  if (xs.empty()) return;
  check_devices(op, dA_shared, "dA_shared", xs[0], "the first x");
  check_devices(op, dBt_shared, "dBt_shared", xs[0], "the first x");
  check_devices(op, dys, "dy", xs[0], "the first x");
  check_devices(op, g, "g", xs[0], "the first x");
  check_devices(op, s, "s", xs[0], "the first x");
  check_devices(op, d, "d", xs[0], "the first x");
}

// Activations and base weights go to the autocast dtype; the adapters keep theirs, if it is wider.
template <c10::DispatchKey autocast_key, c10::DeviceType device>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> grouped_linear_autocast(
    at::TensorList xs, const OptionalTensorList& weights, const OptionalTensorList& biases,
    const OptionalTensorList& bases, at::TensorList A, at::TensorList Bt, at::TensorList d,
    at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools,
    at::ArrayRef<double> p, const OptionalTensorList& seeds) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rasa_ext::rasa_grouped_linear", "")
                             .typed<decltype(grouped_linear_autocast<autocast_key, device>)>();
  const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
  using To = AutocastTo<device>;
  const auto cast_all = [](at::TensorList tensors, Tensor (*cast)(const Tensor&)) {
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) result.push_back(cast(t));
    return result;
  };
  const auto cast_given = [](const OptionalTensorList& tensors) {
    OptionalTensorList result;
    for (const OptionalTensor t : tensors) {
      result.push_back(t ? OptionalTensor(To::cast(*t)) : std::nullopt);
    }
    return result;
  };
  return op.call(cast_all(xs, To::cast), cast_given(weights), cast_given(biases), cast_given(bases),
                 cast_all(A, To::cast_adapter), cast_all(Bt, To::cast_adapter),
                 cast_all(d, To::cast_adapter), cast_all(A_shared, To::cast_adapter),
                 cast_all(Bt_shared, To::cast_adapter), pools, p, seeds);
}

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, AutocastCPU, m) {
  m.impl("rasa_grouped_linear", &grouped_linear_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(rasa_ext, AutocastCUDA, m) {
  m.impl("rasa_grouped_linear",
         &grouped_linear_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

TORCH_LIBRARY_IMPL(rasa_ext, Meta, m) {
  m.impl("rasa_delta_weights", &delta_weights_meta);
  m.impl("rasa_merge_", &merge_meta);
  m.impl("rasa_grouped_linear", &grouped_linear_meta);
  m.impl("rasa_grouped_backward", &grouped_backward_meta);
  m.impl("rasa_pool_gradients_", &pool_gradients_meta);
}

}  // namespace rasa
