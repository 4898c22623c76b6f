// Autograd of the ops on many layers. Tensors travel as one list: of its arguments, Function traces
// tensors and lists of tensors, one edge for each entry.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "adapter_list.h"
#include "op_inputs.h"
#include "redispatch.h"

namespace rasa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void append(variable_list& list, at::TensorList tensors) {
  list.insert(list.end(), tensors.begin(), tensors.end());
}

// The lists of LayerTensors, one after the other, at `first` of a list of tensors.
LayerTensors layers_at(at::TensorList tensors, size_t first, at::IntArrayRef pools,
                       size_t num_pools) {
  const size_t L = pools.size();
  const auto next = [&](size_t n) {
    first += n;
    return tensors.slice(first - n, n);
  };
  const at::TensorList A = next(L), Bt = next(L), d = next(L);
  const at::TensorList A_shared = next(num_pools), Bt_shared = next(num_pools);
  return {A, Bt, d, A_shared, Bt_shared, pools};
}

// ---------------------------------------------------------------------------------------------------------------------
// rasa_delta_weights
// ---------------------------------------------------------------------------------------------------------------------

using DeltaWeightsSignature = std::vector<Tensor>(at::TensorList, at::TensorList, at::TensorList,
                                                  at::TensorList, at::TensorList, at::IntArrayRef);

struct DeltaWeights : torch::autograd::Function<DeltaWeights> {
  static variable_list forward(AutogradContext* ctx, const at::TensorList& tensors,
                               const std::vector<int64_t>& pools) {
    static const auto op = find_op<DeltaWeightsSignature>("rasa_ext::rasa_delta_weights");
    at::AutoDispatchBelowADInplaceOrView guard;
    const size_t num_pools = (tensors.size() - 3 * pools.size()) / 2;
    const LayerTensors z = layers_at(tensors, 0, pools, num_pools);
    ctx->save_for_backward(tensors.vec());
    ctx->saved_data["pools"] = pools;
    ctx->set_materialize_grads(false);
    return op.call(z.A, z.Bt, z.d, z.A_shared, z.Bt_shared, pools);
  }

  // Small products of one layer each, in differentiable ops: a regulariser of the update needs them
  // once per step, and a second derivative comes with them.
  static variable_list backward(AutogradContext* ctx, const variable_list& deltas) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> pools = ctx->saved_data["pools"].toIntVector();
    const size_t L = pools.size(), num_pools = (saved.size() - 3 * L) / 2;
    const LayerTensors z = layers_at(saved, 0, pools, num_pools);
    variable_list grads(saved.size() + 1);  // one for pools
    const auto add = [&](size_t at, const Tensor& grad) {
      const Tensor rounded = grad.to(saved[at].scalar_type());
      grads[at] = grads[at].defined() ? at::add(grads[at], rounded) : rounded;
    };
    for (size_t i = 0; i < L; ++i) {
      const Tensor& G = deltas[i];  // (N,K)
      if (!G.defined()) continue;
      const at::ScalarType dtype = G.scalar_type();
      const Tensor d = z.d[i].to(dtype).unsqueeze(1);
      const int64_t pool = pools[i];
      const auto add_block = [&](const Tensor& A, size_t at_A, const Tensor& Bt, size_t at_Bt,
                                 const Tensor& d_block) {
        const Tensor BtG = at::mm(library_operand(Bt.to(dtype)), G);
        if (ctx->needs_input_grad(at_A)) add(at_A, at::mul(d_block, BtG));
        if (ctx->needs_input_grad(at_Bt)) {
          add(at_Bt, at::mul(d_block, at::mm(library_operand(A.to(dtype)), G.t())));
        }
        return at::mul(BtG, A.to(dtype)).sum(1);
      };
      const int64_t Rs = pool < 0 ? 0 : z.A_shared[pool].size(0);
      Tensor dd = add_block(z.A[i], i, z.Bt[i], L + i, d.slice(0, Rs));
      if (pool >= 0) {
        const Tensor dd_shared = add_block(z.A_shared[pool], 3 * L + pool, z.Bt_shared[pool],
                                           3 * L + num_pools + pool, d.slice(0, 0, Rs));
        dd = at::cat({dd_shared, dd});
      }
      if (ctx->needs_input_grad(2 * L + i)) add(2 * L + i, dd);
    }
    return grads;
  }
};

std::vector<Tensor> delta_weights(at::TensorList A, at::TensorList Bt, at::TensorList d,
                                  at::TensorList A_shared, at::TensorList Bt_shared,
                                  at::IntArrayRef pools) {
  check_lists("rasa_delta_weights", {A, Bt, d, A_shared, Bt_shared, pools});
  variable_list tensors;
  for (const at::TensorList list : {A, Bt, d, A_shared, Bt_shared}) append(tensors, list);
  return DeltaWeights::apply(at::TensorList(tensors), pools.vec());
}

// ---------------------------------------------------------------------------------------------------------------------
// rasa_grouped_linear
// ---------------------------------------------------------------------------------------------------------------------

