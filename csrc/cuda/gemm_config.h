// The tile shapes of the kernels, and which problem gets which. Pure: no torch, no CUDA.
#pragma once

#include "../gemm_problem.h"
#include "../host_device.h"
#include "kernel_args.h"
#include "smem_layout.h"

namespace rasa::cuda {

// Named by form and by the widest rank that one tile holds.
enum class ConfigId : int8_t {
  kShrink40,
  kShrink80,
  kShrink160,
  kShrink160Tall,
  kShrinkScaled,
  kExpand48,
  kExpand80,
  kExpand160,
  kExpand160Wide,
  kExpandSegments,
  kExpandScaled,
  kWgrad48,
  kWgrad80,
  kWgrad160,
  kWgrad160Drop,
  kWgradScaled,
  kWgradScaled128,
  kMerge80,
  kMerge160,
  kMerge160Wide,
  kMergeSegments,
  kF32Merge,
  kF32Shrink40,
  kF32Shrink80,
  kF32Shrink160,
  kF32ShrinkScaled,
  kF32Expand,
  kF32ExpandScaled,
  kF32Wgrad48,
  kF32Wgrad80,
  kF32Wgrad160,
  kF32WgradScaled,
  kReduce,  // no tile shape: the sum of partials, reduce_kernel.cuh
};
constexpr int kNumConfigs = 32;  // tile shapes

struct TileConfig {
  Layout layout;
  int block_m, block_n, block_k;
  int warps_m, warps_n;
  int stages;
  int min_blocks;        // per SM
  bool scales_segments;  // each segment has its scale_m: costs a second set of accumulators
  // One k block holds the whole reduction, and a block keeps that of B, its panel, in shared memory
  // while it walks down a column of tiles. Stages are of A alone.
  bool walks;
  int element_bytes = 2;
  // Each fp32 operand is multiplied as the sum of two TF32 numbers: as exact as float32.
  bool splits_operands = false;

  RASA_HD constexpr int threads() const { return 32 * warps_m * warps_n; }
  RASA_HD constexpr int warp_m() const { return block_m / warps_m; }
  RASA_HD constexpr int warp_n() const { return block_n / warps_n; }
  RASA_HD constexpr bool A_rows_are_k() const { return layout == Layout::kTN; }
  RASA_HD constexpr bool B_rows_are_k() const { return layout != Layout::kNT; }
  RASA_HD constexpr int A_bytes() const { return block_m * block_k * element_bytes; }
  RASA_HD constexpr int B_bytes() const { return block_n * block_k * element_bytes; }
  RASA_HD constexpr int stage_bytes() const { return A_bytes() + (walks ? 0 : B_bytes()); }
  RASA_HD constexpr int tiles_bytes() const {
    return stages * stage_bytes() + (walks ? B_bytes() : 0);
  }

  // Tables of row addresses, in entries of 8 bytes. Rows along k change with the k block and have
  // two tables: one is read while the next is written. A walk has one k block, and reads the tables
  // of A and B before it writes those of C over them.
  RASA_HD constexpr int k_tables() const { return walks ? 1 : 2; }
  RASA_HD constexpr int A_entries() const {
    return A_rows_are_k() ? k_tables() * block_k : block_m;
  }
  RASA_HD constexpr int B_entries() const {
    return B_rows_are_k() ? k_tables() * block_k : block_n;
  }
  RASA_HD constexpr int C_table() const { return walks ? 0 : A_entries() + B_entries(); }
  RASA_HD constexpr int table_bytes() const {
    const int operands = A_entries() + B_entries(), C = 2 * block_m;
    return 8 * (!walks ? operands + C : operands > C ? operands : C);
  }

