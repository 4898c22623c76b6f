// That all work is done, and once: tiles, splits, segments, walks, partial sums. As
// static_tests.cpp, this file compiles, or a statement below is false; it is never run.
#include "cuda/gemm_config.h"
#include "cuda/kernel_args.h"
#include "cuda/split.h"
#include "cuda/tile_order.h"
#include "gemm_problem.h"
#include "host_device.h"

namespace rasa::cuda {

constexpr bool schedule_holds(Layout layout, int tiles_m, int tiles_n) {
  bool is_done[64] = {};
  for (int tile = 0; tile < tiles_m * tiles_n; ++tile) {
    const TileCoord c = tile_coord(layout, tile, tiles_m, tiles_n);
    if (c.m >= tiles_m || c.n >= tiles_n || is_done[c.m * tiles_n + c.n]) return false;
    is_done[c.m * tiles_n + c.n] = true;
  }
  return true;
}
constexpr bool schedules_hold() {
  for (const Layout layout : {Layout::kNN, Layout::kNT, Layout::kTN}) {
    for (int tiles_m = 1; tiles_m <= 8; ++tiles_m) {
      for (int tiles_n = 1; tiles_n <= 8; ++tiles_n) {
        if (!schedule_holds(layout, tiles_m, tiles_n)) return false;
      }
    }
  }
  return true;
}
static_assert(schedules_hold(), "every tile is computed once");

// Blocks that walk over the tiles of a problem: each tile once, in order; where a tile needs
// another panel than the one before, it is its block's first or the first of its column.
constexpr bool walk_holds(int tiles_m, int tiles_n, int num_blocks) {
  const int num_tiles = tiles_m * tiles_n;
  int next = 0;
  for (int block = 0; block < num_blocks; ++block) {
    const TileRange range = tile_range(num_tiles, num_blocks, block);
    if (range.first != next || range.end <= range.first) return false;
    if (range.end - range.first > ceil_div(num_tiles, num_blocks)) return false;
    for (int tile = range.first + 1; tile < range.end; ++tile) {
      const TileCoord before = tile_coord(Layout::kNN, tile - 1, tiles_m, tiles_n);
      const TileCoord c = tile_coord(Layout::kNN, tile, tiles_m, tiles_n);
      if ((c.n != before.n) != (c.m == 0)) return false;
    }
    next = range.end;
  }
  return next == num_tiles;
}
constexpr bool walks_hold() {
  for (int tiles_m = 1; tiles_m <= 7; ++tiles_m) {
    for (int tiles_n = 1; tiles_n <= 6; ++tiles_n) {
      for (int blocks = 1; blocks <= tiles_m * tiles_n; ++blocks) {
        if (!walk_holds(tiles_m, tiles_n, blocks)) return false;
      }
    }
  }
  return true;
}
static_assert(walks_hold(), "a walk covers every tile once and loads each panel it needs");

// Segments of the given numbers of k blocks, split every way.
constexpr bool splits_hold(int first, int second, int third) {
  const int num_k[] = {first, second, third}, total = first + second + third;
  for (int target = 1; target <= total + 1; ++target) {
    const int splits = num_splits(total, target), k_per_split = even_k_per_split(total, target);
    if (k_per_split > target || splits < 1) return false;
    int is_done[48] = {};
    for (int split = 0; split < splits; ++split) {
      int count = 0;
      for (int s = 0, first_k = 0; s < 3; first_k += num_k[s++]) {
        const KRange range = split_range(split, k_per_split, first_k, num_k[s]);
        for (int k = range.begin; k < range.end; ++k) {
          if (is_done[first_k + k]++ > 0) return false;
          ++count;
        }
      }
      if (count == 0 && total > 0) return false;
    }
    for (int k = 0; k < total; ++k) {
      if (is_done[k] == 0) return false;
    }
  }
  return true;
}
constexpr bool splits_hold() {
  for (int k = 0; k <= 48; ++k) {
    if (!splits_hold(k, 0, 0)) return false;
  }
  for (int a = 0; a <= 7; ++a) {
    for (int b = 0; b <= 7; ++b) {
      if (!splits_hold(a, b, 3) || !splits_hold(a, 0, b)) return false;
    }
  }
  return true;
}
static_assert(splits_hold(), "every k block is in one split, and no split is empty");
static_assert(split_range(0, kUnsplit, 0, 5).end == 5 && split_range(0, kUnsplit, 40, 5).end == 5 &&
                  split_range(0, kUnsplit, 40, 5).begin == 0,
              "unsplit, all segments are one range");

// A problem of a launch, as plan.h makes it: tiles of C, k blocks of up to two segments, and how
// many of them a split has.
struct TestProblem {
  int tiles_m, tiles_n;
  int num_k[2];
  int k_per_split;

