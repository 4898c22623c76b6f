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
