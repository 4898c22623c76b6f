// Autograd of the ops on many layers. Tensors travel as one list: of its arguments, Function traces
// tensors and lists of tensors, one edge for each entry.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "layers_ops.h"

namespace rasa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

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
        const Tensor BtG = at::mm(Bt.to(dtype), G);
        if (ctx->needs_input_grad(at_A)) add(at_A, at::mul(d_block, BtG));
        if (ctx->needs_input_grad(at_Bt)) add(at_Bt, at::mul(d_block, at::mm(A.to(dtype), G.t())));
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
// Ops that write into their arguments
// ---------------------------------------------------------------------------------------------------------------------

void refuse_grad(const char* op, at::TensorList written) {
  for (const Tensor& t : written) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !t.requires_grad(), op,
                ": has no derivative; call it under torch.no_grad()");
  }
}

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
    refuse_grad("rasa_merge_", list);
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(weights, A, Bt, d, A_shared, Bt_shared, pools);
  }
  bump_versions(weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, Autograd, m) {
  m.impl("rasa_delta_weights", &delta_weights);
  m.impl("rasa_merge_", &merge);
}

}  // namespace rasa
