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
  kShrinkScaled,
  kExpand48,
  kExpand80,
  kExpandScaled,
  kWgrad48,
  kWgrad80,
  kWgrad160,
  kWgradScaled,
  kMerge,
  kReduce,  // no tile shape: the sum of partials, reduce_kernel.cuh
};
constexpr int kNumConfigs = 12;  // tile shapes

struct TileConfig {
  Layout layout;
  int block_m, block_n, block_k;
  int warps_m, warps_n;
  int stages;
  int min_blocks;        // per SM
  bool scales_segments;  // each segment has its scale_m: costs a second set of accumulators

  RASA_HD constexpr int threads() const { return 32 * warps_m * warps_n; }
  RASA_HD constexpr int warp_m() const { return block_m / warps_m; }
  RASA_HD constexpr int warp_n() const { return block_n / warps_n; }
  RASA_HD constexpr bool A_rows_are_k() const { return layout == Layout::kTN; }
  RASA_HD constexpr bool B_rows_are_k() const { return layout != Layout::kNT; }
  RASA_HD constexpr int stage_bytes() const { return (block_m + block_n) * block_k * 2; }

  // Tables of row addresses, in entries of 8 bytes. Rows along k change with the k block and have
  // two tables: one is read while the next is written.
  RASA_HD constexpr int A_entries() const { return A_rows_are_k() ? 2 * block_k : block_m; }
  RASA_HD constexpr int B_entries() const { return B_rows_are_k() ? 2 * block_k : block_n; }
  RASA_HD constexpr int table_bytes() const {
    return 8 * (A_entries() + B_entries() + 2 * block_m);
  }

  // The epilogue stages 16 rows per warp in fp32, over the stages. Pitch in floats: 8 mod 16 makes
  // the accumulators' 8-byte stores free of bank conflicts.
  RASA_HD constexpr int staging_pitch() const {
    return warp_n() % 16 == 8 ? warp_n() : warp_n() + 8;
  }
  RASA_HD constexpr int staging_bytes() const {
    return warps_m * warps_n * 16 * staging_pitch() * 4;
  }
  RASA_HD constexpr int smem_bytes() const { return stages * stage_bytes() + table_bytes(); }
};

constexpr TileConfig tile_config(ConfigId id) {
  switch (id) {
    //                                M    N   K  warps stages blocks
    case ConfigId::kShrink40:
      return {Layout::kNT, 128, 40, 64, 4, 1, 4, 1, false};
    case ConfigId::kShrink80:
      return {Layout::kNT, 128, 80, 64, 4, 1, 3, 1, false};
    case ConfigId::kShrink160:
      return {Layout::kNT, 128, 160, 32, 4, 2, 4, 1, false};
    case ConfigId::kShrinkScaled:
      return {Layout::kNT, 64, 40, 64, 4, 1, 3, 1, true};
    case ConfigId::kExpand48:
      return {Layout::kNN, 128, 128, 48, 4, 2, 2, 2, false};
    case ConfigId::kExpand80:
      return {Layout::kNN, 128, 128, 80, 4, 2, 2, 1, false};
    case ConfigId::kExpandScaled:
      return {Layout::kNN, 64, 128, 48, 4, 2, 2, 1, true};
    case ConfigId::kWgrad48:
      return {Layout::kTN, 48, 128, 64, 1, 4, 3, 1, false};
    case ConfigId::kWgrad80:
      return {Layout::kTN, 80, 128, 64, 1, 4, 3, 1, false};
    case ConfigId::kWgrad160:
      return {Layout::kTN, 160, 128, 32, 2, 4, 4, 1, false};
    case ConfigId::kWgradScaled:
      return {Layout::kTN, 48, 128, 64, 1, 4, 3, 1, true};
    default:
      return {Layout::kTN, 128, 128, 48, 4, 2, 2, 1, false};
  }
}

// The shared memory that one block may have on sm_86, sm_89 and sm_120, the least of all parts.
constexpr int kMaxSmemBytes = 99 * 1024;

constexpr bool config_is_sound(const TileConfig& c) {
  return c.smem_bytes() <= kMaxSmemBytes && c.staging_bytes() <= c.stages * c.stage_bytes() &&
         c.warp_m() % 16 == 0 && c.warp_n() % 8 == 0 && c.block_k % 16 == 0 && c.stages >= 2 &&
         (c.layout == Layout::kNT || c.warp_n() % 16 == 0) && c.threads() <= 256;
}

// Which configs grouped_gemm.cu instantiates with dropout beside those without.
constexpr bool has_dropout_kernel(ConfigId id) { return id != ConfigId::kMerge; }

// The argument block that the kernel declares: large where a group has many problems, or a problem
// many segments.
constexpr int arg_bytes(ConfigId id) {
  const bool is_large = tile_config(id).scales_segments || id == ConfigId::kMerge;
  return is_large ? kLargeArgBytes : kSmallArgBytes;
}

// Dropout's registers leave room for one block of any config.
constexpr int blocks_per_sm(ConfigId id, bool has_dropout) {
  return has_dropout ? 1 : tile_config(id).min_blocks;
}

// scales_segments: several segments, of which one has its own scale_m.
constexpr ConfigId select_config(Layout layout, int64_t M, int64_t N, int64_t max_K,
                                 bool scales_segments) {
  switch (layout) {
    case Layout::kNT:  // one N tile holds the whole rank, so x is read once
      if (scales_segments) return ConfigId::kShrinkScaled;
      if (N <= 40) return ConfigId::kShrink40;
      return N <= 80 ? ConfigId::kShrink80 : ConfigId::kShrink160;
    case Layout::kNN:  // one k block holds the rank up to 80, two hold 160
      if (scales_segments) return ConfigId::kExpandScaled;
      return max_K <= 48 ? ConfigId::kExpand48 : ConfigId::kExpand80;
    default:  // one M tile holds the whole rank, so x is read once; merge has the rank along K
      if (scales_segments) return ConfigId::kWgradScaled;
      if (M <= 48) return ConfigId::kWgrad48;
      if (M <= 80) return ConfigId::kWgrad80;
      return M <= 160 ? ConfigId::kWgrad160 : ConfigId::kMerge;
  }
}

}  // namespace rasa::cuda
