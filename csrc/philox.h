// The dropout mask: (seed, token, feature) → a 15-bit draw, the same on host and device.
//
// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011:
// the fewest rounds that pass BigCrush). One call yields the 8 draws that one lane of a warp needs
// for a 16 × 16 block of the (tokens, features) matrix, in the order of the A fragment of
// mma.m16n8k16:
//
//   counter = (lane, m / 16, c / 16, 0)      lane = (m % 8)·4 + (c % 8) / 2
//   word    = (m / 8) % 2 + 2·((c / 8) % 2)  half = c % 2 (0: low 16 bits)
//   key     = seed (low word, high word)
//
// The draw is the low 15 bits of the half. 15, not 16: two draws then compare against a threshold
// with one 32-bit add.
#pragma once

#include "host_device.h"

namespace rasa {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kDrawRange = 1u << 15;

struct Philox4 {
  uint32_t word[4];
};

RASA_HD Philox4 philox4x32(Philox4 c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The draw of one element; what every faster, blockwise evaluation must equal.
RASA_HD uint32_t dropout_draw(uint64_t seed, uint32_t m, uint32_t c) {
  const Philox4 counter = {{(m % 8) * 4 + (c % 8) / 2, m / 16, c / 16, 0}};
  const Philox4 r =
      philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return (r.word[(m / 8) % 2 + 2 * ((c / 8) % 2)] >> (16 * (c % 2))) & (kDrawRange - 1);
}

// p is rounded to a multiple of 2^-15, and kept elements are scaled by the inverse of the keep rate
// that results.
RASA_HD uint32_t drop_threshold(double p) {
  const uint32_t threshold = static_cast<uint32_t>(p * kDrawRange + 0.5);
  return threshold < kDrawRange ? threshold : kDrawRange - 1;  // p < 1 keeps something
}
RASA_HD double keep_scale(uint32_t threshold) {
  return static_cast<double>(kDrawRange) / (kDrawRange - threshold);
}

}  // namespace rasa