using OptionalTensorList = c10::List<OptionalTensor>;
using GroupedLinearSignature = std::tuple<std::vector<Tensor>, std::vector<Tensor>>(
    at::TensorList, const OptionalTensorList&, const OptionalTensorList&, const OptionalTensorList&,
    at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef,
    at::ArrayRef<double>, const OptionalTensorList&);
using Lists = std::vector<Tensor>;
using GradientLists = std::tuple<Lists, Lists, Lists, Lists, Lists, Lists, Lists>;
using GroupedBackwardSignature = GradientLists(const OptionalTensorList&, at::TensorList,
                                               const OptionalTensorList&, at::TensorList,
                                               at::TensorList, at::TensorList, at::TensorList,
                                               at::TensorList, at::IntArrayRef, at::TensorList,
                                               at::ArrayRef<double>, const OptionalTensorList&,
                                               const c10::List<bool>&);

// Entries that save_for_backward can hold, and back.
void append(variable_list& list, const OptionalTensorList& tensors) {
  for (const OptionalTensor t : tensors) list.push_back(t.value_or(Tensor()));
}
OptionalTensorList optional_list(at::TensorList tensors) {
  OptionalTensorList list;
  for (const Tensor& t : tensors) list.push_back(t.defined() ? OptionalTensor(t) : std::nullopt);
  return list;
}

