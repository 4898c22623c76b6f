// The bodies of grouped_gemm, which runs any group of products, and of dropout_mask, which shows
// one.
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include "checks.h"
#include "program_builder.h"
#include "rasa_ops.h"

namespace rasa {
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
  return i < list.size() && list[i].has_value() ? &*list[i] : nullptr;
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
    return t->const_data_ptr();
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
    problem.C = builder.output(C);
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
