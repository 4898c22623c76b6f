// The element types, and loads that convert.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernel_args.h"

namespace rasa::cuda {

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void round_to(float x, __half& out) { out = __float2half_rn(x); }

// Two elements in a register, the first in the low half.
__device__ __forceinline__ uint32_t pack(float lo, float hi, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(float lo, float hi, __half) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
__device__ __forceinline__ float2 unpack(uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <class Element>
__device__ __forceinline__ uint4 pack_8(const float (&v)[8], Element) {
  return {pack(v[0], v[1], Element()), pack(v[2], v[3], Element()), pack(v[4], v[5], Element()),
          pack(v[6], v[7], Element())};
}
template <class Element>
__device__ __forceinline__ void unpack_8(float (&v)[8], const uint4& pairs, Element) {
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], Element());
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

template <class Element>
__device__ __forceinline__ float load_as_float(uint64_t row, int i, bool is_f32) {
  return is_f32 ? reinterpret_cast<const float*>(row)[i]
                : to_float(reinterpret_cast<const Element*>(row)[i]);
}

__device__ __forceinline__ float load_scale(const void* scale, int i, DType dtype) {
  if (dtype == DType::kF32) return static_cast<const float*>(scale)[i];
  if (dtype == DType::kBF16) return to_float(static_cast<const __nv_bfloat16*>(scale)[i]);
  return to_float(static_cast<const __half*>(scale)[i]);
}

// Factors from i on, of which `count` exist; zeros beyond.
__device__ __forceinline__ void load_scales(float (&v)[4], const void* scale, int i, int count,
                                            DType dtype) {
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = j < count ? load_scale(scale, i + j, dtype) : 0.0f;
}
__device__ __forceinline__ void load_scales(float (&v)[8], const void* scale, int i, int count,
                                            DType dtype) {
  const uint64_t address = reinterpret_cast<uint64_t>(scale) + int64_t{2} * i;
  if (dtype != DType::kF32 && count >= 8 && address % 16 == 0) {
    const uint4 pairs = *reinterpret_cast<const uint4*>(address);
    if (dtype == DType::kBF16) {
      unpack_8(v, pairs, __nv_bfloat16());
    } else {
      unpack_8(v, pairs, __half());
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = j < count ? load_scale(scale, i + j, dtype) : 0.0f;
}

// 4 elements of a row from i on, of which `count` exist; zeros beyond.
template <class Element>
__device__ __forceinline__ float4 load_4(uint64_t row, int i, int count, const MatrixArg& matrix) {
  if (count >= 4 && matrix.is_aligned) {
    if (matrix.is_f32) return *reinterpret_cast<const float4*>(row + int64_t{4} * i);
    const uint2 pairs = *reinterpret_cast<const uint2*>(row + int64_t{2} * i);
    const float2 lo = unpack(pairs.x, Element()), hi = unpack(pairs.y, Element());
    return {lo.x, lo.y, hi.x, hi.y};
  }
  const auto at = [&](int j) {
    return j < count ? load_as_float<Element>(row, i + j, matrix.is_f32) : 0.0f;
  };
  return {at(0), at(1), at(2), at(3)};
}
template <>
__device__ __forceinline__ float4 load_4<float>(uint64_t row, int i, int count,
                                                const MatrixArg& matrix) {
  return matrix.is_f16 ? load_4<__half>(row, i, count, matrix)
                       : load_4<__nv_bfloat16>(row, i, count, matrix);
}

// A chunk of the kernel's elements, likewise; 16 bytes of storage in one load, so that no sector is
// asked for twice.
template <class Element>
__device__ __forceinline__ void load_chunk(float (&v)[8], uint64_t row, int i, int count,
                                           const MatrixArg& matrix) {
  if (count >= 8 && matrix.is_aligned && !matrix.is_f32) {
    unpack_8(v, *reinterpret_cast<const uint4*>(row + int64_t{2} * i), Element());
    return;
  }
  const float4 lo = load_4<Element>(row, i, count, matrix);
  const float4 hi = load_4<Element>(row, i + 4, count - 4, matrix);
  v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
  v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
}
template <class Element>
__device__ __forceinline__ void load_chunk(float (&v)[4], uint64_t row, int i, int count,
                                           const MatrixArg& matrix) {
  const float4 chunk = load_4<Element>(row, i, count, matrix);
  v[0] = chunk.x, v[1] = chunk.y, v[2] = chunk.z, v[3] = chunk.w;
}

template <class Element>
__device__ __forceinline__ uint4 pack_chunk(const float (&v)[8]) {
  return pack_8(v, Element());
}
template <class Element>
__device__ __forceinline__ uint4 pack_chunk(const float (&v)[4]) {
  return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
          __float_as_uint(v[3])};
}

template <class Element>
__device__ __forceinline__ void store_4(uint64_t row, int i, int count, const MatrixArg& matrix,
                                        const float4& v) {
  if (count >= 4 && matrix.is_aligned) {
    if (matrix.is_f32) {
      *reinterpret_cast<float4*>(row + int64_t{4} * i) = v;
    } else {
      *reinterpret_cast<uint2*>(row + int64_t{2} * i) = {pack(v.x, v.y, Element()),
                                                         pack(v.z, v.w, Element())};
    }
    return;
  }
  const auto put = [&](int j, float x) {
    if (j >= count) return;
    if (matrix.is_f32) {
      reinterpret_cast<float*>(row)[i + j] = x;
    } else {
      round_to(x, reinterpret_cast<Element*>(row)[i + j]);
    }
  };
  put(0, v.x);
  put(1, v.y);
  put(2, v.z);
  put(3, v.w);
}
template <>
__device__ __forceinline__ void store_4<float>(uint64_t row, int i, int count,
                                               const MatrixArg& matrix, const float4& v) {
  if (matrix.is_f16) {
    store_4<__half>(row, i, count, matrix, v);
  } else {
    store_4<__nv_bfloat16>(row, i, count, matrix, v);
  }
}

}  // namespace rasa::cuda