  // The epilogue stages 16 rows per warp in fp32: over all stages, or in a walk over the one just
  // read, where the warp's columns are halved until they fit. Pitch in floats: 8 mod 16 makes the
  // accumulators' 8-byte stores free of bank conflicts.
  RASA_HD static constexpr int pitch(int columns) {
    return columns % 16 == 8 ? columns : columns + 8;
  }
  RASA_HD constexpr int staging_bytes(int columns) const {
    return warps_m * warps_n * 16 * pitch(columns) * 4;
  }
  RASA_HD constexpr int staging_room() const { return walks ? stage_bytes() : tiles_bytes(); }
  RASA_HD constexpr int staging_n() const {
    int columns = warp_n();
    while (staging_bytes(columns) > staging_room() && columns % 32 == 0) columns /= 2;
    return columns;
  }
  RASA_HD constexpr int smem_bytes() const { return tiles_bytes() + table_bytes(); }

  // Elements of the diagonal in a tile whose corner is one of them.
  RASA_HD constexpr int diagonal_block() const { return block_m < block_n ? block_m : block_n; }
};

constexpr TileConfig tile_config(ConfigId id) {
  switch (id) {
    //                                M    N   K  warps stages blocks scaled walks
    case ConfigId::kShrink40:
      return {Layout::kNT, 128, 40, 64, 4, 1, 4, 1, false, false};
    case ConfigId::kShrink80:
      return {Layout::kNT, 128, 80, 64, 4, 1, 3, 1, false, false};
    case ConfigId::kShrink160:
      return {Layout::kNT, 128, 160, 32, 4, 2, 4, 1, false, false};
    case ConfigId::kShrink160Tall:
      return {Layout::kNT, 256, 160, 32, 4, 2, 3, 1, false, false};
    case ConfigId::kShrinkScaled:
      return {Layout::kNT, 64, 40, 64, 4, 1, 3, 1, true, false};
    case ConfigId::kExpand48:
      return {Layout::kNN, 128, 128, 48, 4, 2, 2, 2, false, true};
    case ConfigId::kExpand80:
      return {Layout::kNN, 128, 128, 80, 4, 2, 2, 2, false, true};
    case ConfigId::kExpand160:
      return {Layout::kNN, 96, 192, 160, 2, 4, 1, 1, false, true};
    case ConfigId::kExpand160Wide:
      return {Layout::kNN, 128, 256, 160, 2, 4, 2, 1, false, true};
    case ConfigId::kExpandSegments:
      return {Layout::kNN, 128, 128, 48, 4, 2, 2, 2, false, false};
    case ConfigId::kExpandScaled:
      return {Layout::kNN, 64, 128, 48, 4, 2, 2, 1, true, false};
    case ConfigId::kWgrad48:
      return {Layout::kTN, 48, 128, 64, 1, 4, 3, 1, false, false};
    case ConfigId::kWgrad80:
      return {Layout::kTN, 80, 128, 64, 1, 4, 3, 1, false, false};
    case ConfigId::kWgrad160:
      return {Layout::kTN, 160, 256, 32, 2, 4, 3, 1, false, false};
    case ConfigId::kWgrad160Drop:  // one warp row: no two warps draw the same
      return {Layout::kTN, 160, 256, 32, 1, 8, 3, 1, false, false};
    case ConfigId::kWgradScaled:
      return {Layout::kTN, 48, 128, 64, 1, 4, 3, 1, true, false};
    case ConfigId::kWgradScaled128:
      return {Layout::kTN, 128, 128, 32, 1, 8, 4, 1, true, false};
    case ConfigId::kMerge80:
      return {Layout::kTN, 128, 128, 80, 4, 2, 2, 1, false, true};
    case ConfigId::kMerge160:
      return {Layout::kTN, 96, 192, 160, 2, 4, 1, 1, false, true};
    case ConfigId::kMerge160Wide:
      return {Layout::kTN, 128, 256, 160, 2, 4, 2, 1, false, true};
    case ConfigId::kF32Merge:
      return {Layout::kTN, 128, 128, 16, 4, 2, 4, 1, false, false, 4, true};
    case ConfigId::kF32Shrink40:
      return {Layout::kNT, 128, 40, 32, 4, 1, 4, 1, false, false, 4};
    case ConfigId::kF32Shrink80:
      return {Layout::kNT, 128, 80, 32, 4, 1, 3, 1, false, false, 4};
    case ConfigId::kF32Shrink160:
      return {Layout::kNT, 128, 160, 16, 4, 2, 4, 1, false, false, 4};
    case ConfigId::kF32ShrinkScaled:
      return {Layout::kNT, 64, 40, 32, 4, 1, 3, 1, true, false, 4};
    case ConfigId::kF32Expand:
      return {Layout::kNN, 128, 128, 16, 4, 2, 4, 1, false, false, 4};
    case ConfigId::kF32ExpandScaled:
      return {Layout::kNN, 64, 128, 16, 4, 2, 3, 1, true, false, 4};
    case ConfigId::kF32Wgrad48:
      return {Layout::kTN, 48, 128, 32, 1, 4, 4, 1, false, false, 4};
    case ConfigId::kF32Wgrad80:
      return {Layout::kTN, 80, 128, 32, 1, 4, 3, 1, false, false, 4};
    case ConfigId::kF32Wgrad160:
      return {Layout::kTN, 160, 128, 16, 2, 4, 4, 1, false, false, 4};
    case ConfigId::kF32WgradScaled:
      return {Layout::kTN, 48, 128, 32, 1, 4, 3, 1, true, false, 4};
    default:
      return {Layout::kTN, 128, 128, 48, 4, 2, 2, 1, false, false};
  }
}

// What one block may have of shared memory: on sm_86, sm_89 and sm_120, the least of all parts; on
// sm_80, the least of those with more (sm_90 and sm_100 have 227 KiB).
constexpr int kSmallSmemBytes = 99 * 1024;
constexpr int kLargeSmemBytes = 163 * 1024;

constexpr bool needs_large_smem(ConfigId id) {
  return id == ConfigId::kExpand160Wide || id == ConfigId::kMerge160Wide;
}

// Whether select_config has a use for it on a device: a large one has wider merges.
constexpr bool is_for(ConfigId id, int smem_bytes) {
  return smem_bytes >= kLargeSmemBytes ? id != ConfigId::kMerge160 : !needs_large_smem(id);
}

constexpr bool config_is_sound(ConfigId id) {
  const TileConfig c = tile_config(id);
  return c.smem_bytes() <= (needs_large_smem(id) ? kLargeSmemBytes : kSmallSmemBytes) &&
         c.staging_bytes(c.staging_n()) <= c.staging_room() && c.warp_m() % 16 == 0 &&
         c.warp_n() % 8 == 0 && c.block_k % 16 == 0 &&
         (c.walks ? c.stages <= 2 && c.staging_n() % 16 == 0 : c.stages >= 2) &&
         (c.layout == Layout::kNT ? !c.walks : c.warp_n() % 16 == 0) && c.threads() <= 256;
}

constexpr bool is_merge(ConfigId id) {
  return id >= ConfigId::kMerge80 && id <= ConfigId::kF32Merge;
}

// Which configs grouped_gemm.cu instantiates with dropout, and which without. Of the widest wgrad's
// two, that of two warp rows has no registers left for dropout, and the other reads shared memory
// more often.
constexpr bool has_dropout_kernel(ConfigId id) {
  return !is_merge(id) && id != ConfigId::kWgrad160;
}
constexpr bool has_plain_kernel(ConfigId id) { return id != ConfigId::kWgrad160Drop; }

// The argument block that the kernel declares: large where a group has many problems, or a problem
// many segments.
constexpr int arg_bytes(ConfigId id) {
  return tile_config(id).scales_segments || is_merge(id) ? kLargeArgBytes : kSmallArgBytes;
}

// Whether the addresses of all copies stay in registers from one k block to the next: a short
// reduction has no use for them, and the widest wgrad's dropout leaves no room.
constexpr bool keeps_addresses(ConfigId id) {
  return tile_config(id).stages > 2 && id != ConfigId::kWgrad160Drop;
}

// Dropout's registers leave room for one block of any config.
constexpr int blocks_per_sm(ConfigId id, bool has_dropout) {
  return has_dropout ? 1 : tile_config(id).min_blocks;
}

// What the choice of a config looks at.
struct ProblemShape {
  Layout layout;
  int64_t M, N, max_K;
  int num_segments;
  bool scales_segments;  // several segments, of which one has its own scale_m
  bool scales_k, has_dropout;

