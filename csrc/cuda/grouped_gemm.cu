// The kernels that exist: has_dropout_kernel() in gemm_config.h says the same to the plan.
#include "gemm_kernel_sm80.cuh"
#include "reduce_kernel.cuh"

namespace rasa::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

template __global__ void grouped_gemm_sm80<ConfigId::kShrink40, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink40, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink40, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink40, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink80, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink80, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink80, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink80, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink160, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink160, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink160, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrink160, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrinkScaled, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kShrinkScaled, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand48, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand48, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand48, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand48, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand80, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand80, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand80, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpand80, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpandScaled, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kExpandScaled, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad48, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad48, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad48, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad48, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad80, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad80, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad80, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad80, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad160, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad160, BFloat16, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad160, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgrad160, Half, true>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgradScaled, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kWgradScaled, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kMerge, BFloat16, false>(
    const __grid_constant__ KernelArgs);
template __global__ void grouped_gemm_sm80<ConfigId::kMerge, Half, false>(
    const __grid_constant__ KernelArgs);
template __global__ void reduce_partials<BFloat16>(const __grid_constant__ KernelArgs);
template __global__ void reduce_partials<Half>(const __grid_constant__ KernelArgs);

}  // namespace rasa::cuda
