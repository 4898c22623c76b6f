// Register tiles of at most 8 rows × 3 vectors: 24 accumulators, 3 vectors of B and one broadcast
// pair of A are 28 of the 32 registers, and the 24 independent sums hide the product's latency.
//
// All is in the anonymous namespace: see tile_ops.cpp.
#include "bf16_gemm.h"

#include <immintrin.h>

#include "../philox.h"

namespace rasa::cpu {
namespace {

constexpr int kMaxRows = 8;
constexpr int kMaxVectors = 3;
constexpr int64_t kLanes = 16;

inline __m512bh load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512bh broadcast_pair(const char* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

inline char* at(const void* base, int64_t bytes) {
  return const_cast<char*>(static_cast<const char*>(base)) + bytes;
}

// lanes: of the columns that exist.
inline void store(const SumOut& out, int64_t m, int64_t n, __mmask16 lanes, __m512 sum) {
  float* C = out.C + m * out.ld + n;
  if (out.adds) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, C), sum);
  _mm512_mask_storeu_ps(C, lanes, sum);
}

inline void store(const RoundedOut& out, int64_t m, int64_t n, __mmask16 lanes, __m512 sum) {
  sum = _mm512_mul_ps(sum, _mm512_set1_ps(out.scale));
  if (out.draws != nullptr) {
    const __m256i draws = _mm256_maskz_loadu_epi16(lanes, out.draws + m * out.ld_draws + n);
    const __m256i bits = _mm256_and_si256(draws, _mm256_set1_epi16(kDrawRange - 1));
    const __m256i threshold = _mm256_set1_epi16(static_cast<short>(out.drop_threshold));
    sum = _mm512_maskz_mov_ps(_mm256_cmpge_epu16_mask(bits, threshold), sum);
  }
  if (out.c_in != nullptr) {
    sum = _mm512_add_ps(
        widen(_mm256_maskz_loadu_epi16(lanes, at(out.c_in, 2 * (m * out.ld_in + n)))), sum);
  }
  _mm256_mask_storeu_epi16(at(out.C, 2 * (m * out.ld + n)), lanes,
                           (__m256i)_mm512_cvtneps_pbh(sum));
}

// Rows m … m + kRows − 1, columns n … n + 16·kVectors − 1 of the result; `last` are the columns
// that exist of the last vector.
template <int kRows, int kVectors, class Out>
void tile(int64_t K, const PairedRows& A, const PairedColumns& B, const Out& out, int64_t m,
          int64_t n, __mmask16 last) {
  __m512 sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  const char* a = at(A.data, m * A.row_step);
  const char* b = at(B.data, 4 * n);
#pragma GCC unroll 1
  for (int64_t k = 0; k < K; k += 2, a += A.pair_step, b += 4 * B.ld) {
    __m512bh columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load_pairs(b + 64 * v);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512bh row = broadcast_pair(a + i * A.row_step);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      store(out, m + i, n + kLanes * v, v + 1 < kVectors ? __mmask16(0xffff) : last, sum[i][v]);
    }
  }
}

template <class Out>
using Tile = void (*)(int64_t, const PairedRows&, const PairedColumns&, const Out&, int64_t,
                      int64_t, __mmask16);

// [rows − 1][vectors − 1]
template <class Out>
constexpr Tile<Out> kTiles[kMaxRows][kMaxVectors] = {
    {tile<1, 1, Out>, tile<1, 2, Out>, tile<1, 3, Out>},
    {tile<2, 1, Out>, tile<2, 2, Out>, tile<2, 3, Out>},
    {tile<3, 1, Out>, tile<3, 2, Out>, tile<3, 3, Out>},
    {tile<4, 1, Out>, tile<4, 2, Out>, tile<4, 3, Out>},
    {tile<5, 1, Out>, tile<5, 2, Out>, tile<5, 3, Out>},
    {tile<6, 1, Out>, tile<6, 2, Out>, tile<6, 3, Out>},
    {tile<7, 1, Out>, tile<7, 2, Out>, tile<7, 3, Out>},
    {tile<8, 1, Out>, tile<8, 2, Out>, tile<8, 3, Out>}};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The next of the parts into which `left` is cut evenly, each of at most `most`.
inline int64_t even_part(int64_t left, int64_t most) {
  return left == 0 ? 0 : ceil_div(left, ceil_div(left, most));
}

template <class Out>
void gemm(int64_t M, int64_t N, int64_t K, PairedRows A, PairedColumns B, Out out) {
  const int64_t num_vectors = ceil_div(N, kLanes);
  for (int64_t v = 0, vectors; v < num_vectors; v += vectors) {
    vectors = even_part(num_vectors - v, kMaxVectors);
    const int64_t n = v * kLanes, missing = (v + vectors) * kLanes - N;
    const __mmask16 last = static_cast<__mmask16>(missing > 0 ? 0xffff >> missing : 0xffff);
    for (int64_t m = 0, rows; m < M; m += rows) {
      rows = even_part(M - m, kMaxRows);
      kTiles<Out>[rows - 1][vectors - 1](K, A, B, out, m, n, last);
    }
  }
}

}  // namespace

const Bf16Gemm& bf16_gemm() {
  static const Bf16Gemm functions = {gemm<SumOut>, gemm<RoundedOut>};
  return functions;
}

}  // namespace rasa::cpu
