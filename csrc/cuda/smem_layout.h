// Where a 16-bit tile's elements lie in shared memory, and which of them a lane passes to ldmatrix.
//
// A tile is stored as in global memory, kCols 16-bit elements to a row, cut into column blocks of
// 64, 32 and 16 elements that follow each other. Inside a block the 16-byte chunks of a row are
// permuted by XOR, so that any 8 consecutive rows of one chunk (ldmatrix) and any 8 consecutive
// chunks in storage order (cp.async) lie in 8 different groups of 4 banks. No padding.
#pragma once

#include "../host_device.h"

namespace rasa::cuda {

constexpr int kChunk = 8;  // 16-bit elements in 16 bytes
constexpr int kChunkBytes = 16;

struct ChunkCoord {
  int row, chunk;
};

template <int kRows, int kCols>
struct TileLayout {
  static_assert(kCols % 16 == 0 && kRows % 8 == 0, "a tile is cut into 8 x 16 elements at least");

  static constexpr int kElements = kChunk, kElementBytes = 2;
  static constexpr int kRowsOfTile = kRows;
  static constexpr int kChunks = kRows * kCols / kChunk;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static constexpr int kWide = kCols / 64;         // blocks of 64 columns
  static constexpr bool kHas32 = kCols % 64 / 32;  // then a block of 32 columns
  static constexpr int kFirst32 = kWide * 8, kFirst16 = kFirst32 + (kHas32 ? 4 : 0);  // chunks

  // Byte offset of a chunk.
  RASA_HD static constexpr int offset(int row, int chunk) {
    if (chunk < kFirst32) {
      return (chunk / 8 * kRows + row) * 128 + (chunk % 8 ^ row % 8) * kChunkBytes;
    }
    if (chunk < kFirst16) {
      return (kFirst32 * kRows + row * 4 + ((chunk - kFirst32) ^ row / 2 % 4)) * kChunkBytes;
    }
    return (kFirst16 * kRows + row * 2 + ((chunk - kFirst16) ^ row / 4 % 2)) * kChunkBytes;
  }

  // The order in which threads copy chunks: consecutive ones are consecutive columns of a block.
  RASA_HD static constexpr ChunkCoord coord(int index) {
    if (index < kFirst32 * kRows) {
      const int block = kWide == 1 ? 0 : index / (8 * kRows);
      const int inside = index - block * 8 * kRows;
      return {inside / 8, block * 8 + inside % 8};
    }
    if (index < kFirst16 * kRows) {
      const int inside = index - kFirst32 * kRows;
      return {inside / 4, kFirst32 + inside % 4};
    }
    const int inside = index - kFirst16 * kRows;
    return {inside / 2, kFirst16 + inside % 2};
  }
};

// Lane l's row and chunk, relative to a 16 × 16 corner, for an ldmatrix.x4 whose four results are
// in the order of an mma operand. Matrices are numbered as lanes 8i … 8i + 7 address them.
//   by rows     (0,0) (8,0) (0,8) (8,8)   A stored (M,K); B stored (K,N), transposed
//   by columns  (0,0) (0,8) (8,0) (8,8)   B stored (N,K); A stored (K,M), transposed
RASA_HD constexpr ChunkCoord fragment_by_rows(int lane) { return {lane % 16, lane / 16}; }
RASA_HD constexpr ChunkCoord fragment_by_columns(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

}  // namespace rasa::cuda
