// What the compiler can prove of layouts, configs and choices: this file compiles, or a statement
// below is false. It is never run. schedule_tests.cpp says that all work is done once. Both are
// C++17 without torch, as kernels are, and so show that the headers they share are too.
#include <utility>

#include "cuda/f32_kernels.h"
#include "cuda/gemm_config.h"
#include "cuda/kernel_args.h"
#include "cuda/smem_layout_f32.h"
#include "cuda/split.h"
#include "gemm_problem.h"
#include "host_device.h"
#include "philox.h"

namespace rasa {

constexpr bool rounding_holds(int64_t limit) {
  for (int64_t b = 1; b <= limit; ++b) {
    for (int64_t a = 0; a <= limit; ++a) {
      const int64_t up = round_up(a, b);
      if (up % b != 0 || up < a || up - a >= b || ceil_div(a, b) * b != up) return false;
    }
  }
  return true;
}
static_assert(rounding_holds(64), "round_up is the smallest multiple that is not smaller");

static_assert(element_size(DType::kF64) == sizeof(double), "element sizes are those of the types");
static_assert(element_size(DType::kF32) == sizeof(float), "element sizes are those of the types");
static_assert(element_size(DType::kBF16) == 2 && element_size(DType::kF16) == 2,
              "both half types take two bytes");

static_assert(kDrawRange == 1u << 15, "a draw is 15 bits: p is rounded to a multiple of 2^-15");

namespace cuda {

// Groups of 4 banks that 8 chunks lie in, as a set of bits; 0xff when no two share one.
constexpr int banks(const int (&offsets)[8]) {
  int groups = 0;
  for (const int offset : offsets) groups |= 1 << offset / kChunkBytes % 8;
  return groups;
}

// Copies fill a tile of this many rows and chunks in a row, once and without bank conflicts.
template <class Tile>
constexpr bool copies_hold(int rows, int chunks) {
  bool is_used[Tile::kChunks] = {};
  for (int i = 0; i < Tile::kChunks; ++i) {
    const ChunkCoord c = Tile::coord(i);
    const int offset = Tile::offset(c.row, c.chunk);
    if (c.row >= rows || c.chunk >= chunks || offset % kChunkBytes != 0 || offset >= Tile::kBytes ||
        is_used[offset / kChunkBytes]) {
      return false;
    }
    is_used[offset / kChunkBytes] = true;
  }
  for (int i = 0; i < Tile::kChunks; i += 8) {  // 8 lanes of a copy
    int offsets[8] = {};
    for (int lane = 0; lane < 8; ++lane) {
      const ChunkCoord c = Tile::coord(i + lane);
      offsets[lane] = Tile::offset(c.row, c.chunk);
    }
    if (banks(offsets) != 0xff) return false;
  }
  return true;
}

template <int kRows, int kCols>
constexpr bool layout_holds() {
  using Tile = TileLayout<kRows, kCols>;
  if (!copies_hold<Tile>(kRows, kCols / kChunk)) return false;
  for (int chunk = 0; chunk < kCols / kChunk; ++chunk) {  // 8 rows of an ldmatrix
    for (int row = 0; row < kRows; row += 8) {
      int offsets[8] = {};
      for (int r = 0; r < 8; ++r) offsets[r] = Tile::offset(row + r, chunk);
      if (banks(offsets) != 0xff) return false;
    }
  }
  return true;
}
// Lanes of one load whose words of 4 bytes lie in different banks: all 32 of ld.shared, or a half
// warp of ld.shared.v2, from `lane` on.
template <class Tile>
constexpr bool f32_load_holds(int row0, int column0, int n, int r, bool rows_are_k, int lane) {
  bool is_used[32] = {};
  const int num_lanes = rows_are_k ? 32 : 16, words = rows_are_k ? 1 : 2;
  for (int i = 0; i < num_lanes; ++i) {
    const FragmentCoord c = f32_A_fragment(lane + i, n, r);
    const int row = row0 + (rows_are_k ? c.k : c.mn), column = column0 + (rows_are_k ? c.mn : c.k);
    const int offset = Tile::element_offset(row, column);
    if (offset % (4 * words) != 0) return false;
    for (int w = 0; w < words; ++w) {
      const int bank = (offset / 4 + w) % 32;
      if (is_used[bank] || Tile::element_offset(row, column + w) != offset + 4 * w) return false;
      is_used[bank] = true;
    }
  }
  return true;
}

// Rows along M or N come 8 at a time (B's fragment is the upper half of A's), rows along k 16.
template <int kRows, int kCols>
constexpr bool f32_layout_holds(bool rows_are_k) {
  using Tile = TileLayoutF32<kRows, kCols>;
  if (!copies_hold<Tile>(kRows, kCols / Tile::kElements)) return false;
  for (int row = 0; row < kRows; row += rows_are_k ? 16 : 8) {
    for (int column = 0; column < kCols; column += rows_are_k ? 8 : 16) {
      for (int n = 0; n < 2; ++n) {
        if (!rows_are_k && !(f32_load_holds<Tile>(row, column, n, 0, false, 0) &&
                             f32_load_holds<Tile>(row, column, n, 0, false, 16))) {
          return false;
        }
        for (int r = 0; rows_are_k && r < 4; r += 2) {
          if (!f32_load_holds<Tile>(row, column, n, r, true, 0)) return false;
        }
      }
    }
  }
  return true;
}

// Each element of a k16 block is in one register of one lane, of A and of B at the same k; and its
// two neighbours along k are those of one mma.m16n8k16 register, whose mask they take.
constexpr bool f32_fragments_hold() {
  bool is_held[16][16] = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < 2; ++n) {
      for (int r = 0; r < 4; ++r) {
        const FragmentCoord a = f32_A_fragment(lane, n, r), b = f32_B_fragment(lane, n, r / 2);
        if (is_held[a.mn][a.k] || a.k != b.k || a.mn % 8 != b.mn) return false;
        is_held[a.mn][a.k] = true;
        // philox.h: lane, word and half of element (m, c).
        const int word = a.mn / 8 + 2 * (a.k / 8), half = a.k % 2;
        if (a.mn % 8 * 4 + a.k % 8 / 2 != lane || word != r % 2 + 2 * n || half != r / 2) {
          return false;
        }
      }
    }
  }
  return true;
}
static_assert(f32_fragments_hold(), "fp32 fragments hold what 16-bit ones do, and its mask");