  constexpr bool walks() const { return num_segments == 1 && max_K <= 160; }
  // TN with the rank along K, W += Btᵀ·diag(d)·A; a wgrad has it along M.
  constexpr bool is_merge() const { return layout == Layout::kTN && scales_k && !has_dropout; }
};

// L2 figures: bytes that cross from L2 to the SMs over those of operands and result, each once, for
// large M, N and K, at R = 156 where not said otherwise. benchmarks/results/kernels_ptx.json has
// the counted ones.
constexpr ConfigId select_config(const ProblemShape& p, int smem_bytes) {
  const bool has_large_smem = smem_bytes >= kLargeSmemBytes;
  switch (p.layout) {
    case Layout::kNT:  // one N tile holds the whole rank, so x is read once
      if (p.scales_segments) return ConfigId::kShrinkScaled;
      if (p.N <= 40) return ConfigId::kShrink40;  // R = 39: L2 1.31
      if (p.N <= 80) return ConfigId::kShrink80;  // R = 78: L2 1.61
      if (p.M <= 128) return ConfigId::kShrink160;
      return ConfigId::kShrink160Tall;  // 256 rows share a load of A: L2 1.61, with 128 2.22
    case Layout::kNN:
      if (p.scales_segments) return ConfigId::kExpandScaled;
      if (!p.walks()) return ConfigId::kExpandSegments;
      if (p.max_K <= 48) return ConfigId::kExpand48;  // R = 39: L2 1.15; 40 KiB, so two blocks
      if (p.max_K <= 80) return ConfigId::kExpand80;  // R = 78: L2 1.30
      // Narrow: the widest panel beside which A fits 99 KiB, L2 1.41. Wide: L2 1.30, and the next
      // tile's A is loaded while this one is stored.
      return has_large_smem && p.M > 96 ? ConfigId::kExpand160Wide : ConfigId::kExpand160;
    default:
      if (p.scales_segments) {  // R = 128: L2 2.00, with 48 rows, x read three times, 4.00
        return p.M <= 48 ? ConfigId::kWgradScaled : ConfigId::kWgradScaled128;
      }
      if (p.is_merge()) {
        if (!p.walks()) return ConfigId::kMergeSegments;
        if (p.max_K <= 80) return ConfigId::kMerge80;  // as expand
        return has_large_smem ? ConfigId::kMerge160Wide : ConfigId::kMerge160;
      }
      // One M tile holds the whole rank, so x is read once.
      if (p.M <= 48) return ConfigId::kWgrad48;  // R = 39: L2 1.31
      if (p.M <= 80) return ConfigId::kWgrad80;  // R = 78: L2 1.61
      // 256 columns share a load of g: L2 1.61, with 128 2.22.
      return p.has_dropout ? ConfigId::kWgrad160Drop : ConfigId::kWgrad160;
  }
}

// Whether one kernel, that of widest(), computes two problems of a layout. The narrower one's tiles
// are then partly empty: they cost tensor time that DRAM hides, and no traffic. In wgrad, dropout
// is drawn for problems without it too, which is hidden likewise: no two warps draw the same, or in
// fp32 two do, for twice the bytes.
constexpr bool can_share_kernel(const ProblemShape& a, const ProblemShape& b) {
  if (a.layout != b.layout || a.scales_segments || b.scales_segments || a.is_merge() ||
      b.is_merge()) {
    return false;
  }
  if (a.layout == Layout::kTN) return true;
  return a.has_dropout == b.has_dropout && (a.layout == Layout::kNT || a.walks() == b.walks());
}

constexpr ProblemShape widest(const ProblemShape& a, const ProblemShape& b) {
  return {a.layout,
          a.M > b.M ? a.M : b.M,
          a.N > b.N ? a.N : b.N,
          a.max_K > b.max_K ? a.max_K : b.max_K,
          a.num_segments > b.num_segments ? a.num_segments : b.num_segments,
          a.scales_segments || b.scales_segments,
          a.scales_k || b.scales_k,
          a.has_dropout || b.has_dropout};
}

}  // namespace rasa::cuda