// tensors: x of each layer, the lists of LayerTensors, and the bases of the layers that have one.
struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static variable_list forward(AutogradContext* ctx, const at::TensorList& tensors,
                               const OptionalTensorList& weights, const OptionalTensorList& biases,
                               const std::vector<int64_t>& base_of, size_t num_pools,
                               const std::vector<int64_t>& pools, const std::vector<double>& p,
                               const OptionalTensorList& seeds) {
    static const auto op = find_op<GroupedLinearSignature>("rasa_ext::rasa_grouped_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    const size_t L = pools.size();
    const at::TensorList xs = tensors.slice(0, L);
    const LayerTensors z = layers_at(tensors, L, pools, num_pools);
    OptionalTensorList bases;
    for (const int64_t base : base_of) {
      bases.push_back(base < 0 ? std::nullopt : OptionalTensor(tensors[base]));
    }
    auto [ys, s] = op.call(xs, weights, biases, bases, z.A, z.Bt, z.d, z.A_shared, z.Bt_shared,
                           pools, p, seeds);
    variable_list saved = tensors.slice(0, 4 * L + 2 * num_pools).vec();
    append(saved, s);
    append(saved, weights);
    append(saved, seeds);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["pools"] = pools;
    ctx->saved_data["p"] = p;
    ctx->saved_data["base_of"] = base_of;
    ctx->mark_non_differentiable(s);
    ctx->set_materialize_grads(false);
    append(ys, s);
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<GroupedBackwardSignature>("rasa_ext::rasa_grouped_backward");
    const std::vector<int64_t> pools = ctx->saved_data["pools"].toIntVector();
    const std::vector<int64_t> base_of = ctx->saved_data["base_of"].toIntVector();
    const std::vector<double> p = ctx->saved_data["p"].toDoubleVector();
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList all = saved;
    const size_t L = pools.size(), num_pools = (saved.size() - 7 * L) / 2;
    const size_t num_inputs = 4 * L + 2 * num_pools;
    const at::TensorList dys = at::TensorList(grads).slice(0, L);
    const LayerTensors z = layers_at(all, L, pools, num_pools);

    // Inputs come as x, A, Bt, d, A_shared, Bt_shared; the op's gradients likewise, with g, which
    // has no input, after d.
    c10::List<bool> mask;
    std::vector<bool> wanted;
    bool any = false;
    std::vector<bool> pool_has_dy(num_pools);
    for (size_t i = 0; i < L; ++i) {
      if (dys[i].defined() && pools[i] >= 0) pool_has_dy[pools[i]] = true;
    }
    for (size_t i = 0; i < num_inputs; ++i) {
      const bool has_dy = i < 4 * L ? dys[i % L].defined() : pool_has_dy[(i - 4 * L) % num_pools];
      wanted.push_back(has_dy && ctx->needs_input_grad(i));
      mask.push_back(wanted[i]);
      any |= wanted[i];
      if (i + 1 == 4 * L) {
        for (size_t j = 0; j < L; ++j) mask.push_back(false);
      }
    }
    variable_list result(num_inputs);
    if (any) {
      auto [dx, dA, dBt, dd, g, dA_shared, dBt_shared] =
          op.call(optional_list(dys), all.slice(0, L), optional_list(all.slice(num_inputs + L, L)),
                  z.A, z.Bt, z.d, z.A_shared, z.Bt_shared, pools, all.slice(num_inputs, L), p,
                  optional_list(all.slice(num_inputs + 2 * L, L)), mask);
      variable_list computed;
      for (const Lists* list : {&dx, &dA, &dBt, &dd, &dA_shared, &dBt_shared}) {
        append(computed, *list);
      }
      for (size_t i = 0; i < num_inputs; ++i) {
        if (wanted[i]) result[i] = computed[i];
      }
    }
    for (size_t i = 0; i < L; ++i) {
      if (base_of[i] >= 0) result.push_back(dys[i]);
    }
    result.resize(result.size() + 7);  // for the arguments that are not tensors
    return result;
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> grouped_linear(
    at::TensorList xs, const OptionalTensorList& weights, const OptionalTensorList& biases,
    const OptionalTensorList& bases, at::TensorList A, at::TensorList Bt, at::TensorList d,
    at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools,
    at::ArrayRef<double> p, const OptionalTensorList& seeds) {
  constexpr const char* op = "rasa_grouped_linear";
  check_lists(op, {A, Bt, d, A_shared, Bt_shared, pools});
  check_length(op, xs, "xs", A.size());
  check_length(op, bases, "bases", A.size());
  for (const OptionalTensorList* list : {&weights, &biases}) {
    for (const OptionalTensor t : *list) {
      TORCH_CHECK(!at::GradMode::is_enabled() || !t || !t->requires_grad(), op,
                  ": weights and biases must be frozen; give the base of a layer that trains");
    }
  }
  variable_list tensors;
  for (const at::TensorList list : {xs, A, Bt, d, A_shared, Bt_shared}) append(tensors, list);
  std::vector<int64_t> base_of;
  for (const OptionalTensor base : bases) {
    const bool has_base = base && base->defined();
    base_of.push_back(has_base ? static_cast<int64_t>(tensors.size()) : -1);
    if (has_base) tensors.push_back(*base);
  }
  variable_list out = GroupedLinear::apply(at::TensorList(tensors), weights, biases, base_of,
                                           A_shared.size(), pools.vec(), p.vec(), seeds);
  const auto first_s = out.begin() + static_cast<int64_t>(xs.size());
  return {{out.begin(), first_s}, {first_s, out.end()}};
}

GradientLists grouped_backward(const OptionalTensorList& dys, at::TensorList xs,
                               const OptionalTensorList& weights, at::TensorList A,
                               at::TensorList Bt, at::TensorList d, at::TensorList A_shared,
                               at::TensorList Bt_shared, at::IntArrayRef pools, at::TensorList s,
                               at::ArrayRef<double> p, const OptionalTensorList& seeds,
                               const c10::List<bool>& output_mask) {
  static const auto op = find_op<GroupedBackwardSignature>("rasa_ext::rasa_grouped_backward");
  for (const at::TensorList list : {xs, A, Bt, d, A_shared, Bt_shared}) {
    refuse_grad("rasa_grouped_backward",
                "a gradient of the gradient is not implemented; call backward without create_graph",
                list);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(dys, xs, weights, A, Bt, d, A_shared, Bt_shared, pools, s, p, seeds, output_mask);
}

// ---------------------------------------------------------------------------------------------------------------------
// Ops that write into their arguments
// ---------------------------------------------------------------------------------------------------------------------

constexpr const char* kNoDerivative = "has no derivative; call it under torch.no_grad()";

// What was saved for a backward pass before it was written is stale afterwards; autograd sees that
// by the version.
void bump_versions(at::TensorList written) {
  for (const Tensor& t : written) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

using MergeSignature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                            at::TensorList, at::TensorList, at::IntArrayRef);

void merge(at::TensorList weights, at::TensorList A, at::TensorList Bt, at::TensorList d,
           at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools) {
  static const auto op = find_op<MergeSignature>("rasa_ext::rasa_merge_");
  for (const at::TensorList list : {weights, A, Bt, d, A_shared, Bt_shared}) {
    refuse_grad("rasa_merge_", kNoDerivative, list);
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(weights, A, Bt, d, A_shared, Bt_shared, pools);
  }
  bump_versions(weights);
}

using PoolGradientsSignature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                    at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef,
                                    at::ArrayRef<double>, const OptionalTensorList&);

void pool_gradients(at::TensorList dA_shared, at::TensorList dBt_shared, at::TensorList xs,
                    at::TensorList dys, at::TensorList g, at::TensorList s, at::TensorList d,
                    at::IntArrayRef pools, at::ArrayRef<double> p,
                    const OptionalTensorList& seeds) {
  static const auto op = find_op<PoolGradientsSignature>("rasa_ext::rasa_pool_gradients_");
  for (const at::TensorList list : {dA_shared, dBt_shared, xs, dys, g, s, d}) {
    refuse_grad("rasa_pool_gradients_", kNoDerivative, list);
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(dA_shared, dBt_shared, xs, dys, g, s, d, pools, p, seeds);
  }
  bump_versions(dA_shared);
  bump_versions(dBt_shared);
}

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, Autograd, m) {
  m.impl("rasa_delta_weights", &delta_weights);
  m.impl("rasa_merge_", &merge);
  m.impl("rasa_grouped_linear", &grouped_linear);
  m.impl("rasa_grouped_backward", &grouped_backward);
  m.impl("rasa_pool_gradients_", &pool_gradients);
}

}  // namespace rasa