// The offsets of a warp of `size` rows or columns, as the sum of a lane's own and a constant.
template <class Tile>
constexpr bool lane_offsets_hold(bool rows_are_k, int first, int size) {
  for (int lane = 0; lane < 32; ++lane) {
    const int lane_mn = lane / 4, lane_k = 2 * (lane % 4);
    for (int mn = 0; mn < size; mn += 8) {
      if (rows_are_k) {
        const LaneOffsetsByK<Tile> at(lane, first);
        for (int k = 0; k < Tile::kRowsOfTile; k += 8) {
          for (int half = 0; half < 2; ++half) {
            const int row = k + lane_k + half;
            if (at(k, half, mn) != Tile::element_offset(row, first + mn + lane_mn)) return false;
          }
        }
      } else if constexpr (Tile::kColsOfTile <= 32) {
        const LaneOffsetsByRow<Tile> at(lane, first);
        for (int k = 0; k < Tile::kColsOfTile; k += 8) {
          if (at(mn, k) != Tile::element_offset(first + mn + lane_mn, k + lane_k)) return false;
        }
      }
    }
  }
  return true;
}
template <class Tile>
constexpr bool warps_find(bool rows_are_k, int block, int warps) {
  for (int warp = 0; warp < warps; ++warp) {
    const int size = block / warps;
    if (!lane_offsets_hold<Tile>(rows_are_k, warp * size, size)) return false;
  }
  return true;
}

template <int kId>
constexpr bool layouts_hold() {
  constexpr TileConfig c = tile_config(static_cast<ConfigId>(kId));
  constexpr int A_rows = c.A_rows_are_k() ? c.block_k : c.block_m;
  constexpr int B_rows = c.B_rows_are_k() ? c.block_k : c.block_n;
  constexpr int A_cols = c.block_m * c.block_k / A_rows, B_cols = c.block_n * c.block_k / B_rows;
  if constexpr (c.element_bytes == 4) {
    using A = TileLayoutF32<A_rows, A_cols>;
    using B = TileLayoutF32<B_rows, B_cols>;
    return f32_layout_holds<A_rows, A_cols>(c.A_rows_are_k()) &&
           f32_layout_holds<B_rows, B_cols>(c.B_rows_are_k()) &&
           warps_find<A>(c.A_rows_are_k(), c.block_m, c.warps_m) &&
           warps_find<B>(c.B_rows_are_k(), c.block_n, c.warps_n);
  } else {
    return layout_holds<A_rows, A_cols>() && layout_holds<B_rows, B_cols>();
  }
}
template <int... kIds>
constexpr bool all_layouts_hold(std::integer_sequence<int, kIds...>) {
  return (layouts_hold<kIds>() && ...);
}
static_assert(all_layouts_hold(std::make_integer_sequence<int, kNumConfigs>()),
              "a tile's chunks fill it once, copies and ldmatrix have no bank conflicts");

