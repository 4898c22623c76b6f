// Plain loops that the compiler turns into vector code; built once per CPU capability (see
// tile_ops.h).
//
// Nothing here may be an inline function with external linkage outside this namespace's anonymous
// part: the linker would keep one copy of it, perhaps the one with instructions the CPU lacks.
#include "tile_ops.h"

#include "../philox.h"
#include "draw_strip.h"

#define RASA_CONCAT_(a, b) a##b
#define RASA_CONCAT(a, b) RASA_CONCAT_(a, b)

namespace rasa::cpu {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float as_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, sizeof(f));
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, sizeof(u));
  return u;
}

inline double widen(double v) { return v; }
inline float widen(float v) { return v; }
inline float widen(BF16 v) { return as_float(uint32_t{v.bits} << 16); }
inline float widen(F16 v) {
  const uint32_t sign = (uint32_t{v.bits} & 0x8000u) << 16;
  const uint32_t rest = uint32_t{v.bits} & 0x7fffu;
  // Multiplying by 2^112 rebases the exponent and normalises subnormals; infinities and NaN keep a
  // full exponent.
  const uint32_t finite = as_bits(as_float(rest << 13) * as_float(0x77800000u));
  return as_float(sign | (rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : finite));
}

template <class T>
T narrow(double v);
template <class T>
T narrow(float v);
template <>
inline double narrow<double>(double v) {
  return v;
}
template <>
inline float narrow<float>(float v) {
  return v;
}
template <>
inline BF16 narrow<BF16>(float v) {
  const uint32_t u = as_bits(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
}
template <>
inline F16 narrow<F16>(float v) {
  const uint32_t u = as_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t mag = u & 0x7fffffffu;
  // Subnormal results: adding 0.5 puts the half's last bit at the float's last bit, so the addition
  // rounds.
  const uint32_t subnormal = as_bits(as_float(mag) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (mag + 0xfffu + ((mag >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t finite = mag < 0x38800000u ? subnormal : normal;
  const uint32_t overflow = mag > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (mag >= 0x477ff000u ? overflow : finite))};
}

template <class C>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

template <class A, class B>
constexpr bool is_same_type = false;
template <class A>
constexpr bool is_same_type<A, A> = true;

// P → C: the value itself within one type, else through the accumulator type.
template <class C, class P>
inline C convert(P v) {
  if constexpr (is_same_type<C, P>) {
    return v;
  } else {
    return narrow<C>(widen(v));
  }
}

inline bool keeps(uint16_t draw, uint16_t threshold) {
  return (draw & (kDrawRange - 1)) >= threshold;
}

// v or 0, in the form in which the compiler vectorises it.
template <class C>
inline C kept_or_zero(uint16_t draw, uint16_t threshold, C v) {
  const bool kept = keeps(draw, threshold);
  if constexpr (sizeof(C) == 2) {
    return {static_cast<uint16_t>(v.bits & (kept ? 0xffffu : 0u))};
  } else {
    return kept ? v : C{0};
  }
}

// dst[i·ld + j] = src[j][i] for 16 rows of n 32-bit words.
void transpose_words(const void* const* src, int64_t n, void* dst_, int64_t ld) {
  uint32_t* dst = static_cast<uint32_t*>(dst_);
  int64_t whole = 0;
#if defined(__SSE2__)
  // In squares of 4 × 4, which every compiler can load, shuffle and store; it makes gathers of the
  // plain loop, which are ten times slower.
  const auto row = [&](int j, int64_t i) {
    return _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const char*>(src[j]) + 4 * i));
  };
  whole = n / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4) {
    for (int j = 0; j < 16; j += 4) {
      const __m128i low01 = _mm_unpacklo_epi32(row(j, i), row(j + 1, i));
      const __m128i low23 = _mm_unpacklo_epi32(row(j + 2, i), row(j + 3, i));
      const __m128i high01 = _mm_unpackhi_epi32(row(j, i), row(j + 1, i));
      const __m128i high23 = _mm_unpackhi_epi32(row(j + 2, i), row(j + 3, i));
      const auto put = [&](int64_t k, __m128i v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + (i + k) * ld + j), v);
      };
      put(0, _mm_unpacklo_epi64(low01, low23));
      put(1, _mm_unpackhi_epi64(low01, low23));
      put(2, _mm_unpacklo_epi64(high01, high23));
      put(3, _mm_unpackhi_epi64(high01, high23));
    }
  }
