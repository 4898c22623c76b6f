// Access patterns with known sectors, wavefronts and instruction counts.
#include <stdint.h>

extern "C" __global__ void copy_strided(const float* x, float* y, int stride, int offset) {
  y[threadIdx.x] = x[threadIdx.x * stride + offset];
}

extern "C" __global__ void copy_vector(const float4* x, float4* y) {
  y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void read_twice(const float* x, float* y) {
  const float first = x[threadIdx.x];  // line A: both blocks read the same 128 bytes
  y[blockIdx.x * 32 + threadIdx.x] = first;
  atomicAdd(y + 64 + (threadIdx.x & 7), 1.f);
}

extern "C" __global__ void shared_strided(float* y, int stride) {
  __shared__ float s[32 * 33];
  for (int i = threadIdx.x; i < 32 * 33; i += 32) s[i] = i;
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x * stride];
}

extern "C" __global__ void shared_vector(float4* y, int stride) {
  __shared__ float4 s[32 * 9];
  for (int i = threadIdx.x; i < 32 * 9; i += 32) s[i] = make_float4(i, 1, 2, 3);
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x * stride];
}

// cp.async of 16 bytes with a source size: the rest of the 16 bytes is zero.
extern "C" __global__ void copy_zero_fill(const unsigned char* x, uint4* y, const int* sizes) {
  __shared__ uint4 s[32];
  const uint32_t target = (uint32_t)__cvta_generic_to_shared(s + threadIdx.x);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
               "l"(x + 16 * threadIdx.x), "r"(sizes[threadIdx.x])
               : "memory");
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
  y[threadIdx.x] = s[threadIdx.x];
}
