// The error messages of the ops: op, argument, what was expected (symbols and numbers), what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>
#include <string>

#include "philox.h"

namespace rasa {

inline void check_dim(const char* op, const at::Tensor& t, const char* name, const char* symbols,
                      int64_t dim) {
  TORCH_CHECK(t.dim() == dim, op, ": ", name, " must be ", symbols, ", got ", t.dim(),
              " dimensions ", t.sizes());
}

// rasa_linear: A_shared must be (Rs, K) = [4, 7], got [4, 8]
inline void check_shape(const char* op, const at::Tensor& t, const char* name, const char* symbols,
                        at::IntArrayRef expected) {
  TORCH_CHECK(t.sizes() == expected, op, ": ", name, " must be ", symbols, " = ", expected,
              ", got ", t.sizes());
}

inline void check_device(const char* op, const at::Tensor& t, const char* name, const at::Tensor& x,
                         const char* x_name = "x") {
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " must be on ", x_name, "'s device ",
              x.device(), ", got ", t.device());
}

// For Meta kernels: one tensor on the meta device is enough to be sent there, the others may be
// real. Takes lists of tensors and of optional ones.
template <class List>
void check_devices(const char* op, const List& tensors, const char* name, const at::Tensor& x,
                   const char* x_name = "x") {
  for (const std::optional<at::Tensor> t : tensors) {
    if (t.has_value() && t->defined()) check_device(op, *t, name, x, x_name);
  }
}

inline void check_dtype(const char* op, const at::Tensor& t, const char* name,
                        at::ScalarType expected, const char* why) {
  TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must have ", why, " dtype ",
              at::toString(expected), ", got ", at::toString(t.scalar_type()));
}

inline void check_row_major(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.numel() == 0 || t.stride(-1) == 1 || t.size(-1) == 1, op, ": ", name,
              " must be row-major with stride(-1) == 1, got strides ", t.strides(),
              ". Call .contiguous()");
}

// Sizes and row strides are 32-bit in the kernels' argument block.
inline int32_t check_size(const char* op, const char* name, int64_t size) {
  TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), op, ": ", name,
              " must be below 2^31, got ", size);
  return static_cast<int32_t>(size);
}

inline void check_p(const char* op, double p) {
  TORCH_CHECK(p >= 0 && p < 1, op, ": p must be in [0, 1), got ", p);
}

// The dropout of one op call, checked.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;

  Dropout(const char* op, double p, const std::optional<at::Tensor>& seed_tensor,
          const at::Tensor& x) {
    check_p(op, p);
    if (p == 0) return;
    TORCH_CHECK(seed_tensor.has_value() && seed_tensor->defined(), op,
                ": seed must be given when p > 0, got None with p = ", p);
    TORCH_CHECK(seed_tensor->scalar_type() == at::kLong && seed_tensor->numel() == 1, op,
                ": seed must be one Long element, got ", at::toString(seed_tensor->scalar_type()),
                " ", seed_tensor->sizes());
    check_device(op, *seed_tensor, "seed", x);
    threshold = drop_threshold(p);
    seed = seed_tensor->const_data_ptr<int64_t>();
  }
};

}  // namespace rasa
