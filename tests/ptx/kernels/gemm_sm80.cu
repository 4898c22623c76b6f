// NT GEMM for sm_80: C (M,N) = (A (M,K) · B (N,K)ᵀ) · diag(scale), and two ways to split its K.
//
// One block of 4 warps computes a 64 × 64 tile; three stages of cp.async feed ldmatrix and
// mma.sync. A macro SEED_x plants one defect; without any, the kernel is correct.
//
// Shared memory, per stage:   A 64 × 32 16-bit, then B 64 × 32, in 64-byte rows of four 16-byte
// chunks, swizzled.
#include <stdint.h>

// The 16-bit types without cuda_bf16.h and cuda_fp16.h, which take longer to compile than the
// kernel.
struct BF16 {
  uint16_t bits;
  BF16() = default;
  __device__ explicit BF16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
};
struct F16 {
  uint16_t bits;
  F16() = default;
  __device__ explicit F16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
};

constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 32, kStages = 3, kThreads = 128;
constexpr int kBytesA = kBlockM * kBlockK * 2, kStageBytes = (kBlockM + kBlockN) * kBlockK * 2;

#if defined(SEED_WAIT_OFF_BY_ONE)
constexpr int kPending = kStages - 1;
#else
constexpr int kPending = kStages - 2;
#endif

__device__ uint32_t dynamic_smem() {
  extern __shared__ __align__(128) unsigned char smem[];
  return (uint32_t)__cvta_generic_to_shared(smem);
}

__device__ void copy_async(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BF16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte offset of a chunk. Two rows share a 128-byte line, so rows r and r + 2 must not use the same
// chunk.
__device__ uint32_t swizzle(int row, int chunk) {
#if defined(SEED_NO_SWIZZLE)
  return row * 64 + chunk * 16;
#else
  return row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
#endif
}

// Rows at and past num_rows and columns at and past k_end are zero-filled: the mma sums them.
template <class T>
__device__ void load_tile(uint32_t smem, const T* X, int ld, int first_row, int num_rows, int k,
                          int k_end) {
#pragma unroll
  for (int i = 0; i < kBlockM * 4 / kThreads; ++i) {
    const int c = threadIdx.x + i * kThreads, row = c >> 2, chunk = c & 3;
    const int m = first_row + row, column = k + chunk * 8;
#if defined(SEED_LOST_ROW_PREDICATE)
    const bool inside = column < k_end;
#else
    const bool inside = m < num_rows && column < k_end;
#endif
    copy_async(smem + swizzle(row, chunk), inside ? X + (size_t)m * ld + column : X,
               inside ? 16 : 0);
  }
}

template <class T>
__device__ void multiply_stage(float (&acc)[2][4][4], uint32_t smem_a, uint32_t smem_b, int warp_m,
                               int warp_n) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < kBlockK / 16; ++k) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_matrices(a[i], smem_a + swizzle(warp_m + i * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = warp_n + j * 16 + (lane & 7) + ((lane >> 4) << 3);
      load_matrices(b[j], smem_b + swizzle(row, k * 2 + (lane >> 3 & 1)));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t b0 = b[j >> 1][(j & 1) * 2], b1 = b[j >> 1][(j & 1) * 2 + 1];
#if defined(SEED_SWAPPED_OPERANDS)
        multiply(acc[i][j], a[i], b1, b0, T());
#else
        multiply(acc[i][j], a[i], b0, b1, T());
#endif
      }
  }
}

// acc += A[m0 :, k_begin : k_end] · B[n0 :, k_begin : k_end]ᵀ.
// Invariant at the top of the loop: stages it … it + kStages - 2 are in flight.
template <class T>
__device__ void mainloop(float (&acc)[2][4][4], const T* A, const T* B, int M, int N, int K,
                         int k_begin, int k_end, int m0, int n0) {
  const int warp = threadIdx.x >> 5, warp_m = (warp >> 1) * 32, warp_n = (warp & 1) * 32;
  const uint32_t base = dynamic_smem();
  const auto load_stage = [&](int stage, int k) {
    const uint32_t tile = base + stage * kStageBytes;
    load_tile(tile, A, K, m0, M, k, k_end);
    load_tile(tile + kBytesA, B, K, n0, N, k, k_end);
  };
  const int num_steps = (k_end - k_begin + kBlockK - 1) / kBlockK;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < num_steps) load_stage(s, k_begin + s * kBlockK);
    commit_copies();
  }
  for (int it = 0; it < num_steps; ++it) {
#if !defined(SEED_NO_WAIT)
    wait_for_copies<kPending>();
#endif
#if !defined(SEED_NO_BARRIER)
    __syncthreads();  // stage `it` has landed for every warp, and every warp has read stage it - 1
#endif
    const int next = it + kStages - 1;
#if defined(SEED_EARLY_REUSE)
    if (next < num_steps) load_stage(it % kStages, k_begin + next * kBlockK);
#else
    if (next < num_steps) load_stage(next % kStages, k_begin + next * kBlockK);
#endif
    commit_copies();
    const uint32_t tile = base + it % kStages * kStageBytes;
    multiply_stage<T>(acc, tile, tile + kBytesA, warp_m, warp_n);
  }
  wait_for_copies<0>();
}

