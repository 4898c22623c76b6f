// Barriers, hangs and the order between blocks. A macro SEED_x plants one defect.
#include <stdint.h>

extern "C" __global__ void barrier_in_branch(int* y, int threshold) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < threshold) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void barrier_after_exit(int* y, int threshold) {
  if (threadIdx.x >= threshold) return;
  __syncthreads();
  y[threadIdx.x] = threadIdx.x;
}

// Two warps wait for each other at different barriers.
extern "C" __global__ void crossed_barriers(int* y) {
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    asm volatile("bar.sync 2, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 64;" ::: "memory");
    asm volatile("bar.sync 1, 64;" ::: "memory");
  }
  y[threadIdx.x] = threadIdx.x;
}

// Makes progress for ever: only the watchdog ends it.
extern "C" __global__ void count_for_ever(volatile int* y) {
  for (;;) y[threadIdx.x] = y[threadIdx.x] + 1;
}

extern "C" __global__ void wait_for_flag(volatile int* flag, int* y) {
  while (*flag == 0) {
  }
  y[threadIdx.x] = 1;
}

// Neighbours exchange through shared memory.
extern "C" __global__ void rotate(const int* x, int* y) {
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];
#if !defined(SEED_NO_BARRIER)
  __syncthreads();
#endif
  y[threadIdx.x] = s[(threadIdx.x + 33) & 63];
}

extern "C" __global__ void rotate_in_warp(const int* x, int* y) {
  __shared__ int s[32];
  s[threadIdx.x] = x[threadIdx.x];
#if !defined(SEED_NO_SYNCWARP)
  __syncwarp();
#endif
  y[threadIdx.x] = s[(threadIdx.x + 1) & 31];
}

extern "C" __global__ void read_uninitialised(int* y, int count) {
  __shared__ int s[64];
  if (threadIdx.x < count) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

// Blocks take turns on x: block b waits until the flag says b. Release and acquire as PTX has them.
extern "C" __global__ void take_turns(int* flag, int* x, int n) {
  const int turn = blockIdx.x;
  if (threadIdx.x == 0) {
    int seen;
    do {
#if defined(SEED_NO_ACQUIRE)
      asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
#else
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
#endif
    } while (seen != turn);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = x[i] * 2 + turn;
  __syncthreads();
  if (threadIdx.x == 0) {
#if defined(SEED_NO_RELEASE)
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(turn + 1) : "memory");
#elif defined(SEED_BLOCK_SCOPE)
    asm volatile("st.release.cta.global.s32 [%0], %1;" ::"l"(flag), "r"(turn + 1) : "memory");
#else
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(turn + 1) : "memory");
#endif
  }
}

// The same with the fences of the CUDA C++ idiom.
extern "C" __global__ void take_turns_fenced(volatile int* flag, int* x, int n) {
  const int turn = blockIdx.x;
  if (threadIdx.x == 0) {
    while (*flag != turn) {
    }
#if !defined(SEED_NO_ACQUIRE)
    __threadfence();
#endif
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = x[i] * 2 + turn;
  __syncthreads();
  if (threadIdx.x == 0) {
#if !defined(SEED_NO_RELEASE)
    __threadfence();
#endif
    *flag = turn + 1;
  }
}

extern "C" __global__ void read_neighbour(int* x, int* y) {
  x[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
  y[blockIdx.x * blockDim.x + threadIdx.x] = x[(blockIdx.x ^ 1) * blockDim.x + threadIdx.x];
}

extern "C" __global__ void exchange_in_global(int* x, int* y) {
  x[threadIdx.x] = threadIdx.x;
#if !defined(SEED_NO_BARRIER)
  __syncthreads();
#endif
  y[threadIdx.x] = x[(threadIdx.x + 32) & 63];
}

extern "C" __global__ void store_range(short* y, int first, int last) {
  for (int i = first + threadIdx.x; i < last; i += blockDim.x) y[i] = i;
}
