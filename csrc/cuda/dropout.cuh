// The dropout mask in the registers that mma reads and writes: philox.h gives the mapping.
#pragma once

#include "../philox.h"
#include "ptx.cuh"

namespace rasa::cuda {

// 16 × 16 elements of the (tokens, features) matrix, in the order of an A fragment: 0xffff in the
// half of a kept element, 0 in that of a dropped one.
__device__ __forceinline__ void keep_masks(uint32_t (&keep)[4], uint64_t seed, uint32_t threshold,
                                           int token_block, int feature_block) {
  const Philox4 draws = philox4x32({{threadIdx.x % 32, static_cast<uint32_t>(token_block),
                                     static_cast<uint32_t>(feature_block), 0}},
                                   static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  // Two 15-bit draws at once: draw + 2^15 - threshold has bit 15 set when draw >= threshold.
  const uint32_t addend = (kDrawRange - threshold) * 0x10001u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keep[i] = spread_half_signs((draws.word[i] & 0x7fff7fffu) + addend);
  }
}

}  // namespace rasa::cuda
