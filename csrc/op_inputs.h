// The inputs that the op bodies have in common, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "program_builder.h"
#include "rasa_ops.h"

namespace rasa {

// The left operand of a product of PyTorch's. On CPUs with a matrix unit its bfloat16 kernels may
// read past rows that do not fill the unit's 32 columns: beside a slice, that may be NaN.
inline Tensor library_operand(const Tensor& rows) {
  const bool is_read_past = rows.is_cpu() && rows.scalar_type() == at::kBFloat16 &&
                            rows.size(1) % 32 != 0 && rows.stride(0) != rows.size(1);
  return is_read_past ? rows.contiguous() : rows;
}

// Whether the base product is added to the adapter's, not the other way round. MKL adds to what
// memory holds at no cost, while an expand after it waits for every element of y.
inline bool adds_base_last(const Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat; }

// What an expand before the base product adds to: the bias in every row, or nothing.
inline Tensor bias_rows(const std::optional<Tensor>& bias, const Tensor& y) {
  return bias ? bias->contiguous().expand_as(y) : Tensor();
}

// The adapter of one layer.
struct Adapter {
  const Tensor &A, &A_shared, &Bt, &Bt_shared, &d;
};

struct Sizes {
  int64_t M, K, N, Rp, Rs;
  int64_t R() const { return Rs + Rp; }
};

// x: what the adapter's dtype and device must go with, called x_name in messages.
inline Sizes check_adapter(const char* op, const Tensor& x, int64_t N, const Adapter& adapter,
                           const char* x_name = "x") {
  check_dim(op, adapter.A, "A", "(Rp, K)", 2);
  check_dim(op, adapter.A_shared, "A_shared", "(Rs, K)", 2);
  const Sizes z = {x.size(0), x.size(1), N, adapter.A.size(0), adapter.A_shared.size(0)};
  check_shape(op, adapter.A, "A", "(Rp, K)", {z.Rp, z.K});
  check_shape(op, adapter.A_shared, "A_shared", "(Rs, K)", {z.Rs, z.K});
  check_shape(op, adapter.Bt, "Bt", "(Rp, N)", {z.Rp, z.N});
  check_shape(op, adapter.Bt_shared, "Bt_shared", "(Rs, N)", {z.Rs, z.N});
  check_shape(op, adapter.d, "d", "(Rs + Rp)", {z.R()});

  const at::ScalarType type = adapter.A.scalar_type();
  const bool is_half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  TORCH_CHECK(type == x.scalar_type() || (is_half && type == at::kFloat), op, ": A must have ",
              x_name, "'s dtype ", at::toString(x.scalar_type()), is_half ? " or Float" : "",
              ", got ", at::toString(type));
  const auto check_like_A = [&](const Tensor& t, const char* name) {
    check_dtype(op, t, name, type, "A's");
    check_device(op, t, name, x, x_name);
  };
  check_device(op, adapter.A, "A", x, x_name);
  check_like_A(adapter.A_shared, "A_shared");
  check_like_A(adapter.Bt, "Bt");
  check_like_A(adapter.Bt_shared, "Bt_shared");
  check_like_A(adapter.d, "d");
  check_row_major(op, adapter.A, "A");
  check_row_major(op, adapter.A_shared, "A_shared");
  check_row_major(op, adapter.Bt, "Bt");
  check_row_major(op, adapter.Bt_shared, "Bt_shared");
  check_row_major(op, adapter.d, "d");
  return z;
}

inline void check_x(const char* op, const Tensor& x) {
  check_dim(op, x, "x", "(M, K)", 2);
  TORCH_CHECK(is_supported(x.scalar_type()), op,
              ": x must be float32, float64, bfloat16 or float16, got ",
              at::toString(x.scalar_type()));
}

inline void check_like_x(const char* op, const Tensor& t, const char* name, const Tensor& x) {
  check_dtype(op, t, name, x.scalar_type(), "x's");
  check_device(op, t, name, x);
}

inline void check_entries(const char* op, const char* name, size_t entries, size_t num_layers) {
  TORCH_CHECK(entries == num_layers, op, ": ", name,
              " must have one entry for each layer = ", num_layers, ", got ", entries);
}

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }

}  // namespace rasa