#endif
  for (int64_t i = whole; i < n; ++i) {
    for (int j = 0; j < 16; ++j) {
      __builtin_memcpy(dst + i * ld + j, static_cast<const char*>(src[j]) + 4 * i, 4);
    }
  }
}

template <class P, class C>
struct Loops {
  using Acc = typename AccOf<C>::type;

  static void convert_row(const void* src_, double scale_, RowMask mask, void* dst_, int64_t n) {
    const P* src = static_cast<const P*>(src_);
    C* __restrict__ dst = static_cast<C*>(dst_);
    const Acc scale = static_cast<Acc>(scale_);
    const uint16_t threshold = static_cast<uint16_t>(mask.threshold);
    const uint16_t* draws = mask.draws;
    if (scale != 1) {
      for (int64_t i = 0; i < n; ++i) {
        const uint16_t draw = draws ? draws[i] : threshold;
        dst[i] = kept_or_zero(draw, threshold, narrow<C>(widen(src[i]) * scale));
      }
    } else if (draws) {
      for (int64_t i = 0; i < n; ++i) {
        dst[i] = kept_or_zero(draws[i], threshold, convert<C>(src[i]));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = convert<C>(src[i]);
    }
  }

  static void interleave_rows(const void* const src[2], const double scale_[2],
                              const RowMask mask[2], void* dst_, int64_t n) {
    if constexpr (sizeof(C) == 2) {
      const P* row0 = static_cast<const P*>(src[0]);
      const P* row1 = static_cast<const P*>(src[1]);
      uint32_t* __restrict__ dst = static_cast<uint32_t*>(dst_);
      const Acc scale[2] = {static_cast<Acc>(scale_[0]), static_cast<Acc>(scale_[1])};
      const uint16_t threshold = static_cast<uint16_t>(mask[row0 ? 0 : 1].threshold);
      const uint16_t *draws0 = mask[0].draws, *draws1 = mask[1].draws;
      if (!row0 && !row1) {
        for (int64_t i = 0; i < n; ++i) dst[i] = 0;
      } else if ((draws0 || draws1) && (!row0 || !row1 || scale[0] != 1 || scale[1] != 1)) {
        for (int64_t i = 0; i < n; ++i) {  // rare: the last tokens
          const bool kept0 = row0 && (!draws0 || keeps(draws0[i], threshold));
          const bool kept1 = row1 && (!draws1 || keeps(draws1[i], threshold));
          dst[i] = (kept0 ? narrow<C>(widen(row0[i]) * scale[0]) : C{}).bits |
                   uint32_t{(kept1 ? narrow<C>(widen(row1[i]) * scale[1]) : C{}).bits} << 16;
        }
      } else if (!row0 || !row1) {
        const P* row = row0 ? row0 : row1;
        const Acc factor = scale[row0 ? 0 : 1];
        const int shift = row0 ? 0 : 16;
        for (int64_t i = 0; i < n; ++i) {
          dst[i] = uint32_t{narrow<C>(widen(row[i]) * factor).bits} << shift;
        }
      } else if (scale[0] != 1 || scale[1] != 1) {
        for (int64_t i = 0; i < n; ++i) {
          dst[i] = narrow<C>(widen(row0[i]) * scale[0]).bits |
                   uint32_t{narrow<C>(widen(row1[i]) * scale[1]).bits} << 16;
        }
      } else if (draws0) {
        const int32_t last_dropped = int32_t{threshold} - 1;
        for (int64_t i = 0; i < n; ++i) {
          const uint32_t pair = convert<C>(row0[i]).bits | uint32_t{convert<C>(row1[i]).bits} << 16;
          // All ones where draw ≥ threshold: the sign of the difference, in arithmetic that
          // vectorises.
          const int32_t draw0 = draws0[i] & (kDrawRange - 1), draw1 = draws1[i] & (kDrawRange - 1);
          const uint32_t kept0 = static_cast<uint32_t>((last_dropped - draw0) >> 31);
          const uint32_t kept1 = static_cast<uint32_t>((last_dropped - draw1) >> 31);
          dst[i] = pair & ((kept0 & 0xffffu) | (kept1 << 16));
        }
      } else {
        for (int64_t i = 0; i < n; ++i) {
          dst[i] = convert<C>(row0[i]).bits | uint32_t{convert<C>(row1[i]).bits} << 16;
        }
      }
    }
  }

  static void transpose(const void* const* src, int num_rows, int64_t cols, const void* scale,
                        void* dst, int64_t ld_dst) {
    C converted[16][kMostColumns];
    const void* rows[16];
    convert_rows(src, num_rows, cols, scale, converted, rows);
    if constexpr (sizeof(C) == 4) {
      transpose_words(rows, cols, dst, ld_dst);
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        for (int j = 0; j < 16; ++j)
          static_cast<C*>(dst)[c * ld_dst + j] = static_cast<const C*>(rows[j])[c];
      }
    }
  }

