// NT GEMM for sm_90a: C (M,N) = (A (M,K) · B (N,K)ᵀ) · diag(scale).
//
// A producer warp fills three stages by TMA (128-byte swizzle); a consumer warpgroup multiplies
// them by wgmma. Full and empty mbarriers hand the stages over. The 64 × 64 tile leaves through
// stmatrix, a proxy fence and a TMA store. A macro SEED_x plants one defect.
#include <stdint.h>

struct alignas(64) TensorMap {  // CUtensorMap
  uint64_t opaque[16];
};

constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 64, kStages = 3, kProducer = 4;
constexpr int kBytesA = kBlockM * kBlockK * 2, kBytesB = kBlockN * kBlockK * 2,
              kStageBytes = kBytesA + kBytesB;

__device__ uint32_t smem_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], "
      "%1;\n@done bra READY;\nbra "
      "AGAIN;\nREADY:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void load_box(uint32_t target, const TensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// K-major operand with 128-byte swizzle; eight rows are 1024 bytes apart.
__device__ uint64_t descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, "
      "0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%"
      "25,%26,%27,%28,%29,%30,%31},"
      " %32, %33, p, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"((int)accumulate));
}

struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

__device__ void produce(Barriers& barriers, uint32_t base, const TensorMap* map_a,
                        const TensorMap* map_b, int num_steps, int m0, int n0) {
  for (int i = 0; i < num_steps; ++i) {
    const int stage = i % kStages, phase = i / kStages & 1;
#if !defined(SEED_NO_EMPTY_WAIT)
    wait(smem_address(barriers.empty + stage), phase ^ 1);
#endif
    const uint32_t full = smem_address(barriers.full + stage), tile = base + stage * kStageBytes;
#if defined(SEED_FEWER_BYTES)
    expect(full, kBytesA);
#elif defined(SEED_MORE_BYTES)
    expect(full, kStageBytes + 16);
#else
    expect(full, kStageBytes);
#endif
    load_box(tile, map_a, i * kBlockK, m0, full);
    load_box(tile + kBytesA, map_b, i * kBlockK, n0, full);
  }
}

__device__ void consume(float (&d)[32], Barriers& barriers, uint32_t base, int num_steps) {
  for (int i = 0; i < num_steps; ++i) {
    const int stage = i % kStages, phase = i / kStages & 1;
#if defined(SEED_WRONG_PARITY)
    wait(smem_address(barriers.full + stage), phase ^ 1);
#else
    wait(smem_address(barriers.full + stage), phase);
#endif
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint32_t tile = base + stage * kStageBytes;
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k)
      multiply(d, descriptor(tile + k * 32), descriptor(tile + kBytesA + k * 32), i + k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#if defined(SEED_EARLY_RELEASE)
    if ((threadIdx.x & 31) == 0) arrive(smem_address(barriers.empty + stage));
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if ((threadIdx.x & 31) == 0) arrive(smem_address(barriers.empty + stage));
#endif
  }
}

__device__ void store_tile(const float (&d)[32], const float* scale, const TensorMap* map_c,
                           uint32_t tile, int m0, int n0, int N) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {  // 16 rows × 16 columns per stmatrix.x4
    uint32_t r[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int e = (j + (q >> 1)) * 4 + (q & 1) * 2, n = n0 + (j + (q >> 1)) * 8 + (lane & 3) * 2;
      const float low = d[e] * (n < N ? scale[n] : 0.f);
      const float high = d[e + 1] * (n + 1 < N ? scale[n + 1] : 0.f);
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r[q]) : "f"(high), "f"(low));
    }
    const int row = warp * 16 + (lane & 7) + (lane >> 3 & 1) * 8, chunk = j + (lane >> 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     tile + row * 128 + (chunk ^ row & 7) * 16),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#if !defined(SEED_NO_PROXY_FENCE)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  asm volatile("bar.sync 1, 128;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
            map_c),
        "r"(tile), "r"(n0), "r"(m0)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#if !defined(SEED_NO_STORE_WAIT)
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
  }
}

extern "C" __global__ void __launch_bounds__(160)
    gemm_wgmma(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
               const __grid_constant__ TensorMap map_c, const float* scale, int N, int K) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ __align__(8) Barriers barriers;
  const int m0 = blockIdx.y * kBlockM, n0 = blockIdx.x * kBlockN,
            num_steps = (K + kBlockK - 1) / kBlockK;
  const uint32_t base = smem_address(smem);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init(smem_address(barriers.full + s), 1);
      init(smem_address(barriers.empty + s), 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();  // the barriers are initialised
  if (threadIdx.x >> 5 == kProducer) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if ((threadIdx.x & 31) == 0) produce(barriers, base, &map_a, &map_b, num_steps, m0, n0);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    float d[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) d[i] = 0;
    consume(d, barriers, base, num_steps);
    store_tile(d, scale, &map_c, base + kStages * kStageBytes, m0, n0, N);
  }
}

// One warp: C (16,8) = A (16,32) · B (8,32)ᵀ in fp8 e4m3.
extern "C" __global__ void multiply_e4m3(const uint8_t* A, const uint8_t* B, float* C) {
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  uint32_t a[4], b[2];
  float c[4] = {};
  for (int i = 0; i < 4; ++i)
    a[i] = *(const uint32_t*)(A + (g + 8 * (i & 1)) * 32 + t * 4 + 16 * (i >> 1));
  for (int i = 0; i < 2; ++i) b[i] = *(const uint32_t*)(B + g * 32 + t * 4 + 16 * i);
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int q = 0; q < 4; ++q) C[(g + (q >> 1) * 8) * 8 + t * 2 + (q & 1)] = c[q];
}
