// The dropout draws of philox.h, a vector of lanes at a time. Only for tile_ops.cpp, which is built
// once per CPU capability: all is in the anonymous namespace, as it must be there.
#pragma once

#include "../philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rasa::cpu {
namespace {

// A vector of 64-bit lanes whose low words count. The one intrinsic per width is the multiplication
// of the low words: written as a product of masked 64-bit numbers, the compiler takes a 64 × 64
// multiplication, and drawing takes twice as long (80 against 40 us for 512 × 576 elements on one
// core with AVX-512).
#if defined(__AVX512F__)
constexpr int kLanes = 8, kVectors = 4;  // 32 registers hold the state of four
#elif defined(__AVX2__)
constexpr int kLanes = 4, kVectors = 2;
#else
constexpr int kLanes = 2, kVectors = 2;
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));

inline Lanes multiply_low_words(Lanes a, uint32_t b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

inline Lanes numbers_from(int first) {
  Lanes a = {};
  for (int i = 0; i < kLanes; ++i) a[i] = first + i;
  return a;
}

inline void store_low_words(Lanes a, uint32_t* words) {
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  const Words low = __builtin_convertvector(a, Words);
  __builtin_memcpy(words, &low, sizeof(low));
}

// All 32 lanes of one 16 × 16 block. A round's products depend on the round before: kVectors side
// by side hide their latency (with AVX-512 four draw a block in 31 ns, one after the other in 54).
void draw_block(uint32_t key0, uint32_t key1, uint32_t m16, uint32_t c16, uint32_t (&word)[4][32]) {
  for (int lane0 = 0; lane0 < 32; lane0 += kVectors * kLanes) {
    Lanes w0[kVectors], w1[kVectors], w2[kVectors], w3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w0[v] = numbers_from(lane0 + v * kLanes);
      w1[v] = Lanes{} + m16;
      w2[v] = Lanes{} + c16;
      w3[v] = Lanes{};
    }
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Lanes p0 = multiply_low_words(w0[v], 0xD2511F53u);
        const Lanes p1 = multiply_low_words(w2[v], 0xCD9E8D57u);
        w0[v] = (p1 >> 32) ^ w1[v] ^ k0;
        w1[v] = p1;
        w2[v] = (p0 >> 32) ^ w3[v] ^ k1;
        w3[v] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int v = 0; v < kVectors; ++v) {
      const int lane = lane0 + v * kLanes;
      store_low_words(w0[v], &word[0][lane]);
      store_low_words(w1[v], &word[1][lane]);
      store_low_words(w2[v], &word[2][lane]);
      store_low_words(w3[v], &word[3][lane]);
    }
  }
}

void draw_strip(uint64_t seed, uint32_t m16, uint32_t c16, int64_t num_blocks, uint16_t* draws,
                int64_t ld) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    uint32_t word[4][32];
    draw_block(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), m16,
               c16 + static_cast<uint32_t>(b), word);
    // Lanes 4·(m%8) … +3 of a word hold 8 neighbouring features of row m, low half first: 16 bytes
    // as they lie.
    for (int m = 0; m < 16; ++m) {
      uint16_t* row = draws + m * ld + b * 16;
      __builtin_memcpy(row, &word[m / 8][4 * (m % 8)], 16);
      __builtin_memcpy(row + 8, &word[m / 8 + 2][4 * (m % 8)], 16);
    }
  }
}

}  // namespace
}  // namespace rasa::cpu
