// Reductions as users write them: softmax of a row, a histogram, atomics of every type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

extern "C" __global__ void row_softmax(const float* x, __nv_bfloat16* y, int n) {
  const float* row = x + (size_t)blockIdx.x * n;
  __shared__ float partial[32];
  const int num_warps = blockDim.x / 32;
  float top = -INFINITY;
  for (int i = threadIdx.x; i < n; i += blockDim.x) top = fmaxf(top, row[i]);
  for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = top;
  __syncthreads();
  for (int w = 0; w < num_warps; ++w) top = fmaxf(top, partial[w]);
  __syncthreads();  // every warp has read the maxima; the sums take their place
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += expf(row[i] - top);
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(~0u, sum, o);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < num_warps; ++w) sum += partial[w];
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    y[(size_t)blockIdx.x * n + i] = __float2bfloat16(expf(row[i] - top) / sum);
}

// Collatz steps of each number: a divergent loop. Votes go to ballots, one word per warp.
extern "C" __global__ void histogram(const int* x, int n, int* bins, int* steps,
                                     uint32_t* ballots) {
  __shared__ int shared_bins[16];
  if (threadIdx.x < 16) shared_bins[threadIdx.x] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x, v = i < n ? x[i] : -1;
  const uint32_t odd = __ballot_sync(~0u, v & 1);
  if ((threadIdx.x & 31) == 0 && i < n) ballots[i >> 5] = odd;
  if (v >= 0) atomicAdd(&shared_bins[v & 15], 1);
  int count = 0;
  for (int t = v; t > 1; ++count) t = (t & 1) ? 3 * t + 1 : t >> 1;
  if (v >= 0) atomicAdd(steps, count);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], shared_bins[threadIdx.x]);
}

extern "C" __global__ void atomics(float* f, __nv_bfloat162* b, __half2* h, int* s,
                                   unsigned long long* u) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(f, (float)i);
  atomicAdd(b, __floats2bfloat162_rn(1.f, 0.5f));
  atomicAdd(h, __floats2half2_rn(0.25f, 1.f));
  atomicAdd(u, (unsigned long long)i);
  atomicMax(s, i);
  atomicMin(s + 1, -i);
  atomicCAS(s + 2, 0, i + 1);
  atomicExch(s + 3, 7);
  atomicInc((unsigned*)s + 4, 9);
  atomicOr(s + 5, 1 << (i & 7));
}
