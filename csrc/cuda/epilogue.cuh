// Accumulators → C: C = C_in + keep_scale · scale_m ∘ sum, rounded once.
//
// A lane's accumulators are 8 bytes of each of many rows. Each warp passes 16 rows at a time
// through shared memory, so that its loads of C_in and stores of C are whole sectors.
#pragma once

#include "element.cuh"

namespace rasa::cuda {

struct EpilogueRows {
  const uint64_t* C;  // addresses of the tile's rows of C, 0 for one that is not written
  const uint64_t* C_in;
};

// rows16 (16, kWarpN): the warp's rows from row0 of the tile on, at columns n0 of C.
template <int kWarpN, int kPitch, class Element>
__device__ __forceinline__ void store_rows(const float* rows16, const EpilogueRows& rows, int row0,
                                           int m0, int n0, const ProblemArg& problem,
                                           const void* scale_m, DType scale_dtype) {
  constexpr int kQuads = kWarpN / 4;
#pragma unroll 2
  for (int index = threadIdx.x % 32; index < 16 * kQuads; index += 32) {
    const int row = index / kQuads, column = index % kQuads * 4;
    const int count = problem.N - (n0 + column);
    const uint64_t out = rows.C[row0 + row];
    if (out == 0 || count <= 0) continue;
    float4 v = *reinterpret_cast<const float4*>(rows16 + row * kPitch + column);
    float factor = problem.keep_scale;
    if (scale_m != nullptr) factor *= load_scale(scale_m, m0 + row0 + row, scale_dtype);
    v = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
    if (const uint64_t in = rows.C_in[row0 + row]) {
      const float4 base = load_4<Element>(in, n0 + column, count, problem.C_in);
      v = {v.x + base.x, v.y + base.y, v.z + base.z, v.w + base.w};
    }
    store_4<Element>(out, n0 + column, count, problem.C, v);
  }
}

// The m16 row of accumulators acc (kTilesN n8 tiles) into the warp's staging rows, as
// mma.m16n8k16 holds them: lane l has rows l / 4 and l / 4 + 8, columns 2 (l % 4) and one more.
template <int kTilesN, int kPitch>
__device__ __forceinline__ void stage_rows(float* rows16, const float (*acc)[4]) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
    float* out = rows16 + row * kPitch + 8 * j + column;
    *reinterpret_cast<float2*>(out) = {acc[j][0], acc[j][1]};
    *reinterpret_cast<float2*>(out + 8 * kPitch) = {acc[j][2], acc[j][3]};
  }
}

}  // namespace rasa::cuda
