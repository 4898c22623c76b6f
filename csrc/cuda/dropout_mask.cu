// Draws dropout_mask.h's matrix on a GPU: for dropout_mask and the library launcher. The GEMM
// kernels draw their masks in registers (dropout.cuh).
#include <algorithm>

#include "launch.h"

namespace rasa::cuda {

__global__ void draw_dropout_mask(const __grid_constant__ MaskArgs args) {
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const int64_t lanes = num_mask_lanes(args.M, args.K);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < lanes;
       i += int64_t{gridDim.x} * blockDim.x) {
    draw_mask_lane(args, seed, i);
  }
}

cudaError_t draw_mask(const MaskArgs& args, cudaStream_t stream) {
  constexpr int64_t kThreads = 256, kMaxBlocks = 4096;
  const int64_t blocks = std::min(ceil_div(num_mask_lanes(args.M, args.K), kThreads), kMaxBlocks);
  if (blocks == 0) return cudaSuccess;
  draw_dropout_mask<<<static_cast<int>(blocks), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace rasa::cuda
