// Accumulators → C = C_in + keep_scale · scale_m ∘ sum, rounded once; or → a partial, as they are.
//
// A lane's accumulators are 8 bytes of each of many rows. Each warp passes 16 rows at a time
// through shared memory, so that its loads of C_in and stores of C are whole sectors.
#pragma once

#include "element.cuh"
#include "operand_tile.cuh"

namespace rasa::cuda {

struct EpilogueRows {
  const uint64_t* C;  // addresses of the tile's rows of C, 0 for one that is not written
  const uint64_t* C_in;
};

// The addresses of rows first … of partial `split`; 0 for a row of C that is not wanted.
__device__ __forceinline__ void write_partial_rows(uint64_t* table, int num_rows,
                                                   const KernelArgs& args,
                                                   const ProblemArg& problem, int first,
                                                   int split) {
  const float* partials = args.workspace_floats(problem.partials_at);
  for (int i = threadIdx.x; i < num_rows; i += blockDim.x) {
    const int m = first + i;
    const bool is_wanted = m < problem.M && row_address(args, problem.C, m) != 0;
    const float* row = partials + partial_row(split, problem.M, problem.N, m);
    table[i] = is_wanted ? reinterpret_cast<uint64_t>(row) : 0;
  }
}

// rows16 (16, kWarpN): the warp's rows from row0 of the tile on, at columns n0 of C.
template <int kWarpN, int kPitch, class Element>
__device__ __forceinline__ void store_rows(const float* rows16, const EpilogueRows& rows, int row0,
                                           int m0, int n0, const ProblemArg& problem,
                                           DType scale_dtype) {
  constexpr int kQuads = kWarpN / 4;
#pragma unroll 2
  for (int index = threadIdx.x % 32; index < 16 * kQuads; index += 32) {
    const int row = index / kQuads, column = index % kQuads * 4;
    const int count = problem.N - (n0 + column);
    const uint64_t out = rows.C[row0 + row];
    if (out == 0 || count <= 0) continue;
    float4 v = *reinterpret_cast<const float4*>(rows16 + row * kPitch + column);
    if (problem.partials_at >= 0) {
      *reinterpret_cast<float4*>(out + int64_t{4} * (n0 + column)) = v;
      continue;
    }
    float factor = problem.keep_scale;
    if (problem.scale_m != nullptr) {
      factor *= load_scale(problem.scale_m, m0 + row0 + row, scale_dtype);
    }
    v = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
    if (const uint64_t in = rows.C_in[row0 + row]) {
      const float4 base = load_4<Element>(in, n0 + column, count, problem.C_in);
      v = {v.x + base.x, v.y + base.y, v.z + base.z, v.w + base.w};
    }
    store_4<Element>(out, n0 + column, count, problem.C, v);
  }
}

// C (1,M), or its partial, from those of the 16 rows' elements that are on the diagonal. m0, n0: of
// the first one.
template <int kCols, int kPitch, class Element>
__device__ __forceinline__ void store_diagonal(const float* rows16, int m0, int n0, int split,
                                               const ProblemArg& problem, const KernelArgs& args) {
  const int row = threadIdx.x % 32, m = m0 + row, column = m - n0;
  if (row >= 16 || column < 0 || column >= kCols || m >= problem.M) return;
  const float v = rows16[row * kPitch + column];
  if (problem.partials_at >= 0) {
    args.workspace_floats(problem.partials_at)[partial_row(split, 1, problem.M, 0) + m] = v;
  } else {
    store_4<Element>(row_address(args, problem.C, 0), m, 1, problem.C, {v, 0, 0, 0});
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