  constexpr int total_k() const { return num_k[0] + num_k[1]; }
  constexpr int splits() const { return num_splits(total_k(), k_per_split); }
  constexpr int num_tiles() const { return tiles_m * tiles_n * splits(); }
};

// What the blocks of a launch compute, counted: every k block of every tile of every problem once,
// by the split whose partial it belongs to.
template <int kProblems>
class CountedLaunch {
 public:
  constexpr CountedLaunch(Layout layout, const TestProblem (&problems)[kProblems])
      : layout_(layout), problems_(problems) {
    for (int p = 0; p < kProblems; ++p) starts_[p + 1] = starts_[p] + problems[p].num_tiles();
  }
  constexpr int num_tiles() const { return starts_[kProblems]; }

  constexpr bool compute(int tile) {
    const int p = problem_of_tile([this](int i) { return starts_[i]; }, kProblems, tile);
    const TestProblem& problem = problems_[p];
    if (tile < starts_[p] || tile >= starts_[p + 1]) return false;
    const TilePlace place =
        tile_place(layout_, tile - starts_[p], problem.tiles_m, problem.tiles_n);
    const TileCoord c = place.coord;
    if (place.split < 0 || place.split >= problem.splits() || c.m < 0 || c.m >= problem.tiles_m ||
        c.n < 0 || c.n >= problem.tiles_n) {
      return false;
    }
    bool& is_stored = is_stored_[p][place.split][c.m][c.n];
    if (is_stored) return false;
    is_stored = true;
    for (int s = 0, first_k = 0; s < 2; first_k += problem.num_k[s++]) {
      const KRange k = split_range(place.split, problem.k_per_split, first_k, problem.num_k[s]);
      for (int i = k.begin; i < k.end; ++i) ++times_[p][c.m][c.n][first_k + i];
    }
    return true;
  }

  // After every tile is computed, none twice: then every (split, m, n) is stored.
  constexpr bool is_complete() const {
    for (int p = 0; p < kProblems; ++p) {
      const TestProblem& problem = problems_[p];
      for (int m = 0; m < problem.tiles_m; ++m) {
        for (int n = 0; n < problem.tiles_n; ++n) {
          for (int k = 0; k < problem.total_k(); ++k) {
            if (times_[p][m][n][k] != 1) return false;
          }
          for (int split = 0; split < problem.splits(); ++split) {
            if (!is_stored_[p][split][m][n]) return false;
          }
        }
      }
    }
    return true;
  }

