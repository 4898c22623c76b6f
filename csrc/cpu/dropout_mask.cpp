// Draws dropout_mask.h's matrix on the CPU, lanes dealt to threads.
#include "dropout_mask.h"

#include <ATen/Parallel.h>

namespace rasa::cpu {

void draw_mask(const MaskArgs& args) {
  constexpr int64_t kMinLanesPerThread = 4096;  // some 100 us of work
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  at::parallel_for(0, num_mask_lanes(args.M, args.K), kMinLanesPerThread,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) draw_mask_lane(args, seed, i);
                   });
}

}  // namespace rasa::cpu