// Calls f(row, column, value) for each element this thread holds.
template <class F>
__device__ void for_each_accumulator(const float (&acc)[2][4][4], int m0, int n0, F f) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        f(m0 + (warp >> 1) * 32 + i * 16 + (lane >> 2) + (q >> 1) * 8,
          n0 + (warp & 1) * 32 + j * 8 + (lane & 3) * 2 + (q & 1), acc[i][j][q]);
}

template <class T>
__device__ void gemm(const T* A, const T* B, const float* scale, T* C, int M, int N, int K) {
  const int m0 = blockIdx.y * kBlockM, n0 = blockIdx.x * kBlockN;
  float acc[2][4][4] = {};
  mainloop<T>(acc, A, B, M, N, K, 0, K, m0, n0);
  for_each_accumulator(acc, m0, n0, [&](int m, int n, float value) {
#if defined(SEED_STORE_PAST_LAST_ROW)
    if (n < N) C[(size_t)m * N + n] = T(value * scale[n]);
#else
    if (m < M && n < N) C[(size_t)m * N + n] = T(value * scale[n]);
#endif
  });
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_bf16(const BF16* A, const BF16* B, const float* scale, BF16* C, int M, int N, int K) {
  gemm(A, B, scale, C, M, N, K);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_f16(const F16* A, const F16* B, const float* scale, F16* C, int M, int N, int K) {
  gemm(A, B, scale, C, M, N, K);
}

// blockIdx.z takes K range [z·k_chunk, …) and adds its part to C.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_split_atomic(const BF16* A, const BF16* B, float* C, int M, int N, int K, int k_chunk) {
  const int m0 = blockIdx.y * kBlockM, n0 = blockIdx.x * kBlockN, k_begin = blockIdx.z * k_chunk;
  float acc[2][4][4] = {};
  mainloop<BF16>(acc, A, B, M, N, K, k_begin, min(K, k_begin + k_chunk), m0, n0);
  for_each_accumulator(acc, m0, n0, [&](int m, int n, float value) {
    if (m >= M || n >= N) return;
#if defined(SEED_PLUS_EQUALS)
    C[(size_t)m * N + n] += value;
#else
    atomicAdd(C + (size_t)m * N + n, value);
#endif
  });
}

// Adds 1 to a counter that starts at zero. Returns the old value; orders this thread's earlier
// writes before the increment and its later reads after it.
__device__ uint32_t increment(uint32_t* counter) {
  uint32_t old;
#if defined(SEED_NO_RELEASE)
  asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(old)
               : "l"(counter)
               : "memory");
#elif defined(SEED_NO_ACQUIRE)
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(old)
               : "l"(counter)
               : "memory");
#else
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(old)
               : "l"(counter)
               : "memory");
#endif
  return old;
}

// Every split writes its part to workspace (splits, M, N); the block that arrives last at the
// tile's counter sums the parts in split order, so that C is the same in every run.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_split_ordered(const BF16* A, const BF16* B, float* C, float* workspace, uint32_t* counters,
                       int M, int N, int K, int k_chunk) {
  __shared__ uint32_t arrivals;
  const int m0 = blockIdx.y * kBlockM, n0 = blockIdx.x * kBlockN, k_begin = blockIdx.z * k_chunk;
  float acc[2][4][4] = {};
  mainloop<BF16>(acc, A, B, M, N, K, k_begin, min(K, k_begin + k_chunk), m0, n0);
  for_each_accumulator(acc, m0, n0, [&](int m, int n, float value) {
    if (m < M && n < N) workspace[((size_t)blockIdx.z * M + m) * N + n] = value;
  });
#if !defined(SEED_NO_BARRIER_BEFORE_RELEASE)
  __syncthreads();  // all parts of this block are written before thread 0 releases them
#endif
  if (threadIdx.x == 0) arrivals = increment(counters + blockIdx.y * gridDim.x + blockIdx.x);
  __syncthreads();  // what thread 0 has acquired holds for the block
  if (arrivals != gridDim.z - 1) return;
  for_each_accumulator(acc, m0, n0, [&](int m, int n, float) {
    if (m >= M || n >= N) return;
    float sum = 0;
    for (int z = 0; z < gridDim.z; ++z) sum += workspace[((size_t)z * M + m) * N + n];
    C[(size_t)m * N + n] = sum;
  });
}