// Lanes 8i to 8i + 7 address matrix i, rows in order; the four matrices are the corners of 16 × 16.
constexpr bool fragments_hold() {
  for (int lane = 0; lane < 32; ++lane) {
    const ChunkCoord rows = fragment_by_rows(lane), columns = fragment_by_columns(lane);
    const int matrix = lane / 8;
    if (rows.row != lane % 8 + matrix % 2 * 8 || rows.chunk != matrix / 2) return false;
    if (columns.row != lane % 8 + matrix / 2 * 8 || columns.chunk != matrix % 2) return false;
  }
  return true;
}
static_assert(fragments_hold(), "ldmatrix's results are in the order of mma's operands");

// Splits of M × N with a reduction over K, on a GPU of 132 SMs.
constexpr int splits_of(Layout layout, int64_t M, int64_t N, int64_t K) {
  const ConfigId id = select_config({layout, M, N, K, 1, false, false, false}, kLargeSmemBytes);
  const TileConfig tile = tile_config(id);
  const SplitWork work = {ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n),
                          static_cast<int32_t>(ceil_div(K, tile.block_k))};
  const int64_t slots = 132 * blocks_per_sm(id, false);
  return num_splits(work.num_k, choose_k_per_split(&work, 1, tile, {132, kLargeSmemBytes}, slots));
}
static_assert(splits_of(Layout::kNT, 512, 40, 576) == 1 &&
                  splits_of(Layout::kTN, 39, 576, 512) == 1,
              "a small problem is not worth a second launch");
static_assert(splits_of(Layout::kNT, 32768, 40, 4096) == 1 &&
                  splits_of(Layout::kTN, 39, 32768, 4096) == 1,
              "tiles that fill the GPU are not split");
static_assert(splits_of(Layout::kNN, 128, 128, 160) == 1, "an expand's reduction is not split");
static_assert(splits_of(Layout::kNT, 4096, 40, 4096) > 1 &&
                  splits_of(Layout::kTN, 39, 4096, 4096) > 1 &&
                  splits_of(Layout::kNT, 1, 40, 14336) > 4,
              "few tiles of a long reduction are");

constexpr bool configs_hold() {
  for (int id = 0; id < kNumConfigs; ++id) {
    if (!config_is_sound(static_cast<ConfigId>(id))) return false;
  }
  return true;
}
static_assert(configs_hold(), "every config fits the shared memory it is chosen for");

// What plan.h chooses for 16-bit elements, and for fp32 ones that are multiplied in TF32.
constexpr ConfigId chosen(const ProblemShape& p, int element_bytes, int smem_bytes) {
  return element_bytes == 4 ? select_f32_config(p, false) : select_config(p, smem_bytes);
}

// What the kernel of a config takes for granted of a problem.
constexpr bool serves(ConfigId id, const ProblemShape& p, bool has_dropout, int element_bytes,
                      int smem_bytes) {
  const TileConfig c = tile_config(id);
  return c.layout == p.layout && c.smem_bytes() <= smem_bytes && is_for(id, smem_bytes) &&
         c.scales_segments == p.scales_segments && c.element_bytes == element_bytes &&
         !c.splits_operands && (!c.walks || (p.num_segments == 1 && p.max_K <= c.block_k)) &&
         !(is_merge(id) && p.has_dropout) &&
         (has_dropout ? has_dropout_kernel(id) : !p.has_dropout && has_plain_kernel(id));
}
// For problems of every form and size, and in each GPU's memory.
constexpr bool choice_holds(const ProblemShape& p, int element_bytes) {
  for (const int smem_bytes : {kSmallSmemBytes, kLargeSmemBytes}) {
    const ConfigId id = chosen(p, element_bytes, smem_bytes);
    if (!serves(id, p, p.has_dropout, element_bytes, smem_bytes)) return false;
  }
  return true;
}
constexpr ProblemShape test_shape(Layout layout, int64_t M, int64_t N, int64_t K, int bits) {
  return {layout, M, N, K, 1 + bits % 2, bits % 4 == 3, (bits & 4) != 0, bits >= 8};
}
constexpr bool choices_hold(int element_bytes) {
  const int64_t sizes[] = {1, 48, 80, 96, 128, 160, 161, 4096};
  for (const Layout layout : {Layout::kNN, Layout::kNT, Layout::kTN}) {
    for (const int64_t M : sizes) {
      for (const int64_t N : sizes) {
        for (const int64_t K : {0, 48, 80, 81, 161}) {
          for (int bits = 0; bits < 16; ++bits) {
            if (!choice_holds(test_shape(layout, M, N, K, bits), element_bytes)) return false;
          }
        }
      }
    }
  }
  return true;
}
static_assert(choices_hold(2), "a chosen config fits the GPU and the problem");
static_assert(choices_hold(4), "a config chosen for fp32 likewise");

