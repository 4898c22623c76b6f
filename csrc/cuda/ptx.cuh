// One function per PTX instruction the kernels use, and nothing else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rasa::cuda {

// The 32-bit shared-memory address that the instructions below take.
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// cp.async: 16 bytes, global → shared, past L1; bytes from num_bytes on are zeros, and only the
// first num_bytes of source are read. Both addresses are multiples of 16. Any thread may call it.
// Complete for this thread after cp_async_wait, for others after a barrier that follows it.
// PTX ISA, "cp.async"; sm_80+
__device__ __forceinline__ void cp_async_16(uint32_t smem, uint64_t source, int32_t num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(source),
               "r"(num_bytes)
               : "memory");
}

// cp.async.commit_group: makes this thread's copies since the last commit one group; the group may
// be empty. Any thread. Orders nothing by itself.                      PTX ISA, "cp.async"; sm_80+
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: returns when at most kPending of this thread's committed groups are in
// flight. Says nothing of other threads' copies: follow with __syncthreads.
// PTX ISA, "cp.async"; sm_80+
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ldmatrix.x4: four 8 × 8 b16 matrices, shared → registers. Lane l passes the 16-byte-aligned
// address of row l % 8 of matrix l / 8. Warp-collective, converged. Complete on return.
// Volatile with a "memory" clobber: the same addresses hold another k block in a later turn.
// PTX ISA, "ldmatrix"; sm_75+
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

// ldmatrix.x4.trans: as ldmatrix_x4, and each matrix is transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

// ldmatrix.x2: as ldmatrix_x4 with two matrices; the addresses of lanes 16 to 31 are not used.
__device__ __forceinline__ void ldmatrix_x2(uint32_t& r0, uint32_t& r1, uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(smem)
               : "memory");
}

// movmatrix.trans: transposes an 8 × 8 b16 matrix held as lane l: row l / 4, columns 2 (l % 4) and
// one more. Warp-collective, converged. Complete on return.         PTX ISA, "movmatrix"; sm_75+
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t matrix) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

// mma.m16n8k16: c (16,8) += a (16,16) · b (16,8), fp32 accumulators. Warp-collective, converged.
// Complete on return. smem_layout.h says which lane holds which element.
// PTX ISA, "mma"; sm_80+
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.m16n8k8 of tf32: c (16,8) += a (16,8) · b (8,8), fp32 accumulators. Operands are fp32 bits
// that cvt_rna_tf32 has rounded; of others the low 13 bits are ignored. Warp-collective, converged.
// Complete on return. smem_layout_f32.h says which lane holds which element.
// PTX ISA, "mma"; sm_80+
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t* a,
                                                 const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// cvt.rna.tf32: x rounded to 10 bits of fraction, ties away from zero, as fp32 bits. Any thread.
// Complete on return.                                                    PTX ISA, "cvt"; sm_80+
__device__ __forceinline__ uint32_t cvt_rna_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// ld.shared: 4 or 8 bytes, from an address that is a multiple of that. Any thread. Complete on
// return. Volatile with a "memory" clobber, as ldmatrix_x4.             PTX ISA, "ld"; sm_20+
__device__ __forceinline__ float ld_shared(uint32_t smem) {
  float result;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(result) : "r"(smem) : "memory");
  return result;
}
__device__ __forceinline__ float2 ld_shared_2(uint32_t smem) {
  float2 result;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
               : "=f"(result.x), "=f"(result.y)
               : "r"(smem)
               : "memory");
  return result;
}

// prmt with sign replication: each half of the result is 0xffff or 0 as its bit 15 in x is set or
// not. Any thread. Complete on return. Not __byte_perm, which cannot replicate signs.
// PTX ISA, "prmt"; sm_20+
__device__ __forceinline__ uint32_t spread_half_signs(uint32_t x) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %1, 0xBB99;" : "=r"(result) : "r"(x));
  return result;
}

}  // namespace rasa::cuda
