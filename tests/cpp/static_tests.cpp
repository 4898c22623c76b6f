// What the compiler can prove of layouts, configs and choices: this file compiles, or a statement
// below is false. It is never run. schedule_tests.cpp says that all work is done once. Both are
// C++17 without torch, as kernels are, and so show that the headers they share are too.
#include <utility>

#include "cuda/gemm_config.h"
#include "cuda/kernel_args.h"
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

template <int kRows, int kCols>
constexpr bool layout_holds() {
  using Tile = TileLayout<kRows, kCols>;
  bool is_used[Tile::kChunks] = {};
  for (int i = 0; i < Tile::kChunks; ++i) {
    const ChunkCoord c = Tile::coord(i);
    const int offset = Tile::offset(c.row, c.chunk);
    if (c.row >= kRows || c.chunk >= kCols / kChunk || offset % kChunkBytes != 0 ||
        offset >= Tile::kBytes || is_used[offset / kChunkBytes]) {
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
  for (int chunk = 0; chunk < kCols / kChunk; ++chunk) {  // 8 rows of an ldmatrix
    for (int row = 0; row < kRows; row += 8) {
      int offsets[8] = {};
      for (int r = 0; r < 8; ++r) offsets[r] = Tile::offset(row + r, chunk);
      if (banks(offsets) != 0xff) return false;
    }
  }
  return true;
}
template <int kId>
constexpr bool layouts_hold() {
  constexpr TileConfig c = tile_config(static_cast<ConfigId>(kId));
  constexpr int A_rows = c.A_rows_are_k() ? c.block_k : c.block_m;
  constexpr int B_rows = c.B_rows_are_k() ? c.block_k : c.block_n;
  return layout_holds<A_rows, c.block_m * c.block_k / A_rows>() &&
         layout_holds<B_rows, c.block_n * c.block_k / B_rows>();
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
  const ConfigId id =
      select_config({layout, M, N, K, 1, false, false, false, false}, kLargeSmemBytes);
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

// What the kernel of a config takes for granted of a problem.
constexpr bool serves(ConfigId id, const ProblemShape& p, bool has_dropout, int smem_bytes) {
  const TileConfig c = tile_config(id);
  return c.layout == p.layout && c.smem_bytes() <= smem_bytes && is_for(id, smem_bytes) &&
         c.scales_segments == p.scales_segments &&
         (!c.walks || (p.num_segments == 1 && p.max_K <= c.block_k)) &&
         !(is_merge(id) && (p.has_row_dot || p.has_dropout)) &&
         (has_dropout ? has_dropout_kernel(id) : !p.has_dropout && has_plain_kernel(id));
}
// For problems of every form and size, and in each GPU's memory.
constexpr bool choice_holds(const ProblemShape& p) {
  for (const int smem_bytes : {kSmallSmemBytes, kLargeSmemBytes}) {
    if (!serves(select_config(p, smem_bytes), p, p.has_dropout, smem_bytes)) return false;
  }
  return true;
}
constexpr ProblemShape test_shape(Layout layout, int64_t M, int64_t N, int64_t K, int bits) {
  return {layout,          M,         N, K, 1 + bits % 2, bits % 4 == 3, (bits & 4) != 0,
          (bits & 8) != 0, bits >= 16};
}
constexpr bool choices_hold() {
  const int64_t sizes[] = {1, 48, 80, 96, 128, 160, 161, 4096};
  for (const Layout layout : {Layout::kNN, Layout::kNT, Layout::kTN}) {
    for (const int64_t M : sizes) {
      for (const int64_t N : sizes) {
        for (const int64_t K : {0, 48, 80, 81, 161}) {
          for (int bits = 0; bits < 32; ++bits) {
            if (!choice_holds(test_shape(layout, M, N, K, bits))) return false;
          }
        }
      }
    }
  }
  return true;
}
static_assert(choices_hold(), "a chosen config fits the GPU and the problem");

// Where problems share a kernel, it serves each of them.
constexpr bool sharing_holds(const ProblemShape& a, const ProblemShape& b) {
  if (!can_share_kernel(a, b)) return true;
  if (!can_share_kernel(b, a)) return false;
  const ProblemShape both = widest(a, b);
  for (const int smem_bytes : {kSmallSmemBytes, kLargeSmemBytes}) {
    const ConfigId id = select_config(both, smem_bytes);
    for (const ProblemShape& p : {a, b}) {
      if (!serves(id, p, both.has_dropout, smem_bytes)) return false;
    }
  }
  return true;
}
constexpr bool all_sharing_holds() {
  const int64_t sizes[] = {39, 156, 300};  // of the rank, be it M, N or K
  for (const Layout layout : {Layout::kNN, Layout::kNT, Layout::kTN}) {
    for (int i = 0; i < 9; ++i) {
      for (int bits = 0; bits < 32 * 32; ++bits) {
        const int64_t R = sizes[i / 3], S = sizes[i % 3];
        const ProblemShape a = test_shape(layout, R, R, R, bits / 32);
        const ProblemShape b = test_shape(layout, S, S, S, bits % 32);
        if (!sharing_holds(a, b)) return false;
      }
    }
  }
  return true;
}
static_assert(all_sharing_holds(), "a shared kernel computes each of its problems");

constexpr int arg_bytes_of(Layout layout, int64_t M, int64_t N, int64_t K,
                           bool scales_segments = false, bool scales_k = false) {
  const int segments = scales_segments ? 2 : 1;
  return arg_bytes(select_config(
      {layout, M, N, K, segments, scales_segments, scales_k, false, false}, kLargeSmemBytes));
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
    const TileConfig shrink = tile_config(select_config(
        {Layout::kNT, long_axis, R, 4096, 1, false, false, false, false}, kSmallSmemBytes));
    const TileConfig wgrad = tile_config(select_config(
        {Layout::kTN, R, long_axis, 4096, 1, false, false, false, false}, kSmallSmemBytes));
    if (shrink.block_n < R || wgrad.block_m < R) return false;
  }
  return true;
}
static_assert(rank_fits_one_tile(7) && rank_fits_one_tile(39) && rank_fits_one_tile(40) &&
                  rank_fits_one_tile(78) && rank_fits_one_tile(156),
              "one tile holds the whole rank, so the long operand is read once");

}  // namespace cuda
}  // namespace rasa
