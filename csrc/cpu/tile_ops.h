// The vector loops of the CPU backend: everything around the micro-kernel GEMM. No torch.
//
// Each function is compiled once per CPU capability and once per pair (storage type, compute type)
// and is reached through a table, so callers hold void pointers and let the table know the types.
// The accumulator type is double when the compute type is F64 and float otherwise.
#pragma once

#include <cstdint>

#include "../gemm_problem.h"

namespace rasa::cpu {

constexpr int kDropoutBlock = 16;  // philox.h draws 16 × 16 elements at a time

constexpr int kMostColumns = 256;  // of a transposition

// Dropout of one row: draws (n), or draws == nullptr for none.
struct RowMask {
  const uint16_t* draws = nullptr;
  uint32_t threshold = 0;
};

struct TileOps {
  // dst (n) = keep ∘ src · scale, in the compute type. scale 1 within one type copies bits.
  void (*convert_row)(const void* src, double scale, RowMask mask, void* dst, int64_t n);

  // dst (n,2): dst[i][h] = keep_h ∘ src_h[i] · scale_h in the compute type; a null src is a row of
  // zeros. This is the layout in which the 16-bit micro-kernels take B (two rows of k side by
  // side).
  void (*interleave_rows)(const void* const src[2], const double scale[2], const RowMask mask[2],
                          void* dst, int64_t n);

  // dst[c·ld_dst + j] = src[j][c] · scale[c], for j < 16, c < cols ≤ kMostColumns; rows
  // j ≥ num_rows read as zeros. scale, in the accumulator type, may be null.
  void (*transpose)(const void* const* src, int num_rows, int64_t cols, const void* scale,
                    void* dst, int64_t ld_dst);

  // The same for pairs of columns: dst[(c/2)·ld_dst·2 + 2j + c%2]; an odd last column is paired
  // with zeros.
  void (*transpose_pairs)(const void* const* src, int num_rows, int64_t cols, const void* scale,
                          void* dst, int64_t ld_dst);

  // out (n) = c_in + keep ∘ acc · scale, rounded to the storage type; c_in may be null or out
  // itself.
  void (*finish_row)(const void* acc, double scale, RowMask mask, const void* c_in, void* out,
                     int64_t n);

  // sums (n) += a ∘ b, both in the storage type.
  void (*add_products)(const void* a, const void* b, double* sums, int64_t n);
};

struct TileOpsTable {
  // nullptr where the pair makes no sense (F64 with anything but F64).
  const TileOps* (*find)(DType storage, DType compute);

  // total (n) += acc · scale, both accumulators (F64 or F32).
  void (*add_scaled_row)(DType acc_type, const void* acc, double scale, void* total, int64_t n);

  // draws (16 rows, stride ld) of tokens 16·m16 … and features 16·c16 … 16·(c16 + num_blocks) − 1.
  void (*draw_strip)(uint64_t seed, uint32_t m16, uint32_t c16, int64_t num_blocks, uint16_t* draws,
                     int64_t ld);

  // C (M,N) = A (M,K) · B (K,N) (+ C), all of type F64 or F32: where no library micro-kernel
  // serves.
  void (*plain_gemm)(DType dtype, int64_t M, int64_t N, int64_t K, const void* A, int64_t ldA,
                     const void* B, int64_t ldB, void* C, int64_t ldC, bool add_C);
};

// One per compiled capability; tile_ops.cpp defines the one named by RASA_CPU_CAPABILITY.
const TileOpsTable& tile_ops_baseline();
const TileOpsTable& tile_ops_avx2();
const TileOpsTable& tile_ops_avx512();

}  // namespace rasa::cpu
