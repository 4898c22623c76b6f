// Tensors → Program: the one place where a tensor becomes a pointer, sizes and a row stride.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "checks.h"
#include "gemm_problem.h"

namespace rasa {

inline bool is_supported(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::kF64;
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    default:
      return DType::kF16;
  }
}

// Rows that follow each other at a stride the kernels can take; a broadcast row stride (0) is not
// one.
inline bool is_row_major(const at::Tensor& t) {
  return t.numel() == 0 ||
         ((t.stride(1) == 1 || t.size(1) == 1) && (t.stride(0) >= t.size(1) || t.size(0) == 1));
}

inline at::Tensor row_major(const at::Tensor& t) { return is_row_major(t) ? t : t.contiguous(); }

class ProgramBuilder {
 public:
  ProgramBuilder(const char* op, at::ScalarType dtype, at::ScalarType scale_dtype) : op_(op) {
    program_.dtype = to_dtype(dtype);
    program_.scale_dtype = to_dtype(scale_dtype);
  }

  Matrix matrix(const at::Tensor& t) { return stack({&t}); }

  // Columns [first, …) of t.
  Matrix columns(const at::Tensor& t, int64_t first) {
    const Matrix m = matrix(t);
    if (m.num_blocks > 0) {
      Block& block = program_.blocks.back();
      block.ptr = static_cast<char*>(block.ptr) + first * t.element_size();
    }
    return m;
  }

  // Blocks of equal dtype and columns; empty ones are left out.
  Matrix stack(std::initializer_list<const at::Tensor*> tensors) {
    Matrix m = begin_stack((*tensors.begin())->scalar_type());
    for (const at::Tensor* t : tensors) append(m, *t);
    return m;
  }

  // A stack grows by appending, until the next matrix begins.
  Matrix begin_stack(at::ScalarType dtype) const {
    return {static_cast<int32_t>(program_.blocks.size()), 0, to_dtype(dtype)};
  }

  void append(Matrix& m, const at::Tensor& t) {
    if (t.size(0) == 0) return;
    const int64_t ld = t.size(0) == 1 ? t.size(1) : t.stride(0);
    program_.blocks.push_back({const_cast<void*>(t.const_data_ptr()),
                               check_size(op_, "a number of rows", t.size(0)),
                               check_size(op_, "a row stride", ld)});
    ++m.num_blocks;
  }

  // Rows that read as zeros and are not written.
  void append_gap(Matrix& m, int64_t rows) {
    if (rows == 0) return;
    program_.blocks.push_back({nullptr, check_size(op_, "a number of rows", rows), 0});
    ++m.num_blocks;
  }

  // An undefined tensor: these rows are computed where others need them, and not written.
  void append_output(Matrix& m, const at::Tensor& t, int64_t rows) {
    if (!t.defined()) return append_gap(m, rows);
    if (rows == 0) return;
    program_.blocks.push_back({t.mutable_data_ptr(), check_size(op_, "a number of rows", rows),
                               check_size(op_, "a row stride", t.size(1))});
    ++m.num_blocks;
  }

  Matrix output(const at::Tensor& t) {
    Matrix m = begin_stack(t.scalar_type());
    append_output(m, t, t.size(0));
    return m;
  }

  void begin_group(Layout layout) {
    program_.groups.push_back({layout, static_cast<int32_t>(program_.problems.size()), 0});
  }

  // Fill in C and what else the problem has; its segments follow.
  Problem& add_problem(int64_t M, int64_t N) {
    Problem p;
    p.M = check_size(op_, "M", M);
    p.N = check_size(op_, "N", N);
    p.first_segment = static_cast<int32_t>(program_.segments.size());
    program_.problems.push_back(p);
    ++program_.groups.back().num_problems;
    return program_.problems.back();
  }

  Segment& add_segment(Matrix A, Matrix B, int64_t K) {
    Segment s;
    s.A = A;
    s.B = B;
    s.K = check_size(op_, "K", K);
    program_.segments.push_back(s);
    ++program_.problems.back().num_segments;
    return program_.segments.back();
  }

  // diagonal (M) = that of AᵀB, for A, B (K,M).
  void add_diagonal(const at::Tensor& diagonal, Matrix A, Matrix B, int64_t K) {
    Problem& p = add_problem(diagonal.size(0), diagonal.size(0));
    p.is_diagonal = true;
    p.C = output(diagonal.unsqueeze(0));
    add_segment(A, B, K);
  }

  // The last segment drops elements; every segment of its problem does, or none.
  void drop(const int64_t* seed, uint32_t threshold) {
    program_.problems.back().drop_threshold = threshold;
    program_.segments.back().seed = seed;
  }

  // Products of float32 stay float32's, even where torch allows TF32.
  void require_full_precision() { program_.is_full_precision = true; }

  const Program& program() const { return program_; }

 private:
  const char* op_;
  Program program_;
};

}  // namespace rasa
