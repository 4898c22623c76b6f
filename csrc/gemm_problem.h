// The contract between the ops, which know torch, and the backends, which do not.
//
// A problem is one output C whose reduction runs over a list of segments:
//
//   C (M,N) = C_in + Σ_s scale_m,s ∘ ((op(A_s) ∘ scale_k,s) (M,K_s) · op(B_s) (K_s,N))
//
//   layout   op(A) as stored   op(B) as stored   form     in RaSA
//   NT       A (M,K)           B (N,K)           shrink   s = x·Aᵀ              g = dy·Btᵀ
//   NN       A (M,K)           B (K,N)           expand   y = base + (s∘d)·Bt   dx = (g∘d)·A
//   TN       A (K,M)           B (K,N)           wgrad    dA = d ∘rows gᵀ·x     dBt = d ∘rows sᵀ·dy
//                                                         dd = diagonal of gᵀ·s
//
// Every matrix is row-major and is a stack of row blocks (a matrix in one piece is a stack of one):
// shared and private ranks are two blocks of one matrix and are never copied together in memory. A
// stack with fewer rows than its axis reads as zeros beyond them; a block without a pointer reads
// as zeros and is not written. CUDA takes 2,038 blocks in all matrices of a segment and its
// problem.
//
// Dropout acts on a (tokens, features) matrix: op(A) in NT, the product in NN, op(B) in TN. So one
// mask serves the forward shrink and, in backward, wgrad and dx; philox.h says which bit belongs to
// which element. Each segment has its seed; in NN, where the product is of all segments, they have
// the same.
//
// Rounding: operands are rounded to Program::dtype or to a wider type (once; scale_k is applied
// before, to A, or to B where the type's exponent has room for the product: not in fp16); products
// are summed in fp32 (fp64 for F64); the factor of kept elements is applied to that sum, C_in is
// added to it, and C is rounded once. A backend may take subnormal numbers for zeros. Where torch
// lets a backend multiply float32 in TF32, it may round the operands of an F32 program to that,
// unless the program is_full_precision.
//
// A program is a list of groups that run in order. A row of an NT or NN result may depend on the
// same row, and on no other, of an earlier NT or NN result, so a backend may run all of them row
// tile by row tile. A TN group may read any earlier result whole.
#pragma once

#include <cstdint>
#include <vector>

namespace rasa {

enum class Layout : int8_t {
  kNN,
  kNT,
  kTN
};  // BLAS letters of op(A), op(B): N as stored, T transposed
enum class DType : int8_t { kF64, kF32, kBF16, kF16 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}

struct Block {
  void* ptr;
  int32_t rows;
  int32_t ld;  // row stride, in elements
};

struct Matrix {
  int32_t first_block = 0;  // in Program::blocks
  int32_t num_blocks = 0;   // 0: no matrix
  DType dtype = DType::kF32;
};

struct Segment {
  Matrix A, B;
  int32_t K = 0;
  // (K), or in NN as long as B's rows; Program::scale_dtype; nullptr means ones.
  const void* scale_k = nullptr;
  const void* scale_m = nullptr;  // (M), Program::scale_dtype; nullptr means ones
  const int64_t* seed = nullptr;  // of dropout, in the backend's memory; read if drop_threshold > 0
};

struct Problem {
  int32_t M = 0, N = 0;
  int32_t first_segment = 0, num_segments = 0;  // in Program::segments
  Matrix C_in;                                  // (M,N), C's dtype; may be C itself
  Matrix C;                                     // (M,N)
  // TN, M == N and one segment, whose A and B have one dtype: C (1,M), Program::scale_dtype, is the
  // diagonal of the product, of which no more is computed than that takes. Without C_in, scales
  // and dropout.
  bool is_diagonal = false;
  uint32_t drop_threshold = 0;  // an element is dropped when its 15-bit draw is below it; 0: none
};

struct Group {
  Layout layout;
  int32_t first_problem, num_problems;  // in Program::problems
};

struct Program {
  DType dtype;        // to which operands are rounded
  DType scale_dtype;  // of scale_k, scale_m and diagonals
  std::vector<Group> groups;
  std::vector<Problem> problems;
  std::vector<Segment> segments;
  std::vector<Block> blocks;
  bool is_full_precision = false;  // F32: products as exact as float32's, whatever torch allows
};

using LaunchFn = void (*)(const Program&);

}  // namespace rasa