  static void transpose_pairs(const void* const* src, int num_rows, int64_t cols, const void* scale,
                              void* dst, int64_t ld_dst) {
    if constexpr (sizeof(C) == 2) {
      C converted[16][kMostColumns];
      const void* rows[16];
      convert_rows(src, num_rows, cols, scale, converted, rows);
      transpose_words(rows, cols / 2, dst, ld_dst);
      for (int j = 0; cols % 2 == 1 && j < 16; ++j) {
        static_cast<uint32_t*>(dst)[cols / 2 * ld_dst + j] =
            static_cast<const C*>(rows[j])[cols - 1].bits;
      }
    }
  }

  // 16 rows of C: the sources themselves, converted and scaled copies, or zeros.
  static void convert_rows(const void* const* src, int num_rows, int64_t cols, const void* scale_,
                           C (&converted)[16][kMostColumns], const void* (&rows)[16]) {
    const Acc* scale = static_cast<const Acc*>(scale_);
    for (int j = 0; j < 16; ++j) {
      rows[j] = converted[j];
      if (j >= num_rows) {
        for (int64_t c = 0; c < cols; ++c) converted[j][c] = C{};
      } else if (scale) {
        const P* row = static_cast<const P*>(src[j]);
        for (int64_t c = 0; c < cols; ++c) converted[j][c] = narrow<C>(widen(row[c]) * scale[c]);
      } else if (is_same_type<P, C>) {
        rows[j] = src[j];
      } else {
        convert_row(src[j], 1, {}, converted[j], cols);
      }
    }
  }

  static void finish_row(const void* acc_, double scale_, RowMask mask, const void* c_in_,
                         void* out_, int64_t n) {
    const Acc* acc = static_cast<const Acc*>(acc_);
    const P* c_in = static_cast<const P*>(c_in_);  // may be out: no __restrict__
    P* out = static_cast<P*>(out_);
    const Acc scale = static_cast<Acc>(scale_);
    const uint16_t threshold = static_cast<uint16_t>(mask.threshold);
    const uint16_t* draws = mask.draws;
    if (draws && c_in) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const Acc w = acc[i] * scale;
        out[i] = narrow<P>(widen(c_in[i]) + (keeps(draws[i], threshold) ? w : Acc{0}));
      }
    } else if (c_in) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = narrow<P>(widen(c_in[i]) + acc[i] * scale);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const Acc w = acc[i] * scale;
        out[i] = narrow<P>(!draws || keeps(draws[i], threshold) ? w : Acc{0});
      }
    }
  }

  static void add_products(const void* a_, const void* b_, double* __restrict__ sums, int64_t n) {
    const P *a = static_cast<const P*>(a_), *b = static_cast<const P*>(b_);
    for (int64_t i = 0; i < n; ++i) sums[i] += double{widen(a[i])} * double{widen(b[i])};
  }
};

