// The second launch of a split reduction: C = C_in + keep_scale · scale_m ∘ Σ_p partial p, rounded
// once. A diagonal is a problem of one row.
//
// The sum's order depends on num_partials alone, so results repeat bit by bit. A thread has 4
// columns of one row. Where there are many partials of a short matrix, they are dealt out to
// kReduceGroups threads, whose sums are added in the order of the groups.
#pragma once

#include "element.cuh"
#include "gemm_config.h"
#include "operand_tile.cuh"
#include "split.h"

namespace rasa::cuda {

template <class Element>
__device__ __forceinline__ void store_reduced(uint64_t out, const KernelArgs& args,
                                              const ProblemArg& problem, int m, int n, float4 v) {
  float factor = problem.keep_scale;
  if (problem.scale_m != nullptr) factor *= load_scale(problem.scale_m, m, args.scale_dtype);
  v = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
  const int count = problem.N - n;
  if (const uint64_t in = row_address(args, problem.C_in, m)) {
    const float4 base = load_4<Element>(in, n, count, problem.C_in);
    v = {v.x + base.x, v.y + base.y, v.z + base.z, v.w + base.w};
  }
  store_4<Element>(out, n, count, problem.C, v);
}

__device__ __forceinline__ void add(float4& sum, const float4& x) {
  sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
}

template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials(const __grid_constant__ ArgsBlock<arg_bytes(ConfigId::kReduce)> args) {
  __shared__ float4 group_sums[kReduceThreads];
#pragma unroll 1
  for (int tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
    const int index = args.problem_of(tile);
    const ProblemArg& problem = args.problem(index);
    const ReducePlace place =
        reduce_place(tile - args.tile_start(index), threadIdx.x, problem.num_partials, problem.N);
    const int m = place.m, n = place.n;
    const uint64_t out = m < problem.M ? row_address(args, problem.C, m) : 0;
    const int64_t size = partial_size(problem.M, problem.N);
    const float* partials = args.workspace_floats(problem.partials_at) + int64_t{4} * place.quad;
    float4 sum = {};
    if (out != 0) {
#pragma unroll 4
      for (int p = place.group; p < problem.num_partials; p += place.groups) {
        add(sum, *reinterpret_cast<const float4*>(partials + p * size));
      }
    }
    if (place.groups > 1) {
      __syncthreads();  // the sums of the tile before are read
      group_sums[threadIdx.x] = sum;
      __syncthreads();  // these are written
      for (int g = 1; place.group == 0 && g < place.groups; ++g) {
        add(sum, group_sums[g * kReduceThreads / place.groups + threadIdx.x]);
      }
    }
    if (out != 0 && place.group == 0) store_reduced<Element>(out, args, problem, m, n, sum);
  }
}

}  // namespace rasa::cuda
