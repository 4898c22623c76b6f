#include "rasa_ops.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include "op_inputs.h"
#include "philox.h"
#include "program_builder.h"

namespace rasa {
namespace {

// s = [x̃·A_sharedᵀ | x̃·Aᵀ];  y = C_in + (s∘d)·[Bt_shared ; Bt]. s has padded_rank(R) columns.
void launch_forward(const char* op, LaunchFn launch, const Tensor& x, const Sizes& z,
                    const Adapter& adapter, const Dropout& dropout, const Tensor& s,
                    const Tensor& C_in, const Tensor& y) {
  ProgramBuilder builder(op, x.scalar_type(), adapter.d.scalar_type());
  builder.begin_group(Layout::kNT);
  Problem& shrink = builder.add_problem(z.M, s.size(1));
  shrink.C = builder.matrix(s);
  builder.add_segment(builder.matrix(x), builder.stack({&adapter.A_shared, &adapter.A}), z.K);
  builder.drop(dropout.seed, dropout.threshold);

  builder.begin_group(Layout::kNN);
  Problem& expand = builder.add_problem(z.M, z.N);
  expand.C_in = builder.matrix(C_in);
  expand.C = builder.matrix(y);
  builder
      .add_segment(builder.matrix(s), builder.stack({&adapter.Bt_shared, &adapter.Bt}), s.size(1))
      .scale_k = data(adapter.d);
  launch(builder.program());
}

// grads = d ∘rows ranksᵀ·features, and dd, if defined, from the unscaled sums and the weights they
// are gradients of.
void add_wgrad(ProgramBuilder& builder, const Tensor& ranks, const Tensor& features,
               const Tensor& d, std::initializer_list<ProgramBuilder::Output> grads,
               const Tensor& dd, std::initializer_list<const Tensor*> weights) {
  Problem& wgrad = builder.add_problem(d.size(0), features.size(1));
  wgrad.C = builder.output_stack(d.scalar_type(), grads);
  if (dd.defined()) {
    wgrad.row_dot = dd.mutable_data_ptr();
    wgrad.row_dot_with = builder.stack(weights);
  }
  builder.add_segment(builder.matrix(ranks), builder.matrix(features), features.size(0)).scale_m =
      data(d);
}

}  // namespace

std::tuple<Tensor, Tensor> rasa_linear_body(LaunchFn launch, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, const Adapter& adapter,
                                            double p, const OptionalTensor& seed) {
  constexpr const char* op = "rasa_linear";
  const c10::DeviceGuard guard(x.device());
  check_x(op, x);
  check_dim(op, weight, "weight", "(N, K)", 2);
  check_shape(op, weight, "weight", "(N, K)", {weight.size(0), x.size(1)});
  check_like_x(op, weight, "weight", x);
  if (bias) {
    check_shape(op, *bias, "bias", "(N)", {weight.size(0)});
    check_like_x(op, *bias, "bias", x);
  }
  const Sizes z = check_adapter(op, x, weight.size(0), adapter);
  const Dropout dropout(op, p, seed, x);

  const Tensor rows = row_major(x);
  const Tensor y = at::linear(rows, weight, bias).contiguous();
  const Tensor s = at::empty({z.M, padded_rank(z.R())}, x.options());
  if (z.M > 0 && z.N > 0 && z.R() > 0) {
    launch_forward(op, launch, rows, z, adapter, dropout, s, y, y);
  }
  return {y, s};
}

std::tuple<Tensor, Tensor> rasa_add_body(LaunchFn launch, const Tensor& x, const Tensor& base,
                                         const Adapter& adapter, double p,
                                         const OptionalTensor& seed) {
  constexpr const char* op = "rasa_add";
  const c10::DeviceGuard guard(x.device());
  check_x(op, x);
  check_dim(op, base, "base", "(M, N)", 2);
  check_shape(op, base, "base", "(M, N)", {x.size(0), base.size(1)});
  check_like_x(op, base, "base", x);
  const Sizes z = check_adapter(op, x, base.size(1), adapter);
  const Dropout dropout(op, p, seed, x);

  const Tensor rows = row_major(x);
  const Tensor base_rows = row_major(base);
  const Tensor s = at::empty({z.M, padded_rank(z.R())}, x.options());
  if (z.M == 0 || z.N == 0 || z.R() == 0) {
    return {base.clone(at::MemoryFormat::Contiguous), s};
  }
  const Tensor y = at::empty({z.M, z.N}, x.options());
  launch_forward(op, launch, rows, z, adapter, dropout, s, base_rows, y);
  return {y, s};
}

Gradients rasa_backward_body(LaunchFn launch, const Tensor& dy, const Tensor& x,
                             const OptionalTensor& weight, const Adapter& adapter, const Tensor& s,
                             double p, const OptionalTensor& seed, WantedMask wanted) {
  constexpr const char* op = "rasa_backward";
  const c10::DeviceGuard guard(x.device());
  // Backward runs in the dtypes of forward, whatever autocast is active around it.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_x(op, x);
  check_dim(op, dy, "dy", "(M, N)", 2);
  const Sizes z = check_adapter(op, x, dy.size(1), adapter);
  check_shape(op, dy, "dy", "(M, N)", {z.M, z.N});
  check_like_x(op, dy, "dy", x);
  check_shape(op, s, "s", "(M, round_up(R, 8))", {z.M, padded_rank(z.R())});
  check_like_x(op, s, "s", x);
  if (weight) {
    check_shape(op, *weight, "weight", "(N, K)", {z.N, z.K});
    check_like_x(op, *weight, "weight", x);
  }
  const Dropout dropout(op, p, seed, x);

  const Tensor x_rows = row_major(x), dy_rows = row_major(dy), s_rows = row_major(s);
  const auto grad_of = [&](Wanted which, const Tensor& t) {
    return wanted[which] ? at::empty(t.sizes(), t.options()) : Tensor();
  };
  const Tensor dA = grad_of(kDA, adapter.A), dA_shared = grad_of(kDAShared, adapter.A_shared);
  const Tensor dBt = grad_of(kDBt, adapter.Bt), dBt_shared = grad_of(kDBtShared, adapter.Bt_shared);
  const Tensor dd = grad_of(kDd, adapter.d);
  Tensor dx;
  if (wanted[kDx]) {
    dx = weight       ? at::mm(dy_rows, *weight)
         : z.R() == 0 ? at::zeros({z.M, z.K}, x.options())
                      : at::empty({z.M, z.K}, x.options());
  }
  // An operator returns tensors: what was not asked for is an empty one.
  const auto returned = [&](const Tensor& t) {
    return t.defined() ? t : at::empty({0}, x.options());
  };
  const Gradients result = {returned(dx),  returned(dA),         returned(dA_shared),
                            returned(dBt), returned(dBt_shared), returned(dd)};
  if (z.R() == 0) return result;

  const bool wants_dBt = wanted[kDBt] || wanted[kDBtShared];
  const bool wants_dA = wanted[kDA] || wanted[kDAShared] || (wanted[kDd] && !wants_dBt);
  ProgramBuilder builder(op, x.scalar_type(), adapter.d.scalar_type());
  Tensor g;
  if (wants_dA || wanted[kDx]) {
    g = at::empty({z.M, padded_rank(z.R())}, x.options());
    builder.begin_group(Layout::kNT);  // g = dy·[Bt_shared ; Bt]ᵀ
    builder.add_problem(z.M, g.size(1)).C = builder.matrix(g);
    builder.add_segment(builder.matrix(dy_rows), builder.stack({&adapter.Bt_shared, &adapter.Bt}),
                        z.N);
  }
  if (wanted[kDx]) {
    builder.begin_group(Layout::kNN);  // dx = dy·W + (g∘d)·[A_shared ; A], masked
    Problem& expand = builder.add_problem(z.M, z.K);
    expand.C = builder.matrix(dx);
    if (weight) expand.C_in = expand.C;
    builder
        .add_segment(builder.matrix(g), builder.stack({&adapter.A_shared, &adapter.A}), g.size(1))
        .scale_k = data(adapter.d);
    builder.drop(dropout.seed, dropout.threshold);
  }
  if (wants_dA || wants_dBt) builder.begin_group(Layout::kTN);
  if (wants_dA) {  // dA = d ∘rows gᵀ·x̃
    add_wgrad(builder, g, x_rows, adapter.d, {{dA_shared, z.Rs}, {dA, z.Rp}}, dd,
              {&adapter.A_shared, &adapter.A});
    builder.drop(dropout.seed, dropout.threshold);
  }
  if (wants_dBt) {  // dBt = d ∘rows sᵀ·dy
    add_wgrad(builder, s_rows, dy_rows, adapter.d, {{dBt_shared, z.Rs}, {dBt, z.Rp}},
              wants_dA ? Tensor() : dd, {&adapter.Bt_shared, &adapter.Bt});
  }
  launch(builder.program());
  return result;
}

namespace {

Layout parse_layout(const char* op, std::string_view layout) {
  if (layout == "NN") return Layout::kNN;
  if (layout == "NT") return Layout::kNT;
  TORCH_CHECK(layout == "TN", op, ": layout must be \"NN\", \"NT\" or \"TN\", got \"", layout,
              "\"");
  return Layout::kTN;
}

void check_optionals(const char* op, const std::vector<OptionalTensor>& list, const char* name,
                     const char* of_what, size_t expected) {
  TORCH_CHECK(list.empty() || list.size() == expected, op, ": ", name,
              " must have one entry for each ", of_what, " = ", expected, ", got ", list.size());
}

const Tensor* entry(const std::vector<OptionalTensor>& list, size_t i) {
  return i < list.size() && list[i].has_value() && list[i]->defined() ? &*list[i] : nullptr;
}

}  // namespace

void check_group(std::string_view layout, at::TensorList A, at::TensorList B,
                 at::IntArrayRef segments) {
  constexpr const char* op = "grouped_gemm";
  parse_layout(op, layout);
  TORCH_CHECK(A.size() == B.size(), op, ": B must have as many tensors as A = ", A.size(), ", got ",
              B.size());
  const int64_t total = static_cast<int64_t>(A.size());
  int64_t left = total;
  for (const int64_t n : segments) {
    TORCH_CHECK(n >= 1, op, ": segments must be at least 1 for each problem, got ", segments);
    left = n > left ? -1 : left - n;  // no sum that could overflow
    if (left < 0) break;
  }
  TORCH_CHECK(left == 0, op, ": segments must sum to the number of tensors in A = ", total,
              ", got ", segments);
  for (size_t i = 0; i < A.size(); ++i) {
    check_dim(op, A[i], "A", "a matrix", 2);
    check_dim(op, B[i], "B", "a matrix", 2);
  }
}

std::vector<Tensor> grouped_gemm_body(LaunchFn launch, std::string_view layout_name,
                                      at::TensorList A, at::TensorList B, at::IntArrayRef segments,
                                      const std::vector<OptionalTensor>& C_in,
                                      const std::vector<OptionalTensor>& scale_m,
                                      const std::vector<OptionalTensor>& scale_k,
                                      std::optional<at::ScalarType> out_dtype) {
  constexpr const char* op = "grouped_gemm";
  check_group(layout_name, A, B, segments);
  const Layout layout = parse_layout(op, layout_name);
  check_optionals(op, C_in, "C_in", "problem", segments.size());
  check_optionals(op, scale_m, "scale_m", "segment", A.size());
  check_optionals(op, scale_k, "scale_k", "segment", A.size());
  if (A.empty()) return {};

  const Tensor& like = A[0];
  const c10::DeviceGuard guard(like.device());
  const at::ScalarType dtype = like.scalar_type();
  TORCH_CHECK(is_supported(dtype), op, ": A must be float32, float64, bfloat16 or float16, got ",
              at::toString(dtype));
  const at::ScalarType c_dtype = out_dtype.value_or(dtype);
  TORCH_CHECK(c_dtype == dtype || (c_dtype == at::kFloat && dtype != at::kDouble), op,
              ": out_dtype must be A's dtype ", at::toString(dtype), " or Float, got ",
              at::toString(c_dtype));
  // Scales are vectors of one dtype; where none is given any will do.
  at::ScalarType scale_dtype = dtype;
  for (size_t i = 0; i < A.size(); ++i) {
    if (const Tensor* t = entry(scale_m, i)) scale_dtype = t->scalar_type();
    if (const Tensor* t = entry(scale_k, i)) scale_dtype = t->scalar_type();
  }
  TORCH_CHECK(scale_dtype == dtype || (scale_dtype == at::kFloat && dtype != at::kDouble), op,
              ": scales must have A's dtype ", at::toString(dtype), " or Float, got ",
              at::toString(scale_dtype));

  std::vector<Tensor> results;
  std::vector<Tensor> kept;  // row-major copies live until the launch
  kept.reserve(2 * A.size() + segments.size());
  const auto keep_rows = [&](const Tensor& t, const char* name) -> const Tensor& {
    check_device(op, t, name, like);
    kept.push_back(row_major(t));
    return kept.back();
  };
  const auto scale_of = [&](const Tensor* t, const char* name, const char* symbols, int64_t size) {
    if (!t) return static_cast<const void*>(nullptr);
    check_shape(op, *t, name, symbols, {size});
    check_dtype(op, *t, name, scale_dtype, "the scales'");
    check_device(op, *t, name, like);
    check_row_major(op, *t, name);
    return data(*t);
  };

  ProgramBuilder builder(op, dtype, scale_dtype);
  builder.begin_group(layout);
  size_t segment = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const bool is_A_transposed = layout == Layout::kTN, is_B_transposed = layout == Layout::kNT;
    const int64_t M = A[segment].size(is_A_transposed ? 1 : 0);
    const int64_t N = B[segment].size(is_B_transposed ? 0 : 1);
    const Tensor C = at::empty({M, N}, like.options().dtype(c_dtype));
    Problem& problem = builder.add_problem(M, N);
    problem.C = builder.output_stack(c_dtype, {{C, M}});
    if (const Tensor* t = entry(C_in, i)) {
      check_shape(op, *t, "C_in", "(M, N)", {M, N});
      check_dtype(op, *t, "C_in", c_dtype, "the result's");
      problem.C_in = builder.matrix(keep_rows(*t, "C_in"));
    }
    for (int64_t j = 0; j < segments[i]; ++j, ++segment) {
      const Tensor& a = keep_rows(A[segment], "A");
      const Tensor& b = keep_rows(B[segment], "B");
      const int64_t K = a.size(is_A_transposed ? 0 : 1);
      check_dtype(op, a, "A", dtype, "the first A's");
      check_dtype(op, b, "B", dtype, "A's");
      check_shape(op, a, "A", is_A_transposed ? "(K, M)" : "(M, K)",
                  is_A_transposed ? at::IntArrayRef{K, M} : at::IntArrayRef{M, K});
      check_shape(op, b, "B", is_B_transposed ? "(N, K)" : "(K, N)",
                  is_B_transposed ? at::IntArrayRef{N, K} : at::IntArrayRef{K, N});
      Segment& s = builder.add_segment(builder.matrix(a), builder.matrix(b), K);
      s.scale_m = scale_of(entry(scale_m, segment), "scale_m", "(M)", M);
      s.scale_k = scale_of(entry(scale_k, segment), "scale_k", "(K)", K);
    }
    results.push_back(C);
  }
  launch(builder.program());
  return results;
}

Tensor dropout_mask_body(DrawMaskFn draw_mask, const Tensor& seed, int64_t M, int64_t K, double p) {
  constexpr const char* op = "dropout_mask";
  const c10::DeviceGuard guard(seed.device());
  TORCH_CHECK(M >= 0 && K >= 0, op, ": M and K must not be negative, got ", M, " and ", K);
  const Dropout dropout(op, p, seed, seed);
  const auto options = seed.options().dtype(at::kBool);
  if (dropout.threshold == 0) return at::ones({M, K}, options);
  const Tensor mask = at::empty({M, K}, options);
  draw_mask({dropout.seed, dropout.threshold, check_size(op, "M", M), check_size(op, "K", K),
             mask.mutable_data_ptr<bool>()});
  return mask;
}

}  // namespace rasa