// In full precision: TN problems of one segment without dropout.
constexpr bool full_precision_holds() {
  constexpr TileConfig c = tile_config(ConfigId::kF32Merge);
  for (const int64_t size : {1, 39, 4096}) {
    const ProblemShape p = {Layout::kTN, size, size, size, 1, false, true, false};
    if (select_f32_config(p, true) != ConfigId::kF32Merge || can_share_kernel(p, p)) return false;
  }
  return c.splits_operands && c.layout == Layout::kTN && c.element_bytes == 4 &&
         arg_bytes(ConfigId::kF32Merge) == kLargeArgBytes && has_plain_kernel(ConfigId::kF32Merge);
}
static_assert(full_precision_holds(),
              "in full precision, operands are split, and a launch is large");

// Where problems share a kernel, it serves each of them.
constexpr bool sharing_holds(const ProblemShape& a, const ProblemShape& b, int element_bytes) {
  if (!can_share_kernel(a, b)) return true;
  if (!can_share_kernel(b, a)) return false;
  const ProblemShape both = widest(a, b);
  for (const int smem_bytes : {kSmallSmemBytes, kLargeSmemBytes}) {
    const ConfigId id = chosen(both, element_bytes, smem_bytes);
    for (const ProblemShape& p : {a, b}) {
      if (!serves(id, p, both.has_dropout, element_bytes, smem_bytes)) return false;
    }
  }
  return true;
}
constexpr bool all_sharing_holds(int element_bytes) {
  const int64_t sizes[] = {39, 156, 300};  // of the rank, be it M, N or K
  for (const Layout layout : {Layout::kNN, Layout::kNT, Layout::kTN}) {
    for (int i = 0; i < 9; ++i) {
      for (int bits = 0; bits < 16 * 16; ++bits) {
        const int64_t R = sizes[i / 3], S = sizes[i % 3];
        const ProblemShape a = test_shape(layout, R, R, R, bits / 16);
        const ProblemShape b = test_shape(layout, S, S, S, bits % 16);
        if (!sharing_holds(a, b, element_bytes)) return false;
      }
    }
  }
  return true;
}
static_assert(all_sharing_holds(2), "a shared kernel computes each of its problems");
static_assert(all_sharing_holds(4), "an fp32 kernel that is shared likewise");

constexpr int arg_bytes_of(Layout layout, int64_t M, int64_t N, int64_t K,
                           bool scales_segments = false, bool scales_k = false) {
  const int segments = scales_segments ? 2 : 1;
  return arg_bytes(select_config({layout, M, N, K, segments, scales_segments, scales_k, false},
                                 kLargeSmemBytes));
}
static_assert(arg_bytes_of(Layout::kNT, 4096, 40, 4096) == kSmallArgBytes &&
                  arg_bytes_of(Layout::kNN, 4096, 4096, 156) == kSmallArgBytes &&
                  arg_bytes_of(Layout::kTN, 156, 4096, 4096) == kSmallArgBytes &&
                  arg_bytes(ConfigId::kReduce) == kSmallArgBytes,
              "a training step's launches copy few arguments");
static_assert(arg_bytes_of(Layout::kTN, 4096, 4096, 40, false, true) == kLargeArgBytes &&
                  arg_bytes_of(Layout::kTN, 128, 4096, 64, true) == kLargeArgBytes,
              "merges and pools of all layers share a launch");

constexpr bool rank_fits_one_tile(int64_t R) {
  for (const int64_t long_axis : {128, 4096}) {
    const TileConfig shrink = tile_config(
        select_config({Layout::kNT, long_axis, R, 4096, 1, false, false, false}, kSmallSmemBytes));
    const TileConfig wgrad = tile_config(
        select_config({Layout::kTN, R, long_axis, 4096, 1, false, false, false}, kSmallSmemBytes));
    if (shrink.block_n < R || wgrad.block_m < R) return false;
    const TileConfig f32_shrink = tile_config(
        select_f32_config({Layout::kNT, long_axis, R, 4096, 1, false, false, false}, false));
    const TileConfig f32_wgrad = tile_config(
        select_f32_config({Layout::kTN, R, long_axis, 4096, 1, false, false, false}, false));
    if (f32_shrink.block_n < R || f32_wgrad.block_m < R) return false;
  }
  return true;
}
static_assert(rank_fits_one_tile(7) && rank_fits_one_tile(39) && rank_fits_one_tile(40) &&
                  rank_fits_one_tile(78) && rank_fits_one_tile(156),
              "one tile holds the whole rank, so the long operand is read once");

}  // namespace cuda
}  // namespace rasa
