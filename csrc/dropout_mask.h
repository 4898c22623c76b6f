// The dropout mask as a matrix (philox.h says which bit belongs to which element): what each
// backend draws, lane by lane of 16 × 16 blocks, in its own memory. No torch, no CUDA.
#pragma once

#include "philox.h"

namespace rasa {

struct MaskArgs {
  const int64_t* seed;
  uint32_t threshold;  // an element is dropped when its draw is below it
  int32_t M, K;        // tokens, features
  bool* kept;          // (M,K), dense
};

using DrawMaskFn = void (*)(const MaskArgs&);

RASA_HD constexpr int64_t num_mask_lanes(int32_t M, int32_t K) {
  return ceil_div(M, 16) * ceil_div(K, 16) * 32;
}

// One Philox call, 8 elements of a block.
RASA_HD void draw_mask_lane(const MaskArgs& args, uint64_t seed, int64_t index) {
  const int64_t blocks_k = ceil_div(args.K, 16);
  const uint32_t lane = index % 32, k16 = index / 32 % blocks_k, m16 = index / 32 / blocks_k;
  const Philox4 draws = philox4x32({{lane, m16, k16, 0}}, static_cast<uint32_t>(seed),
                                   static_cast<uint32_t>(seed >> 32));
  for (uint32_t i = 0; i < 8; ++i) {
    const int64_t m = int64_t{16} * m16 + lane / 4 + 8 * (i / 2 % 2);
    const int64_t k = int64_t{16} * k16 + 2 * (lane % 4) + 8 * (i / 4) + i % 2;
    const uint32_t draw = (draws.word[i / 2] >> (16 * (i % 2))) & (kDrawRange - 1);
    if (m < args.M && k < args.K) args.kept[m * args.K + k] = draw >= args.threshold;
  }
}

}  // namespace rasa
