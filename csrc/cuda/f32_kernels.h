// Which F32 programs run on the kernels, and on which: they multiply in TF32, or in three TF32
// products that are as exact as float32. Pure: no torch, no CUDA.
#pragma once

#include "gemm_config.h"

namespace rasa::cuda {

// Of fp32 operands. Bytes weigh twice those of 16 bits, and a panel of B that stays in shared
// memory has no room beside A where it would pay: no config walks.
constexpr ConfigId select_f32_config(const ProblemShape& p, bool is_full_precision) {
  if (is_full_precision) return ConfigId::kF32Merge;
  switch (p.layout) {
    case Layout::kNT:
      if (p.scales_segments) return ConfigId::kF32ShrinkScaled;
      if (p.N <= 40) return ConfigId::kF32Shrink40;
      return p.N <= 80 ? ConfigId::kF32Shrink80 : ConfigId::kF32Shrink160;
    case Layout::kNN:
      return p.scales_segments ? ConfigId::kF32ExpandScaled : ConfigId::kF32Expand;
    default:
      if (p.scales_segments) return ConfigId::kF32WgradScaled;
      if (p.M <= 48) return ConfigId::kF32Wgrad48;
      return p.M <= 80 ? ConfigId::kF32Wgrad80 : ConfigId::kF32Wgrad160;
  }
}

// Whether an F32 program runs on the kernels; if not, the library computes it. They read and write
// float32, bfloat16 and float16. In full precision there is one: TN, without dropout, and with a
// scale_m for the whole sum only.
inline bool has_f32_kernels(const Program& program, bool allows_tf32) {
  const auto is_known = [](const Matrix& m) { return m.dtype != DType::kF64; };
  bool has_kernel = allows_tf32 || program.is_full_precision;
  for (const Problem& p : program.problems) {
    has_kernel &= is_known(p.C) && is_known(p.C_in);
    if (program.is_full_precision) has_kernel &= p.num_segments <= 1 && p.drop_threshold == 0;
  }
  for (const Segment& s : program.segments) has_kernel &= is_known(s.A) && is_known(s.B);
  for (const Group& group : program.groups) {
    if (program.is_full_precision) has_kernel &= group.layout == Layout::kTN;
  }
  return has_kernel && program.scale_dtype != DType::kF64;
}

}  // namespace rasa::cuda
