// In which order tiles are computed, and which block computes which. Pure.
#pragma once

#include <cstdint>

#include "../gemm_problem.h"
#include "../host_device.h"

namespace rasa::cuda {

struct TileCoord {
  int m, n;  // of tiles
};

// Tiles that run at the same time share the long operand: x of an NT problem has many rows, that of
// a TN problem many columns. In NN and TN, tiles that follow each other share columns of B.
RASA_HD constexpr TileCoord tile_coord(Layout layout, int tile, int tiles_m, int tiles_n) {
  return layout == Layout::kNT ? TileCoord{tile / tiles_n, tile % tiles_n}
                               : TileCoord{tile % tiles_m, tile / tiles_m};
}

struct TilePlace {
  int split;
  TileCoord coord;
};

// What a tile of a problem computes: the tiles of a split follow those of the split before. An NN
// reduction, over the rank, is short and never split.
RASA_HD constexpr bool can_split(Layout layout) { return layout != Layout::kNN; }
RASA_HD constexpr TilePlace tile_place(Layout layout, int tile, int tiles_m, int tiles_n) {
  const int split = can_split(layout) ? tile / (tiles_m * tiles_n) : 0;
  return {split, tile_coord(layout, tile - split * tiles_m * tiles_n, tiles_m, tiles_n)};
}

// starts(p) <= tile < starts(p + 1), where starts(p) is the first tile of problem p.
template <class Starts>
RASA_HD constexpr int problem_of_tile(const Starts& starts, int num_problems, int tile) {
  int first = 0, last = num_problems - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (starts(middle) <= tile) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

struct TileRange {
  int first, end;
};

// The tiles that a block walks over: those of all blocks are consecutive, in order of the blocks,
// and differ by one at most in length.
RASA_HD constexpr TileRange tile_range(int num_tiles, int num_blocks, int block) {
  const int length = num_tiles / num_blocks, longer = num_tiles % num_blocks;
  const int first = block * length + (block < longer ? block : longer);
  return {first, first + length + (block < longer ? 1 : 0)};
}

}  // namespace rasa::cuda
