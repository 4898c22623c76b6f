// Products of bfloat16 whose one side is the ranks, for CPUs that have AVX512-BF16 and no matrix
// unit. No torch.
//
// The library's micro-kernels are made for large tiles, and leave a sum in memory for another pass,
// which costs much where the reduction is over some 40 ranks. These keep
// 8 × 48 accumulators in registers, and end with what the sum is for. As in every product by these
// instructions, subnormal operands and sums count as zeros.
#pragma once

#include <cstdint>

namespace rasa::cpu {

// A (M,K), K even: elements (m, 2j) and (m, 2j + 1) are the 4 bytes at
// data + m·row_step + j·pair_step, both in bytes.
struct PairedRows {
  const void* data;
  int64_t row_step, pair_step;
};

// B (K,N): element (k,n) at (k/2)·2·ld + 2n + k%2, rows readable up to a multiple of 16 columns.
struct PairedColumns {
  const void* data;
  int64_t ld;  // columns
};

// C (M,N) in fp32.
struct SumOut {
  float* C;
  int64_t ld;
  bool adds;  // C += A·B, else C = A·B
};

// C (M,N) = c_in + keep ∘ (A·B) · scale, rounded to bfloat16; a subnormal result is zero.
struct RoundedOut {
  void* C;
  int64_t ld;
  const void* c_in;  // bfloat16; may be C itself, or nullptr
  int64_t ld_in;
  float scale;
  const uint16_t* draws;  // (M,N) dropout draws, or nullptr
  int64_t ld_draws;
  uint32_t drop_threshold;
};

struct Bf16Gemm {
  void (*sum)(int64_t M, int64_t N, int64_t K, PairedRows A, PairedColumns B, SumOut out);
  void (*rounded)(int64_t M, int64_t N, int64_t K, PairedRows A, PairedColumns B, RoundedOut out);
};

// Call only where the CPU has AVX512-BF16.
const Bf16Gemm& bf16_gemm();

}  // namespace rasa::cpu