 private:
  Layout layout_;
  const TestProblem (&problems_)[kProblems];
  int starts_[kProblems + 1] = {};
  bool is_stored_[kProblems][7][4][4] = {};
  int times_[kProblems][4][4][7] = {};
};

// The loop of grouped_gemm_sm80, and in a walk that of walk_columns.
template <int kProblems>
constexpr bool launch_holds(Layout layout, bool walks, const TestProblem (&problems)[kProblems],
                            int grid) {
  CountedLaunch<kProblems> launch(layout, problems);
  for (int block = 0; block < grid; ++block) {
    const TileRange range = tile_range(launch.num_tiles(), grid, block);
    const int first = walks ? range.first : block, step = walks ? 1 : grid;
    const int end = walks ? range.end : launch.num_tiles();
    for (int tile = first; tile < end; tile += step) {
      if (!launch.compute(tile)) return false;
    }
  }
  return launch.is_complete();
}

// A problem of up to 4 + 3 k blocks in two segments, split every way, between others, on grids of
// one block to one for each tile.
constexpr bool split_launches_hold(Layout layout) {
  const TileCoord shapes[] = {{1, 1}, {3, 1}, {2, 3}};
  for (const TileCoord& tiles : shapes) {
    for (int i = 0; i < 20; ++i) {
      const int first = i / 4, second = i % 4, total = first + second;
      for (int k = 1; k <= total || k == 1; ++k) {
        const int k_per_split = k == total ? kUnsplit : even_k_per_split(total, k);
        const TestProblem problems[] = {{2, 1, {2, 1}, 2},
                                        {tiles.m, tiles.n, {first, second}, k_per_split},
                                        {1, 1, {0, 0}, kUnsplit}};
        const int num_tiles = 5 + problems[1].num_tiles();
        for (const int grid : {1, 3, num_tiles}) {
          if (!launch_holds(layout, false, problems, grid)) return false;
        }
      }
    }
  }
  return true;
}
static_assert(split_launches_hold(Layout::kNT) && split_launches_hold(Layout::kTN),
              "every k block of every tile of every problem is in one split, on any grid");

// Unsplit problems, with one k block (a walk) or several.
constexpr bool unsplit_launches_hold(Layout layout, bool walks) {
  for (int shape = 0; shape < 9; ++shape) {
    const int first = walks ? 1 : 3, second = walks ? 0 : 2;
    const TestProblem problems[] = {
        {1 + shape / 3, 1 + shape % 3, {first, second}, kUnsplit},
        {1 + shape % 3, 4, {1, second}, kUnsplit},
        {3, 1, {first, 0}, kUnsplit},
    };
    const int num_tiles =
        problems[0].num_tiles() + problems[1].num_tiles() + problems[2].num_tiles();
    for (int grid = 1; grid <= num_tiles; ++grid) {
      if (!launch_holds(layout, walks, problems, grid)) return false;
    }
  }
  return true;
}
static_assert(unsplit_launches_hold(Layout::kNN, false) &&
                  unsplit_launches_hold(Layout::kNN, true) &&
                  unsplit_launches_hold(Layout::kTN, true),
              "every tile is computed once, by strides or walks, on any grid");

// The problem of a tile, where problems have one tile to three, as many as one launch takes.
constexpr bool search_holds(int num_problems) {
  const auto start = [](int p) { return 2 * p - (p % 3 == 2 ? 1 : 0); };
  for (int p = 0; p < num_problems; ++p) {
    for (int tile = start(p); tile < start(p + 1); ++tile) {
      if (problem_of_tile(start, num_problems, tile) != p) return false;
    }
  }
  return true;
}
static_assert(search_holds(1) && search_holds(2) && search_holds(7) && search_holds(256),
              "a tile finds its problem");

// Partials of C (M,N): what the reduce kernel's threads read is what tiles stored, each float4 of
// each row of each partial once, inside the memory that plan.h allocates.
constexpr bool partials_hold(int M, int N, int num_partials) {
  const int row_quads = static_cast<int>(ceil_div(N, 4)), num_quads = M * row_quads;
  const int64_t size = partial_size(M, N);
  if (size != int64_t{4} * num_quads) return false;
  for (int split = 0; split < num_partials; ++split) {
    for (int m = 0; m < M; ++m) {
      if (partial_row(split, M, N, m) != split * size + int64_t{4} * row_quads * m) return false;
    }
  }
  int next = 0;  // quads come in order, group by group
  const int num_tiles = static_cast<int>(num_reduce_tiles(M, N, num_partials));
  for (int tile = 0; tile < num_tiles; ++tile) {
    for (int thread = 0; thread < kReduceThreads; ++thread) {
      const ReducePlace place = reduce_place(tile, thread, num_partials, N);
      const int columns = kReduceThreads / place.groups;
      if (place.group != thread / columns || place.group >= place.groups) return false;
      if (place.group > 0) {
        if (place.quad != tile * columns + thread % columns) return false;
      } else if (place.quad != next++) {
        return false;
      }
      if (place.m < M && partial_row(0, M, N, place.m) + place.n != int64_t{4} * place.quad) {
        return false;
      }
      if ((place.m < M) != (place.quad < num_quads) || place.n >= 4 * row_quads) return false;
    }
  }
  return next >= num_quads;
}
constexpr bool all_partials_hold() {
  for (const int num_partials : {1, 2, kMaxSplits, kMaxSplits + 1, 200}) {
    for (const int M : {1, 2, 39}) {
      for (const int N : {1, 3, 4, 5, 63}) {
        if (!partials_hold(M, N, num_partials)) return false;
      }
    }
  }
  return true;
}
static_assert(all_partials_hold(), "the sum reads what the splits wrote, each float once");

// The threads of a quad read every partial once between them.
constexpr bool groups_hold() {
  for (int num_partials = 0; num_partials <= 100; ++num_partials) {
    int times[100] = {};
    const int groups = reduce_groups(num_partials);
    for (int group = 0; group < groups; ++group) {
      for (int p = group; p < num_partials; p += groups) ++times[p];
    }
    for (int p = 0; p < num_partials; ++p) {
      if (times[p] != 1) return false;
    }
    if (kReduceThreads % groups != 0) return false;
  }
  return true;
}
static_assert(groups_hold(), "every partial is added once");

// A diagonal of R elements: each is in the rows and columns of one warp of one of its tiles.
constexpr bool diagonal_holds(const TileConfig& tile, int R) {
  int times[1100] = {};
  const int block = tile.diagonal_block();
  for (int corner = 0; corner < ceil_div(R, block) * block; corner += block) {
    for (int row = 0; row < tile.block_m && row < tile.block_n && corner + row < R; ++row) {
      ++times[corner + row];
    }
  }
  for (int m = 0; m < R; ++m) {
    if (times[m] != 1) return false;
  }
  return block % 16 == 0;  // tiles begin at whole chunks
}
constexpr bool all_diagonals_hold() {
  for (int id = 0; id < kNumConfigs; ++id) {
    const TileConfig tile = tile_config(static_cast<ConfigId>(id));
    if (tile.layout != Layout::kTN || tile.walks) continue;
    for (const int R : {1, 39, 48, 49, 128, 156, 161, 1024}) {
      if (!diagonal_holds(tile, R)) return false;
    }
  }
  return true;
}
static_assert(all_diagonals_hold(), "every element of a diagonal is in one tile");

// What a plan does not split, it does not split beside a diagonal either: that has no more k blocks
// than the longest of its launch.
constexpr bool beside_diagonal_holds(const TileConfig& tile, int64_t tiles, int32_t num_k) {
  for (const int64_t diagonal : {1, 4}) {
    const SplitWork work[] = {{tiles, num_k}, {diagonal, num_k}};
    for (const int32_t num_sms : {108, 132}) {
      const DeviceInfo device = {num_sms, kLargeSmemBytes};
      const int32_t alone = choose_k_per_split(work, 1, tile, device, num_sms);
      const int32_t beside = choose_k_per_split(work, 2, tile, device, num_sms);
      if (num_splits(num_k, alone) == 1 && num_splits(num_k, beside) > 1) return false;
    }
  }
  return true;
}
constexpr bool all_beside_diagonals_hold() {
  for (const ConfigId id : {ConfigId::kWgrad48, ConfigId::kWgrad160, ConfigId::kF32Wgrad160}) {
    for (const int64_t tiles : {1, 7, 30, 53, 65, 107, 131}) {
      for (const int32_t num_k : {1, 9, 20, 64, 130}) {
        if (!beside_diagonal_holds(tile_config(id), tiles, num_k)) return false;
      }
    }
  }
  return true;
}
static_assert(all_beside_diagonals_hold(), "a diagonal makes no plan split");

// The plan's choice, for every config and GPU: no more splits than there are k blocks or than
// kMaxSplits, and none of a reduction that is never split.
constexpr bool split_choice_holds(const TileConfig& tile, int64_t tiles, int32_t num_k) {
  const SplitWork work[] = {{tiles, num_k}, {1, num_k / 3}};
  for (const int32_t num_sms : {1, 16, 132}) {
    const int32_t k = choose_k_per_split(work, 2, tile, {num_sms, kLargeSmemBytes}, num_sms);
    if (k < 1 || num_splits(num_k, k) > kMaxSplits) return false;
    if (!can_split(tile.layout) && num_splits(num_k, k) > 1) return false;
    if (even_k_per_split(num_k, k) > k) return false;
  }
  return true;
}
constexpr bool split_choices_hold() {
  for (int id = 0; id < kNumConfigs; ++id) {
    const TileConfig tile = tile_config(static_cast<ConfigId>(id));
    for (const int64_t tiles : {1, 8, 500}) {
      for (const int32_t num_k : {0, 1, 9, 64, 1000}) {
        if (!split_choice_holds(tile, tiles, num_k)) return false;
      }
    }
  }
  return true;
}
static_assert(split_choices_hold(), "a plan splits into at least one k block and 32 parts at most");

}  // namespace rasa::cuda
