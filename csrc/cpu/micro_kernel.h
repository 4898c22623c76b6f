// The GEMM of one tile, on our products of bfloat16 or on the micro-kernels that PyTorch exports,
// and what this CPU can run.
#pragma once

#include <string>

#include "bf16_gemm.h"
#include "tile_ops.h"

namespace rasa::cpu {

// The vector loops compiled for the best capability this CPU has.
const TileOpsTable& tile_ops();

// "baseline", "avx2", "avx512" or "avx512_bf16": which of our loops run.
std::string cpu_capability();

// Which dtypes multiply in micro-kernels, e.g. "float32,bfloat16".
std::string micro_kernel_dtypes();

// For tests: "own" (whatever the CPU has), "library" (without own_bf16_gemm), or "none" (the
// baseline loops and plain_gemm for everything, as on a CPU without any micro-kernel).
void set_micro_kernels(const std::string& which);

// Our products of bfloat16, or nullptr where the library's or plain_gemm run.
const Bf16Gemm* own_bf16_gemm();

// The type in which elements of `dtype` are multiplied: itself where a micro-kernel takes it, else
// F32 (F64 for F64).
DType compute_dtype(DType dtype);

constexpr DType acc_dtype(DType compute) {
  return compute == DType::kF64 ? DType::kF64 : DType::kF32;
}

// 16-bit micro-kernels take B with two rows of k side by side: element (k,n) at (k/2)·2·ldB + 2n +
// k%2.
constexpr bool pairs_rows_of_B(DType compute) { return element_size(compute) == 2; }

// C (M,N) = A (M,K) · B (K,N) (+ C), accumulated in acc_dtype(compute), without own_bf16_gemm.
// Strides in elements; ldB of one row of k. The library compiles and keeps one kernel per (M, N, K,
// strides): pass few distinct ones (see largest_piece).
void tile_gemm(DType compute, int64_t M, int64_t N, int64_t K, const void* A, int64_t ldA,
               const void* B, int64_t ldB, void* C, int64_t ldC, bool add_C);

// The columns of C that fill a vector of tile_gemm, where a part of one takes as long or longer;
// else 1.
int64_t vector_columns(DType compute);

// The largest power of two ≤ min(n, limit): a ragged number of tokens is taken in such pieces, so
// that any number of tokens needs at most log2(limit) + 1 kernels.
constexpr int64_t largest_piece(int64_t n, int64_t limit) {
  int64_t piece = limit;
  while (piece > n) piece /= 2;
  return piece;
}

// To be called by each thread after its last tile_gemm: frees the tile registers of CPUs that have
// them.
void release_micro_kernel(DType compute);

}  // namespace rasa::cpu
