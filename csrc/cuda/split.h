// How many parts a reduction is split into, by a model of time. Pure: no torch, no CUDA.
//
// A launch's tiles take waves over the GPU's slots (blocks that run at once). Time is counted in
// k blocks of a tile on one SM:
//
//   gemm    waves · (k blocks of the longest split + those that fill the pipeline + the partial)
//           and at least 2 · (k blocks of all tiles) / slots: half of the SMs use up the DRAM
//   reduce  kReduceLaunch + the partials, written and read in L2 at twice the rate of DRAM, by all
//
// The two rates and kReduceLaunch are estimates from published figures of the H100, not measured
// here. A wrong one costs time, never exactness: a split's order of sums is fixed.
#pragma once

#include <cstdint>

#include "gemm_config.h"

namespace rasa::cuda {

// What the plan needs to know of the GPU.
struct DeviceInfo {
  int32_t num_sms;
  int32_t smem_bytes;        // that a block may opt in to
  double reduce_launch = 8;  // one more launch, in k blocks: about 2 µs at 0.25 µs each
};

// What one problem asks of the launch.
struct SplitWork {
  int64_t tiles;
  int32_t num_k;  // k blocks of a tile
};

constexpr int32_t num_splits(int32_t num_k, int32_t k_per_split) {
  return num_k == 0 ? 1 : static_cast<int32_t>(ceil_div(num_k, k_per_split));
}

// The longest split that gives the same number of splits, evened out.
constexpr int32_t even_k_per_split(int32_t num_k, int32_t k_per_split) {
  return num_k == 0 ? 1 : static_cast<int32_t>(ceil_div(num_k, num_splits(num_k, k_per_split)));
}

struct KRange {
  int begin, end;
};

// The k blocks of a segment that a split has; first_k: blocks of the segments before it.
RASA_HD constexpr KRange split_range(int split, int k_per_split, int first_k, int num_k) {
  const int begin = split * k_per_split - first_k;
  const int end = begin < num_k - k_per_split ? begin + k_per_split : num_k;  // does not overflow
  return {begin > 0 ? begin : 0, end};
}

// Bytes of a partial, in those of a k block's operands.
constexpr double partial_cost(const TileConfig& tile) {
  return 4.0 * tile.block_m * tile.block_n / tile.stage_bytes();
}

constexpr double split_time(const SplitWork* work, int num_work, int32_t k_per_split,
                            const TileConfig& tile, const DeviceInfo& device, int64_t slots) {
  const double partial = partial_cost(tile);
  int64_t num_tiles = 0, num_partials = 0, total_k = 0;
  int32_t longest = 0;
  for (int i = 0; i < num_work; ++i) {
    const int32_t splits = num_splits(work[i].num_k, k_per_split);
    const int32_t even = even_k_per_split(work[i].num_k, k_per_split);
    num_tiles += work[i].tiles * splits;
    total_k += work[i].tiles * work[i].num_k;
    if (splits > 1) num_partials += work[i].tiles * splits;
    if (even > longest) longest = even;
  }
  const bool is_split = num_partials > 0;
  const double per_tile = longest + tile.stages - 1 + (is_split ? partial : 0);
  const double gemm = static_cast<double>(ceil_div(num_tiles, slots)) * per_tile;
  const double dram = 2.0 * static_cast<double>(total_k) / static_cast<double>(slots);
  const double reduce =
      device.reduce_launch + 2 * partial * static_cast<double>(num_partials) / slots;
  return (gemm > dram ? gemm : dram) + (is_split ? reduce : 0);
}

constexpr int32_t kMaxSplits = 32;

// The k blocks that a split of any of these problems may have: the best time of 1 to kMaxSplits
// splits of the longest one. Writing and reading a partial moves no more bytes than its operands
// do.
constexpr int32_t choose_k_per_split(const SplitWork* work, int num_work, const TileConfig& tile,
                                     const DeviceInfo& device, int64_t slots) {
  int32_t longest = 1;
  int64_t num_tiles = 0;
  for (int i = 0; i < num_work; ++i) {
    if (work[i].num_k > longest) longest = work[i].num_k;
    num_tiles += work[i].tiles;
  }
  if (tile.layout == Layout::kNN || num_tiles >= slots) return longest;
  int32_t best = longest;
  double best_time = split_time(work, num_work, longest, tile, device, slots);
  for (int32_t splits = 2; splits <= kMaxSplits && splits <= longest; ++splits) {
    const int32_t k_per_split = static_cast<int32_t>(ceil_div(longest, splits));
    if (k_per_split < 2 * partial_cost(tile)) break;
    const double time = split_time(work, num_work, k_per_split, tile, device, slots);
    if (time < best_time) {
      best = k_per_split;
      best_time = time;
    }
  }
  return best;
}

// The reduce kernel: 4 columns to a thread, or to kReduceGroups threads that share the partials.
constexpr int kReduceThreads = 256;
constexpr int kReduceGroups = 16;
constexpr int kReduceBlocks = 8;  // per SM
RASA_HD constexpr int reduce_groups(int num_partials) {
  return num_partials > 2 * kReduceGroups ? kReduceGroups : 1;
}

// Tiles of the reduce kernel that C (M,N) has.
RASA_HD constexpr int64_t num_reduce_tiles(int64_t M, int64_t N, int num_partials) {
  return ceil_div(M * ceil_div(N, 4), kReduceThreads / reduce_groups(num_partials));
}

// What a thread of a tile sums: partials group, group + groups, … of columns n … n + 3 of row m,
// which begin `quad` · 4 floats after the partial does.
struct ReducePlace {
  int groups, group;
  int quad;
  int m, n;
};
RASA_HD constexpr ReducePlace reduce_place(int tile, int thread, int num_partials, int N) {
  const int groups = reduce_groups(num_partials), columns = kReduceThreads / groups;
  const int row_quads = static_cast<int>(ceil_div(N, 4));
  const int quad = tile * columns + thread % columns;
  return {groups, thread / columns, quad, quad / row_quads, 4 * (quad % row_quads)};
}

}  // namespace rasa::cuda