template <class P, class C>
const TileOps* ops_of() {
  using L = Loops<P, C>;
  static const TileOps ops = {L::convert_row,     L::interleave_rows, L::transpose,
                              L::transpose_pairs, L::finish_row,      L::add_products};
  return &ops;
}

template <class P>
const TileOps* ops_of_storage(DType compute) {
  switch (compute) {
    case DType::kF32:
      return ops_of<P, float>();
    case DType::kBF16:
      return ops_of<P, BF16>();
    case DType::kF16:
      return ops_of<P, F16>();
    default:
      return nullptr;
  }
}

const TileOps* find(DType storage, DType compute) {
  if (compute == DType::kF64) return storage == DType::kF64 ? ops_of<double, double>() : nullptr;
  switch (storage) {
    case DType::kF32:
      return ops_of_storage<float>(compute);
    case DType::kBF16:
      return ops_of_storage<BF16>(compute);
    case DType::kF16:
      return ops_of_storage<F16>(compute);
    default:
      return nullptr;
  }
}

template <class Acc>
void add_scaled(const void* acc_, double scale_, void* total_, int64_t n) {
  const Acc* acc = static_cast<const Acc*>(acc_);
  Acc* __restrict__ total = static_cast<Acc*>(total_);
  const Acc scale = static_cast<Acc>(scale_);
  for (int64_t i = 0; i < n; ++i) total[i] += acc[i] * scale;
}

void add_scaled_row(DType acc_type, const void* acc, double scale, void* total, int64_t n) {
  if (acc_type == DType::kF64) return add_scaled<double>(acc, scale, total, n);
  add_scaled<float>(acc, scale, total, n);
}

// Sums of kSumLength products are added up, rather than one long chain: its rounding error grows
// with its length.
constexpr int64_t kSumLength = 32;
constexpr int64_t kSumColumns = 128;

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t ldA, const T* B, int64_t ldB, T* C,
          int64_t ldC, bool add_C) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n0 = 0; n0 < N; n0 += kSumColumns) {
      const int64_t cols = N - n0 < kSumColumns ? N - n0 : kSumColumns;
      T* __restrict__ row = C + m * ldC + n0;
      for (int64_t n = 0; !add_C && n < cols; ++n) row[n] = 0;
      for (int64_t k0 = 0; k0 < K; k0 += kSumLength) {
        T part[kSumColumns] = {};
        for (int64_t k = k0; k < K && k < k0 + kSumLength; ++k) {
          const T a = A[m * ldA + k];
          const T* b = B + k * ldB + n0;
          for (int64_t n = 0; n < cols; ++n) part[n] += a * b[n];
        }
        for (int64_t n = 0; n < cols; ++n) row[n] += part[n];
      }
    }
  }
}

void plain_gemm(DType dtype, int64_t M, int64_t N, int64_t K, const void* A, int64_t ldA,
                const void* B, int64_t ldB, void* C, int64_t ldC, bool add_C) {
  if (dtype == DType::kF64) {
    gemm(M, N, K, static_cast<const double*>(A), ldA, static_cast<const double*>(B), ldB,
         static_cast<double*>(C), ldC, add_C);
  } else {
    gemm(M, N, K, static_cast<const float*>(A), ldA, static_cast<const float*>(B), ldB,
         static_cast<float*>(C), ldC, add_C);
  }
}

}  // namespace

const TileOpsTable& RASA_CONCAT(tile_ops_, RASA_CPU_CAPABILITY)() {
  static const TileOpsTable table = {find, add_scaled_row, draw_strip, plain_gemm};
  return table;
}

}  // namespace rasa::cpu
