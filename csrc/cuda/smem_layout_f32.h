// Where an fp32 tile's elements lie in shared memory, and which of them a lane passes to mma.
//
// A tile is stored as in global memory, kCols elements to a row, cut into column blocks of 32 and
// 16 elements that follow each other: 128 bytes are a row, or two rows of the block of 16. Inside
// these, pairs of 16-byte chunks are permuted by XOR, so that no two lanes of a load lie in one
// bank, be it 8 bytes each along rows of M or N, or 4 bytes each of four rows along k. No padding.
//
// The order of k inside a k16 block is free, where A and B agree. Slots t and t + 4 of the n-th
// m16n8k8 hold k = 8n + 2t and 8n + 2t + 1: a lane's two elements are neighbours, and are those
// that mma.m16n8k16 would have in one register. So the dropout mask is that of 16-bit kernels.
#pragma once

#include "../host_device.h"
#include "smem_layout.h"

namespace rasa::cuda {

template <int kRows, int kCols>
struct TileLayoutF32 {
  static_assert(kCols % 16 == 0 && kRows % 8 == 0, "a tile is cut into 8 x 16 elements at least");

  static constexpr int kRowsOfTile = kRows, kColsOfTile = kCols;
  static constexpr int kElements = 4;  // in a chunk
  static constexpr int kElementBytes = 4;
  static constexpr int kChunks = kRows * kCols / kElements;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static constexpr int kFirst16 = kCols / 32 * 8;  // the chunk that begins the block of 16 columns

  // Byte offset of a chunk.
  RASA_HD static constexpr int offset(int row, int chunk) {
    if (chunk < kFirst16) {
      const int key = (row ^ row / 4 % 2) % 4;  // differs in any 4 rows, and in 4 even or odd ones
      return (chunk / 8 * kRows + row) * 128 + (chunk % 8 ^ 2 * key) * kChunkBytes;
    }
    const int place = row % 2 * 4 + (chunk - kFirst16);
    return kFirst16 * kRows * kChunkBytes + row / 2 * 128 + (place ^ row / 2 % 4 * 2) * kChunkBytes;
  }

  RASA_HD static constexpr int element_offset(int row, int column) {
    return offset(row, column / kElements) + column % kElements * kElementBytes;
  }

  // The order in which threads copy chunks: consecutive ones are consecutive columns of a block.
  RASA_HD static constexpr ChunkCoord coord(int index) {
    if (index < kFirst16 * kRows) {
      const int block = index / (8 * kRows), inside = index - block * 8 * kRows;
      return {inside / 8, block * 8 + inside % 8};
    }
    const int inside = index - kFirst16 * kRows;
    return {inside / 4, kFirst16 + inside % 4};
  }
};

struct FragmentCoord {
  int mn, k;
};

// What register r of a lane holds for the n-th m16n8k8 of a k16 block, relative to its corner: of A
// r = 0 … 3, of B r = 0, 1.
RASA_HD constexpr FragmentCoord f32_A_fragment(int lane, int n, int r) {
  return {lane / 4 + r % 2 * 8, 8 * n + 2 * (lane % 4) + r / 2};
}
RASA_HD constexpr FragmentCoord f32_B_fragment(int lane, int n, int r) {
  return {lane / 4, 8 * n + 2 * (lane % 4) + r};
}

// Where a lane's elements lie: an offset of its own for each place that XOR gives a pair of chunks,
// so few registers, and beyond it a constant.

// Of a tile with rows along M or N, of which a warp has those from first_row on.
template <class Tile>
struct LaneOffsetsByRow {
  static_assert(Tile::kColsOfTile == 16 || Tile::kColsOfTile == 32, "a row is one block");
  static constexpr int kPairs = Tile::kColsOfTile / 8;
  int base[kPairs] = {};

  RASA_HD constexpr LaneOffsetsByRow(int lane, int first_row) {
    for (int pair = 0; pair < kPairs; ++pair) {
      base[pair] = first_row * Tile::kColsOfTile * Tile::kElementBytes +
                   Tile::element_offset(lane / 4, 8 * pair + 2 * (lane % 4));
    }
  }
  // Of row + lane / 4 and k + 2 (lane % 4) and its neighbour; both are multiples of 8.
  RASA_HD constexpr int operator()(int row, int k) const {
    return base[k / 8] + row * Tile::kColsOfTile * Tile::kElementBytes;
  }
};

// Of a tile with rows along k, of which a warp has the columns from first_column on.
template <class Tile>
struct LaneOffsetsByK {
  static constexpr int kWideCols = Tile::kFirst16 * Tile::kElements;
  static constexpr bool kHas16 = Tile::kColsOfTile > kWideCols;
  int base[4] = {}, base16[4] = {};

  RASA_HD constexpr LaneOffsetsByK(int lane, int first_column) {
    for (int place = 0; place < 4; ++place) {
      base[place] = Tile::element_offset(2 * (lane % 4), first_column + 8 * place + lane / 4);
      if (kHas16) {
        base16[place] = Tile::element_offset(2 * (lane % 4) + place / 2,
                                             kWideCols + 8 * (place % 2) + lane / 4);
      }
    }
  }
  // Of k + 2 (lane % 4) + half and column + lane / 4; k and column are multiples of 8.
  RASA_HD constexpr int operator()(int k, int half, int column) const {
    if (kHas16 && column >= kWideCols) return base16[2 * half + column / 8 % 2] + k * 64;
    return base[column / 8 % 4 ^ half] + (column / 32 * Tile::kRowsOfTile + k + half) * 128;
  }
};

}  // namespace rasa::cuda
