// Matrix fragments of tensor-core instructions. Products are summed in float in the order of k,
// then added to C: the hardware's order and intermediate precision are not specified.
#pragma once
#include "half.h"

namespace ptx {

// Mirrored by warp.py.
enum class MmaType : u32 { kF16, kBF16, kTF32, kE4M3, kE5M2 };

constexpr u32 elements_per_word(MmaType type) {
  return type == MmaType::kTF32 ? 1 : type == MmaType::kF16 || type == MmaType::kBF16 ? 2 : 4;
}

inline float e4m3_to_float(u8 x) {
  const int exponent = x >> 3 & 15, fraction = x & 7;
  float value = exponent ? ldexpf(1 + fraction / 8.f, exponent - 7) : ldexpf(fraction / 8.f, -6);
  if ((x & 127) == 127) value = NAN;
  return x & 128 ? -value : value;
}

// Element i of a register.
template <MmaType kType>
inline float element(u32 word, u32 i) {
  if constexpr (kType == MmaType::kTF32) {
    word &= 0xffffe000;  // the hardware ignores the low 13 bits
    float f;
    memcpy(&f, &word, 4);
    return f;
  }
  if constexpr (kType == MmaType::kBF16) return to_float(BF16{static_cast<u16>(word >> 16 * i)});
  if constexpr (kType == MmaType::kF16) return to_float(F16{static_cast<u16>(word >> 16 * i)});
  const u8 byte = word >> 8 * i;
  if constexpr (kType == MmaType::kE5M2) return to_float(F16{static_cast<u16>(byte << 8)});
  return e4m3_to_float(byte);
}

inline float element(MmaType type, u32 word, u32 i) {
  switch (type) {
    case MmaType::kF16:
      return element<MmaType::kF16>(word, i);
    case MmaType::kBF16:
      return element<MmaType::kBF16>(word, i);
    case MmaType::kTF32:
      return element<MmaType::kTF32>(word, i);
    case MmaType::kE4M3:
      return element<MmaType::kE4M3>(word, i);
    case MmaType::kE5M2:
      return element<MmaType::kE5M2>(word, i);
  }
  return NAN;
}

// A (16,K): register r of lane l holds row l/4 + 8 (r%2), columns (l%4) E .. + 4 E (r/2), E
// elements each. Filled as A^T (K,16).
template <MmaType kType>
void read_fragment_a(const u32* const* a, u32 K, float (*At)[16]) {
  constexpr u32 E = elements_per_word(kType);
  for (u32 r = 0; r < K / (4 * E) * 2; ++r) {
    for (u32 t = 0; t < 4; ++t) {
      for (u32 i = 0; i < E; ++i) {
        float* row = At[t * E + i + (r >> 1) * 4 * E] + 8 * (r & 1);
        for (u32 g = 0; g < 8; ++g) row[g] = element<kType>(a[r][g * 4 + t], i);
      }
    }
  }
}

inline void read_fragment_a(MmaType type, const u32* const* a, u32 K, float (*At)[16]) {
  switch (type) {
    case MmaType::kF16:
      return read_fragment_a<MmaType::kF16>(a, K, At);
    case MmaType::kBF16:
      return read_fragment_a<MmaType::kBF16>(a, K, At);
    case MmaType::kTF32:
      return read_fragment_a<MmaType::kTF32>(a, K, At);
    case MmaType::kE4M3:
      return read_fragment_a<MmaType::kE4M3>(a, K, At);
    case MmaType::kE5M2:
      return read_fragment_a<MmaType::kE5M2>(a, K, At);
  }
}

// sum (16) = A (16,K) b (K), with A given as A^T.
inline void multiply_column(const float (*At)[16], const float* b, u32 K, float* sum) {
  float total[16] = {};
  for (u32 k = 0; k < K; ++k) {
    for (u32 i = 0; i < 16; ++i) total[i] = __builtin_fmaf(At[k][i], b[k], total[i]);
  }
  memcpy(sum, total, sizeof total);
}

}  // namespace ptx
