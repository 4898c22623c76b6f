#include "rasa_ops.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <string>

#include "op_inputs.h"
#include "program_builder.h"

namespace rasa {
namespace {

// One layer of an op call, with its place among the columns of s (in backward also of g).
struct Layer {
  size_t index;
  int64_t N, Rp, Rs;
  int64_t column = 0;

  int64_t R() const { return Rs + Rp; }
  int64_t end() const { return column + padded_rank(R()); }
};
using Layers = c10::SmallVector<Layer, 4>;

int64_t num_columns(const Layers& layers) { return layers.empty() ? 0 : layers.back().end(); }

// Layers with ranks, side by side.
void append(Layers& layers, Layer layer) {
  if (layer.R() == 0) return;
  layer.column = num_columns(layers);
  layers.push_back(layer);
}

Layer check_layer(const char* op, const Tensor& x, int64_t N, const Adapters& adapters, size_t i) {
  const Sizes z = check_adapter(
      op, x, N,
      {adapters.A[i], adapters.A_shared[i], adapters.Bt[i], adapters.Bt_shared[i], adapters.d[i]});
  check_dtype(op, adapters.A[i], "A", adapters.A[0].scalar_type(), "layer 0's");
  return {i, N, z.Rp, z.Rs};
}

// What messages begin with: a call of several layers says which of them is wrong.
std::string name_of(const char* op, size_t i, size_t num_layers) {
  return num_layers == 1 ? op : c10::str(op, ": layer ", i);
}

// The rows of all layers' weights as one matrix, where their ranks are columns of s.
Matrix stack_ranks(ProgramBuilder& builder, const Layers& layers, at::TensorList shared,
                   at::TensorList own) {
  Matrix m = builder.begin_stack(own[0].scalar_type());
  int64_t rows = 0;
  for (const Layer& z : layers) {
    builder.append_gap(m, z.column - rows);
    builder.append(m, shared[z.index]);
    builder.append(m, own[z.index]);
    rows = z.column + z.R();
  }
  return m;
}

// s = [x̃·A_sharedᵀ | x̃·Aᵀ] of all layers;  y = C_in + (s∘d)·[Bt_shared ; Bt] of each. An
// undefined C_in is zero.
void launch_forward(const char* op, LaunchFn launch, const Tensor& x, const Layers& layers,
                    const Adapters& adapters, const Dropout& dropout, const Tensor& s,
                    const std::vector<Tensor>& C_in, const std::vector<Tensor>& y) {
  if (x.size(0) == 0 || layers.empty()) return;
  ProgramBuilder builder(op, x.scalar_type(), adapters.d[0].scalar_type());
  builder.begin_group(Layout::kNT);
  Problem& shrink = builder.add_problem(x.size(0), s.size(1));
  shrink.C = builder.matrix(s);
  builder.add_segment(builder.matrix(x),
                      stack_ranks(builder, layers, adapters.A_shared, adapters.A), x.size(1));
  builder.drop(dropout.seed, dropout.threshold);

  builder.begin_group(Layout::kNN);
  for (const Layer& z : layers) {
    const size_t i = z.index;
    Problem& expand = builder.add_problem(x.size(0), z.N);
    if (C_in[i].defined()) expand.C_in = builder.matrix(C_in[i]);
    expand.C = builder.matrix(y[i]);
    builder
        .add_segment(builder.columns(s, z.column),
                     builder.stack({&adapters.Bt_shared[i], &adapters.Bt[i]}), z.end() - z.column)
        .scale_k = data(adapters.d[i]);
  }
  launch(builder.program());
}

// grads = d ∘rows ranksᵀ·features, for rows of ranks' weights.
Problem& add_wgrad(ProgramBuilder& builder, Matrix ranks, const Tensor& features, const Tensor& d,
                   int64_t rows) {
  Problem& wgrad = builder.add_problem(rows, features.size(1));
  builder.add_segment(ranks, builder.matrix(features), features.size(0)).scale_m = data(d);
  return wgrad;
}

// The d of all layers as g's columns have it, with zeros between the layers.
Tensor stack_d(const Layers& layers, at::TensorList d) {
  if (layers.size() == 1) return d[layers[0].index];
  const Tensor zeros = at::zeros({8}, d[0].options());
  std::vector<Tensor> pieces;
  for (const Layer& z : layers) {
    pieces.push_back(d[z.index]);
    pieces.push_back(zeros.narrow(0, 0, z.end() - z.column - z.R()));
  }
  return at::cat(pieces);
}

// Fills what of grads is defined; dx holds the base layers' share already, if has_base.
void launch_backward(const char* op, LaunchFn launch, const std::vector<Tensor>& dy,
                     const Tensor& x, const Layers& of_s, const Layers& of_g,
                     const Adapters& adapters, const Tensor& s, const Dropout& dropout,
                     bool has_base, const std::vector<Tensor>& grads) {
  const auto grad = [&](const Layer& z, Grad which) -> const Tensor& {
    return grads[gradient(z.index, which)];
  };
  const auto has_any = [&](std::initializer_list<Grad> which) {
    return std::any_of(of_g.begin(), of_g.end(), [&](const Layer& z) {
      return std::any_of(which.begin(), which.end(), [&](Grad w) { return grad(z, w).defined(); });
    });
  };
  const Tensor& dx = grads[0];
  const bool wants_dA = has_any({kDA, kDAShared}), wants_dBt = has_any({kDBt, kDBtShared});
  const bool wants_dd = has_any({kDd});
  ProgramBuilder builder(op, x.scalar_type(), adapters.d[0].scalar_type());
  Tensor g, d;
  if (wants_dA || wants_dd || dx.defined()) {
    g = at::empty({x.size(0), num_columns(of_g)}, x.options());
    d = stack_d(of_g, adapters.d);
    builder.begin_group(Layout::kNT);
    for (const Layer& z : of_g) {  // g = dy·[Bt_shared ; Bt]ᵀ
      builder.add_problem(x.size(0), z.end() - z.column).C = builder.columns(g, z.column);
      builder.add_segment(builder.matrix(dy[z.index]),
                          builder.stack({&adapters.Bt_shared[z.index], &adapters.Bt[z.index]}),
                          z.N);
    }
  }
  if (dx.defined()) {  // dx = Σ dy·W + (g∘d)·[A_shared ; A], masked
    builder.begin_group(Layout::kNN);
    Problem& expand = builder.add_problem(x.size(0), x.size(1));
    expand.C = builder.matrix(dx);
    if (has_base) expand.C_in = expand.C;
    builder
        .add_segment(builder.matrix(g), stack_ranks(builder, of_g, adapters.A_shared, adapters.A),
                     g.size(1))
        .scale_k = data(d);
    builder.drop(dropout.seed, dropout.threshold);
  }
  if (wants_dA || wants_dBt || wants_dd) builder.begin_group(Layout::kTN);
  if (wants_dA) {  // dA = d ∘rows gᵀ·x̃, of all layers
    const int64_t rows = of_g.back().column + of_g.back().R();
    Problem& wgrad = add_wgrad(builder, builder.matrix(g), x, d, rows);
    builder.drop(dropout.seed, dropout.threshold);
    wgrad.C = builder.begin_stack(d.scalar_type());
    int64_t next = 0;
    for (const Layer& z : of_g) {
      builder.append_gap(wgrad.C, z.column - next);
      builder.append_output(wgrad.C, grad(z, kDAShared), z.Rs);
      builder.append_output(wgrad.C, grad(z, kDA), z.Rp);
      next = z.column + z.R();
    }
  }
  for (const Layer& z : of_g) {
    const auto of_this = [&](const Layer& other) { return other.index == z.index; };
    const int64_t column = std::find_if(of_s.begin(), of_s.end(), of_this)->column;
    const Tensor &dBt = grad(z, kDBt), &dBt_shared = grad(z, kDBtShared);
    if (dBt.defined() || dBt_shared.defined()) {  // dBt = d ∘rows sᵀ·dy
      Problem& wgrad =
          add_wgrad(builder, builder.columns(s, column), dy[z.index], adapters.d[z.index], z.R());
      wgrad.C = builder.begin_stack(adapters.d[z.index].scalar_type());
      builder.append_output(wgrad.C, dBt_shared, z.Rs);
      builder.append_output(wgrad.C, dBt, z.Rp);
    }
    if (const Tensor& dd = grad(z, kDd); dd.defined()) {
      builder.add_diagonal(dd, builder.columns(g, z.column), builder.columns(s, column), x.size(0));
    }
  }
  launch(builder.program());
}

void check_layers(const char* op, size_t num_layers, const Adapters& adapters) {
  TORCH_CHECK(num_layers > 0, op, ": must be called with at least one layer");
  check_entries(op, "A", adapters.A.size(), num_layers);
  check_entries(op, "A_shared", adapters.A_shared.size(), num_layers);
  check_entries(op, "Bt", adapters.Bt.size(), num_layers);
  check_entries(op, "Bt_shared", adapters.Bt_shared.size(), num_layers);
  check_entries(op, "d", adapters.d.size(), num_layers);
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> rasa_linears_body(LaunchFn launch, const Tensor& x,
                                                          at::TensorList weight,
                                                          const std::vector<OptionalTensor>& bias,
                                                          const Adapters& adapters, double p,
                                                          const OptionalTensor& seed) {
  const size_t num_layers = weight.size();
  const char* op = num_layers == 1 ? "rasa_linear" : "rasa_linears";
  const c10::DeviceGuard guard(x.device());
  check_x(op, x);
  check_linears_lists(num_layers, bias.size(), adapters);
  Layers layers;
  for (size_t i = 0; i < num_layers; ++i) {
    const std::string name = name_of(op, i, num_layers);
    const char* layer = name.c_str();
    check_dim(layer, weight[i], "weight", "(N, K)", 2);
    const int64_t N = weight[i].size(0);
    check_shape(layer, weight[i], "weight", "(N, K)", {N, x.size(1)});
    check_like_x(layer, weight[i], "weight", x);
    if (bias[i]) {
      check_shape(layer, *bias[i], "bias", "(N)", {N});
      check_like_x(layer, *bias[i], "bias", x);
    }
    append(layers, check_layer(layer, x, N, adapters, i));
  }
  const Dropout dropout(op, p, seed, x);

  const Tensor rows = row_major(x);
  const Tensor base_rows = library_operand(rows);
  std::vector<Tensor> y(num_layers), C_in(num_layers);
  std::vector<bool> wants_base(num_layers);
  for (const Layer& z : layers) wants_base[z.index] = adds_base_last(x);
  for (size_t i = 0; i < num_layers; ++i) {
    if (wants_base[i]) {
      y[i] = at::empty({x.size(0), weight[i].size(0)}, x.options());
      C_in[i] = bias_rows(bias[i], y[i]);
    } else {
      C_in[i] = y[i] = at::linear(base_rows, weight[i], bias[i]).contiguous();
    }
  }
  const Tensor s = at::empty({x.size(0), num_columns(layers)}, x.options());
  launch_forward(op, launch, rows, layers, adapters, dropout, s, C_in, y);
  for (size_t i = 0; i < num_layers; ++i) {
    if (wants_base[i]) y[i].addmm_(base_rows, weight[i].t());
  }
  return {std::move(y), s};
}

std::tuple<Tensor, Tensor> rasa_add_body(LaunchFn launch, const Tensor& x, const Tensor& base,
                                         const Adapters& adapter, double p,
                                         const OptionalTensor& seed) {
  constexpr const char* op = "rasa_add";
  const c10::DeviceGuard guard(x.device());
  check_x(op, x);
  check_dim(op, base, "base", "(M, N)", 2);
  check_shape(op, base, "base", "(M, N)", {x.size(0), base.size(1)});
  check_like_x(op, base, "base", x);
  Layers layers;
  append(layers, check_layer(op, x, base.size(1), adapter, 0));
  const Dropout dropout(op, p, seed, x);

  const Tensor s = at::empty({x.size(0), num_columns(layers)}, x.options());
  if (layers.empty()) return {base.clone(at::MemoryFormat::Contiguous), s};
  const Tensor y = at::empty({x.size(0), base.size(1)}, x.options());
  launch_forward(op, launch, row_major(x), layers, adapter, dropout, s, {row_major(base)}, {y});
  return {y, s};
}

void check_linears_lists(size_t num_layers, size_t num_biases, const Adapters& adapters) {
  constexpr const char* op = "rasa_linears";
  check_layers(op, num_layers, adapters);
  check_entries(op, "bias", num_biases, num_layers);
}

void check_backward_lists(size_t num_layers, const Adapters& adapters, size_t num_wanted) {
  constexpr const char* op = "rasa_backward";
  check_layers(op, num_layers, adapters);
  TORCH_CHECK(num_wanted == num_gradients(num_layers), op,
              ": output_mask must have 1 + 5 * layers = ", num_gradients(num_layers),
              " entries, got ", num_wanted);
}

std::vector<Tensor> rasa_backward_body(LaunchFn launch, const std::vector<OptionalTensor>& dy,
                                       const Tensor& x, const std::vector<OptionalTensor>& weight,
                                       const Adapters& adapters, const Tensor& s, double p,
                                       const OptionalTensor& seed,
                                       const std::vector<bool>& wanted) {
  constexpr const char* op = "rasa_backward";
  const size_t num_layers = dy.size();
  const c10::DeviceGuard guard(x.device());
  // Backward runs in the dtypes of forward, whatever autocast is active around it.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_x(op, x);
  check_backward_lists(num_layers, adapters, wanted.size());
  check_entries(op, "weight", weight.size(), num_layers);
  const int64_t M = x.size(0), K = x.size(1);
  Layers of_s, of_g;  // all layers with ranks; those of them that have a dy
  std::vector<Tensor> dy_rows(num_layers);
  for (size_t i = 0; i < num_layers; ++i) {
    const std::string name = name_of(op, i, num_layers);
    const char* layer = name.c_str();
    const bool has_dy = dy[i].has_value();
    if (has_dy) check_dim(layer, *dy[i], "dy", "(M, N)", 2);
    check_dim(layer, adapters.Bt[i], "Bt", "(Rp, N)", 2);
    const int64_t N = has_dy ? dy[i]->size(1) : adapters.Bt[i].size(1);
    const Layer z = check_layer(layer, x, N, adapters, i);
    append(of_s, z);
    if (weight[i]) {
      check_shape(layer, *weight[i], "weight", "(N, K)", {N, K});
      check_like_x(layer, *weight[i], "weight", x);
    }
    if (has_dy) {
      check_shape(layer, *dy[i], "dy", "(M, N)", {M, N});
      check_like_x(layer, *dy[i], "dy", x);
      dy_rows[i] = row_major(*dy[i]);
      append(of_g, z);
    } else {
      for (size_t which = 0; which < kNumGrads; ++which) {
        TORCH_CHECK(!wanted[gradient(i, which)], layer,
                    ": output_mask must not ask for gradients of a layer without dy");
      }
    }
  }
  check_shape(op, s, "s",
              num_layers == 1 ? "(M, round_up(R, 8))" : "(M, sum of the layers' round_up(R, 8))",
              {M, num_columns(of_s)});
  check_like_x(op, s, "s", x);
  const Dropout dropout(op, p, seed, x);

  std::vector<Tensor> grads(wanted.size());
  const auto grad_of = [&](size_t i, Grad which, const Tensor& t) {
    if (wanted[gradient(i, which)]) {
      grads[gradient(i, which)] = at::empty(t.sizes(), t.options());
    }
  };
  for (size_t i = 0; i < num_layers; ++i) {
    grad_of(i, kDA, adapters.A[i]);
    grad_of(i, kDAShared, adapters.A_shared[i]);
    grad_of(i, kDBt, adapters.Bt[i]);
    grad_of(i, kDBtShared, adapters.Bt_shared[i]);
    grad_of(i, kDd, adapters.d[i]);
  }
  Tensor& dx = grads[0];
  const auto add_base = [&] {
    for (size_t i = 0; wanted[0] && i < num_layers; ++i) {
      if (!weight[i] || !dy_rows[i].defined()) continue;
      const Tensor dy_i = library_operand(dy_rows[i]);
      dx = dx.defined() ? dx.addmm_(dy_i, *weight[i]) : at::mm(dy_i, *weight[i]);
    }
  };
  const bool base_last = adds_base_last(x) && !of_g.empty();
  if (!base_last) add_base();
  const bool has_base = dx.defined();
  if (wanted[0] && !has_base) {
    dx = of_g.empty() ? at::zeros({M, K}, x.options()) : at::empty({M, K}, x.options());
  }
  if (!of_g.empty()) {
    launch_backward(op, launch, dy_rows, row_major(x), of_s, of_g, adapters, row_major(s), dropout,
                    has_base, grads);
  }
  if (base_last) add_base();
  // An operator returns tensors: what was not asked for is an empty one.
  for (Tensor& t : grads) {
    if (!t.defined()) t = at::empty({0}, x.options());
  }
  return grads;
}

}  // namespace rasa
