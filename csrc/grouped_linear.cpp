// The bodies of the ops on the forward and backward of many layers at once.
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include "adapter_list.h"
#include "layers_ops.h"
#include "op_inputs.h"
#include "pool_problems.h"

namespace rasa {
namespace {

const Tensor* given(const OptionalTensor& t) { return t && t->defined() ? &*t : nullptr; }

// A group that begins with its first problem, so that no group is empty.
class LazyGroup {
 public:
  LazyGroup(ProgramBuilder& builder, Layout layout) : builder_(builder), layout_(layout) {}

  void begin() {
    if (!has_begun_) builder_.begin_group(layout_);
    has_begun_ = true;
  }
  Problem& add_problem(int64_t M, int64_t N) {
    begin();
    return builder_.add_problem(M, N);
  }

 private:
  ProgramBuilder& builder_;
  Layout layout_;
  bool has_begun_ = false;
};

// One layer of the lists, checked. N comes from its weight or, without one, from like_y (M,N): the
// base layer's output or the output's gradient.
struct Layer {
  Adapter adapter;
  Sizes sizes;
  Dropout dropout;
  Tensor x;  // row-major

  bool has_ranks() const { return sizes.M > 0 && sizes.R() > 0; }
  bool has_update() const { return has_ranks() && sizes.N > 0; }
};

Layer checked_layer(const char* op, size_t i, const LayerInputs& inputs, const LayerTensors& layers,
                    const AdapterList& adapters, const DropoutLists& dropout, const Tensor* like_y,
                    const char* like_y_name) {
  const std::string name = of_layer(op, i);
  const char* layer = name.c_str();
  const Tensor& x = inputs.xs[i];
  check_x(layer, x);
  check_like_first(layer, x, "x", inputs.xs[0]);
  check_like_first(layer, layers.A[i], "A", layers.A[0]);
  int64_t N = 0;
  if (const Tensor* weight = given(inputs.weights[i])) {
    check_dim(layer, *weight, "weight", "(N, K)", 2);
    N = weight->size(0);
    check_shape(layer, *weight, "weight", "(N, K)", {N, x.size(1)});
    check_like_x(layer, *weight, "weight", x);
  } else {
    check_dim(layer, *like_y, like_y_name, "(M, N)", 2);
    N = like_y->size(1);
  }
  if (like_y) {
    check_shape(layer, *like_y, like_y_name, "(M, N)", {x.size(0), N});
    check_like_x(layer, *like_y, like_y_name, x);
  }
  return {adapters[i], check_adapter(layer, x, N, adapters[i]),
          Dropout(layer, dropout.p[i], dropout.seeds[i], x), row_major(x)};
}

void check_lengths(const char* op, const LayerInputs& inputs, const LayerTensors& layers,
                   const DropoutLists& dropout) {
  check_length(op, inputs.xs, "xs", layers.num_layers());
  check_length(op, inputs.weights, "weights", layers.num_layers());
  check_length(op, dropout.p, "p", layers.num_layers());
  check_length(op, dropout.seeds, "seeds", layers.num_layers());
}

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>> rasa_grouped_linear_body(
    LaunchFn launch, const LayerInputs& inputs, const LayerTensors& layers,
    const DropoutLists& dropout) {
  constexpr const char* op = "rasa_grouped_linear";
  const AdapterList adapters(op, layers);
  const size_t L = layers.num_layers();
  check_lengths(op, inputs, layers, dropout);
  check_length(op, inputs.biases, "biases", L);
  check_length(op, inputs.bases, "bases", L);
  std::vector<Tensor> ys, all_s;
  if (L == 0) return {ys, all_s};
  const c10::DeviceGuard guard(inputs.xs[0].device());

  std::vector<Layer> checked;
  for (size_t i = 0; i < L; ++i) {
    const Tensor *weight = given(inputs.weights[i]), *base = given(inputs.bases[i]);
    TORCH_CHECK((weight == nullptr) != (base == nullptr), of_layer(op, i),
                ": must have a weight or a base, got ", weight ? "both" : "neither");
    TORCH_CHECK(weight || !given(inputs.biases[i]), of_layer(op, i),
                ": bias must be None without a weight");
    checked.push_back(checked_layer(op, i, inputs, layers, adapters, dropout, base, "base"));
    if (const Tensor* bias = given(inputs.biases[i])) {
      const std::string layer = of_layer(op, i);
      check_shape(layer.c_str(), *bias, "bias", "(N)", {weight->size(0)});
      check_like_x(layer.c_str(), *bias, "bias", inputs.xs[i]);
    }
  }

  ProgramBuilder builder(op, inputs.xs[0].scalar_type(), layers.A[0].scalar_type());
  const bool base_last = adds_base_last(inputs.xs[0]);
  std::vector<Tensor> C_in;
  for (size_t i = 0; i < L; ++i) {
    const Layer& layer = checked[i];
    const Sizes& z = layer.sizes;
    const Tensor* weight = given(inputs.weights[i]);
    all_s.push_back(at::empty({z.M, padded_rank(z.R())}, layer.x.options()));
    if (weight && base_last && layer.has_update()) {
      ys.push_back(at::empty({z.M, z.N}, layer.x.options()));
      C_in.push_back(bias_rows(inputs.biases[i], ys.back()));
    } else if (weight) {
      ys.push_back(at::linear(library_operand(layer.x), *weight, inputs.biases[i]).contiguous());
      C_in.push_back(ys.back());
    } else if (layer.has_update()) {
      ys.push_back(at::empty({z.M, z.N}, layer.x.options()));
      C_in.push_back(row_major(*inputs.bases[i]));
    } else {
      ys.push_back(inputs.bases[i]->clone(at::MemoryFormat::Contiguous));
      C_in.push_back(ys.back());
    }
  }
  LazyGroup shrinks(builder, Layout::kNT);  // s = [x̃·A_sharedᵀ | x̃·Aᵀ]
  for (size_t i = 0; i < L; ++i) {
    const Layer& layer = checked[i];
    if (!layer.has_ranks()) continue;
    shrinks.add_problem(layer.sizes.M, all_s[i].size(1)).C = builder.matrix(all_s[i]);
    builder.add_segment(builder.matrix(layer.x),
                        builder.stack({&layer.adapter.A_shared, &layer.adapter.A}), layer.sizes.K);
    builder.drop(layer.dropout.seed, layer.dropout.threshold);
  }
  LazyGroup expands(builder, Layout::kNN);  // y = C_in + (s∘d)·[Bt_shared ; Bt]
  for (size_t i = 0; i < L; ++i) {
    const Layer& layer = checked[i];
    if (!layer.has_update()) continue;
    Problem& expand = expands.add_problem(layer.sizes.M, layer.sizes.N);
    if (C_in[i].defined()) expand.C_in = builder.matrix(C_in[i]);
    expand.C = builder.matrix(ys[i]);
    builder
        .add_segment(builder.matrix(all_s[i]),
                     builder.stack({&layer.adapter.Bt_shared, &layer.adapter.Bt}), all_s[i].size(1))
        .scale_k = data(layer.adapter.d);
  }
  launch(builder.program());
  for (size_t i = 0; i < L; ++i) {
    const Tensor* weight = given(inputs.weights[i]);
    if (weight && base_last && checked[i].has_update()) ys[i].addmm_(checked[i].x, weight->t());
  }
  return {ys, all_s};
}

GroupedGradients rasa_grouped_backward_body(LaunchFn launch, const std::vector<OptionalTensor>& dys,
                                            const LayerInputs& inputs, const LayerTensors& layers,
                                            at::TensorList s, const DropoutLists& dropout,
                                            const std::vector<bool>& wanted) {
  constexpr const char* op = "rasa_grouped_backward";
  const AdapterList adapters(op, layers);
  const size_t L = layers.num_layers(), num_pools = layers.num_pools();
  check_lengths(op, inputs, layers, dropout);
  check_length(op, dys, "dys", L);
  check_length(op, s, "s", L);
  TORCH_CHECK(wanted.size() == num_gradients(L, num_pools), op,
              ": output_mask must have 5 entries for each layer and 2 for each pool = ",
              num_gradients(L, num_pools), ", got ", wanted.size());
  GroupedGradients grads;
  if (L == 0) return grads;
  const c10::DeviceGuard guard(inputs.xs[0].device());
  // Backward runs in the dtypes of forward, whatever autocast is active around it.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

  const auto wants = [&](size_t list, size_t i) { return wanted[list * L + i]; };
  const auto wants_pool = [&](size_t list, size_t pool) {
    return pool < num_pools && wanted[5 * L + list * num_pools + pool];
  };
  const bool base_last = adds_base_last(inputs.xs[0]);
  // A layer without dy contributes nothing, and none of its gradients may be asked for.
  std::vector<Layer> checked;
  std::vector<Tensor> dy_rows, s_rows;
  for (size_t i = 0; i < L; ++i) {
    const Tensor* dy = given(dys[i]);
    const std::string layer = of_layer(op, i);
    for (size_t list = 0; list < 5 && !dy; ++list) {
      TORCH_CHECK(!wants(list, i), layer, ": dy must be given for a gradient, got None");
    }
    const Tensor like_y =
        dy ? *dy : at::empty({inputs.xs[i].size(0), layers.Bt[i].size(1)}, inputs.xs[i].options());
    checked.push_back(checked_layer(op, i, inputs, layers, adapters, dropout, &like_y, "dy"));
    const Sizes& z = checked.back().sizes;
    check_shape(layer.c_str(), s[i], "s", "(M, round_up(R, 8))", {z.M, padded_rank(z.R())});
    check_like_x(layer.c_str(), s[i], "s", inputs.xs[i]);
    dy_rows.push_back(dy ? row_major(*dy) : Tensor());
    s_rows.push_back(row_major(s[i]));
  }

  // An operator returns tensors: what was not asked for is an empty one.
  const auto grad_of = [&](bool is_wanted, const Tensor& t) {
    return is_wanted ? at::empty(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  std::vector<PoolProblems> pools;
  for (size_t pool = 0; pool < num_pools; ++pool) {
    grads.dA_shared.push_back(grad_of(wants_pool(0, pool), layers.A_shared[pool]));
    grads.dBt_shared.push_back(grad_of(wants_pool(1, pool), layers.Bt_shared[pool]));
    bool has_layer = false;
    for (size_t i = 0; i < L; ++i) {
      has_layer |= layers.pools[i] == static_cast<int64_t>(pool) && given(dys[i]);
    }
    if (!has_layer) {
      grads.dA_shared[pool].zero_();
      grads.dBt_shared[pool].zero_();
    }
    pools.emplace_back(wants_pool(0, pool) ? grads.dA_shared[pool] : Tensor(),
                       wants_pool(1, pool) ? grads.dBt_shared[pool] : Tensor(), false);
  }

  ProgramBuilder builder(op, inputs.xs[0].scalar_type(), layers.A[0].scalar_type());
  LazyGroup shrinks(builder, Layout::kNT);  // g = dy·[Bt_shared ; Bt]ᵀ
  for (size_t i = 0; i < L; ++i) {
    const Layer& layer = checked[i];
    const Sizes& z = layer.sizes;
    const size_t pool = layers.pools[i] < 0 ? num_pools : layers.pools[i];
    const bool needs_g = given(dys[i]) && (wants(0, i) || wants(1, i) || wants(3, i) ||
                                           wants(4, i) || wants_pool(0, pool));
    grads.g.push_back(at::empty({needs_g ? z.M : 0, padded_rank(z.R())}, layer.x.options()));
    if (!needs_g || z.M == 0 || z.R() == 0) continue;
    shrinks.add_problem(z.M, grads.g[i].size(1)).C = builder.matrix(grads.g[i]);
    builder.add_segment(builder.matrix(dy_rows[i]),
                        builder.stack({&layer.adapter.Bt_shared, &layer.adapter.Bt}), z.N);
  }
  LazyGroup expands(builder, Layout::kNN);  // dx = dy·W + (g∘d)·[A_shared ; A], masked
  for (size_t i = 0; i < L; ++i) {
    const Layer& layer = checked[i];
    const Sizes& z = layer.sizes;
    if (!wants(0, i)) {
      grads.dx.push_back(at::empty({0}, layer.x.options()));
      continue;
    }
    const Tensor* weight = given(inputs.weights[i]);
    const bool base_first = weight && !(base_last && z.R() > 0);
    grads.dx.push_back(base_first   ? at::mm(library_operand(dy_rows[i]), *weight)
                       : z.R() == 0 ? at::zeros({z.M, z.K}, layer.x.options())
                                    : at::empty({z.M, z.K}, layer.x.options()));
    if (z.M == 0 || z.K == 0 || z.R() == 0) continue;
    Problem& expand = expands.add_problem(z.M, z.K);
    expand.C = builder.matrix(grads.dx[i]);
    if (base_first) expand.C_in = expand.C;
    builder
        .add_segment(builder.matrix(grads.g[i]),
                     builder.stack({&layer.adapter.A_shared, &layer.adapter.A}), grads.g[i].size(1))
        .scale_k = data(layer.adapter.d);
    builder.drop(layer.dropout.seed, layer.dropout.threshold);
  }

  LazyGroup wgrads(builder, Layout::kTN);
  for (size_t i = 0; i < L; ++i) {
    const Layer& layer = checked[i];
    const Sizes& z = layer.sizes;
    const Adapter& adapter = layer.adapter;
    grads.dA.push_back(grad_of(wants(1, i), adapter.A));
    grads.dBt.push_back(grad_of(wants(2, i), adapter.Bt));
    grads.dd.push_back(grad_of(wants(3, i), adapter.d));
    const Tensor& g = grads.g[i];
    const Tensor d_private = adapter.d.slice(0, z.Rs);
    const auto add_wgrad = [&](const Tensor& grad, const Tensor& ranks, const Tensor& features) {
      wgrads.add_problem(grad.size(0), grad.size(1)).C = builder.matrix(grad);
      builder.add_segment(builder.columns(ranks, z.Rs), builder.matrix(features), z.M).scale_m =
          data(d_private);
    };
    if (wants(1, i) && z.Rp > 0) {  // dA = d ∘rows gᵀ·x̃
      add_wgrad(grads.dA[i], g, layer.x);
      builder.drop(layer.dropout.seed, layer.dropout.threshold);
    }
    if (wants(2, i) && z.Rp > 0) add_wgrad(grads.dBt[i], s_rows[i], dy_rows[i]);
    if (wants(3, i) && z.R() > 0) {
      wgrads.begin();
      builder.add_diagonal(grads.dd[i], builder.matrix(g), builder.matrix(s_rows[i]), z.M);
    }
    if (layers.pools[i] >= 0 && given(dys[i])) {
      pools[layers.pools[i]].add(
          {layer.x, dy_rows[i], g, s_rows[i], data(adapter.d), layer.dropout});
    }
  }
  for (const PoolProblems& pool : pools) {
    if (!pool.has_problems()) continue;
    wgrads.begin();
    pool.build(builder, 0);
  }
  PoolProblems::build_further_rounds(builder, pools);
  launch(builder.program());
  for (size_t i = 0; base_last && i < L; ++i) {
    const Tensor* weight = given(inputs.weights[i]);
    if (wants(0, i) && weight && checked[i].sizes.R() > 0) {
      grads.dx[i].addmm_(dy_rows[i], *weight);
    }
  }
  return grads;
}

void rasa_pool_gradients_body(LaunchFn launch, at::TensorList dA_shared, at::TensorList dBt_shared,
                              const PoolContributions& layers, const DropoutLists& dropout) {
  constexpr const char* op = "rasa_pool_gradients_";
  const size_t L = layers.xs.size();
  check_length(op, layers.dys, "dys", L);
  check_length(op, layers.g, "g", L);
  check_length(op, layers.s, "s", L);
  check_length(op, layers.d, "d", L);
  check_length(op, layers.pools, "pools", L);
  check_length(op, dropout.p, "p", L);
  check_length(op, dropout.seeds, "seeds", L);
  TORCH_CHECK(dA_shared.size() == dBt_shared.size(), op,
              ": dBt_shared must have one entry for each pool = ", dA_shared.size(), ", got ",
              dBt_shared.size());
  if (L == 0) return;
  const Tensor &x0 = layers.xs[0], &d0 = layers.d[0];
  const c10::DeviceGuard guard(x0.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

  std::vector<PoolProblems> pools;
  for (size_t pool = 0; pool < dA_shared.size(); ++pool) {
    for (const Tensor* grad : {&dA_shared[pool], &dBt_shared[pool]}) {
      grad->mutable_data_ptr();  // of its own, should it share memory lazily
      const char* name = grad == &dA_shared[pool] ? "dA_shared" : "dBt_shared";
      check_dim(op, *grad, name, "(Rs, features)", 2);
      check_dtype(op, *grad, name, d0.scalar_type(), "d's");
      check_device(op, *grad, name, x0);
      TORCH_CHECK(is_row_major(*grad), op, ": ", name, " must be row-major, got strides ",
                  grad->strides());
    }
    pools.emplace_back(dA_shared[pool], dBt_shared[pool], true);
  }
  for (size_t i = 0; i < L; ++i) {
    const std::string name = of_layer(op, i);
    const char* layer = name.c_str();
    const int64_t pool = layers.pools[i];
    TORCH_CHECK(pool >= 0 && pool < static_cast<int64_t>(pools.size()), layer,
                ": pools must be the index of one of ", pools.size(), " pools, got ", pool);
    const Tensor &x = layers.xs[i], &dy = layers.dys[i], &d = layers.d[i];
    check_x(layer, x);
    check_like_first(layer, x, "x", x0);
    const int64_t M = x.size(0);
    check_dim(layer, dy, "dy", "(M, N)", 2);
    check_shape(layer, dy, "dy", "(M, N)", {M, dy.size(1)});
    check_like_x(layer, dy, "dy", x);
    check_dim(layer, d, "d", "(Rs + Rp)", 1);
    check_like_first(layer, d, "d", d0);
    check_row_major(layer, d, "d");
    const int64_t R = padded_rank(d.size(0));
    check_shape(layer, layers.s[i], "s", "(M, round_up(R, 8))", {M, R});
    check_like_x(layer, layers.s[i], "s", x);
    check_shape(layer, layers.g[i], "g", "(M, round_up(R, 8))", {M, R});
    check_like_x(layer, layers.g[i], "g", x);
    if (pools[pool].wants_dA()) {
      check_shape(layer, dA_shared[pool], "dA_shared", "(Rs, K)",
                  {dA_shared[pool].size(0), x.size(1)});
    }
    if (pools[pool].wants_dBt()) {
      check_shape(layer, dBt_shared[pool], "dBt_shared", "(Rs, N)",
                  {dBt_shared[pool].size(0), dy.size(1)});
    }
    for (const at::TensorList list : {dA_shared, dBt_shared}) {
      TORCH_CHECK(list[pool].size(0) <= d.size(0), layer,
                  ": d must have at least Rs = ", list[pool].size(0), " elements, got ", d.size(0));
    }
    pools[pool].add({row_major(x), row_major(dy), row_major(layers.g[i]), row_major(layers.s[i]),
                     data(d), Dropout(layer, dropout.p[i], dropout.seeds[i], x)});
  }
  ProgramBuilder builder(op, x0.scalar_type(), d0.scalar_type());
  builder.begin_group(Layout::kTN);
  for (const PoolProblems& pool : pools) pool.build(builder, 0);
  PoolProblems::build_further_rounds(builder, pools);
  launch(builder.program());
}

}  // namespace rasa
