// Global → shared memory: one operand's tile of one k block.
//
// A stack of row blocks has no single stride, so the tile's row addresses are looked up once and
// kept in a table in shared memory, 0 for a row that reads as zeros. Copies take theirs from there.
#pragma once

#include "element.cuh"
#include "ptx.cuh"
#include "smem_layout.h"

namespace rasa::cuda {

// The address of a row of a stack; 0 beyond its last one.
__device__ __forceinline__ uint64_t row_address(const KernelArgs& args, const MatrixArg& matrix,
                                                int row) {
  const int end = matrix.first_block + matrix.num_blocks;
  for (int b = matrix.first_block; b < end; ++b) {
    const Block& block = args.block(b);
    if (row < block.rows) {
      if (block.ptr == nullptr) return 0;
      const int64_t bytes = int64_t{row} * block.ld * (matrix.is_f32 ? 4 : 2);
      return reinterpret_cast<uint64_t>(block.ptr) + bytes;
    }
    row -= block.rows;
  }
  return 0;
}

// table[i] = the address of row first + i, 0 from `limit` on. All threads of the block call it; the
// entries are visible after the next barrier.
__device__ __forceinline__ void write_rows(uint64_t* table, int num_rows, const KernelArgs& args,
                                           const MatrixArg& matrix, int first, int limit) {
  for (int i = threadIdx.x; i < num_rows; i += blockDim.x) {
    table[i] = first + i < limit ? row_address(args, matrix, first + i) : 0;
  }
}

// The columns [first, limit) of an operand that a tile covers, and the factors along k.
struct TileColumns {
  int first, limit;
  const void* scale_k;  // nullptr: ones. Indexed by first_k + row, or by column
  int first_k, K;
  bool scale_by_row;
  DType scale_dtype;
};

template <class Element>
__device__ __forceinline__ bool is_copied(const MatrixArg& matrix) {
  return matrix.is_aligned && matrix.is_f32 == (sizeof(Element) == 4);
}

// scale_k for the chunk at a row of the tile and a column of the operand; 0 beyond the reduction.
template <int kCount>
__device__ __forceinline__ void load_factors(float (&factors)[kCount], int row, int column,
                                             const TileColumns& columns) {
  if (columns.scale_by_row) {
    const int k = columns.first_k + row;
    const float factor = k < columns.K ? load_scale(columns.scale_k, k, columns.scale_dtype) : 0.0f;
#pragma unroll
    for (float& x : factors) x = factor;
  } else {
    load_scales(factors, columns.scale_k, column, columns.K - column, columns.scale_dtype);
  }
}

// kUnrolls: the addresses of all copies stay in registers from one k block to the next.
template <class Layout, int kThreads, bool kUnrolls>
__device__ __forceinline__ void copy_tile(uint32_t tile, const uint64_t* rows,
                                          const TileColumns& columns) {
  constexpr int kCopies = ceil_div(Layout::kChunks, kThreads);
  constexpr int kUnroll = kUnrolls ? kCopies : 1;
#pragma unroll kUnroll
  for (int i = 0; i < kCopies; ++i) {
    const int index = threadIdx.x + i * kThreads;
    if (Layout::kChunks % kThreads != 0 && index >= Layout::kChunks) break;
    const ChunkCoord c = Layout::coord(index);
    const uint64_t row = rows[c.row];
    const int column = columns.first + c.chunk * Layout::kElements;
    // Beyond the matrix is zero-filled, not skipped: the mma sums it, and stale bytes can be NaN.
    const int left = Layout::kElementBytes * (columns.limit - column);
    const int bytes = row == 0 ? 0 : min(max(left, 0), kChunkBytes);
    cp_async_16(tile + Layout::offset(c.row, c.chunk),
                row + int64_t{Layout::kElementBytes} * column, bytes);
  }
}

// The same through registers: for other storage, rows that are not aligned, and scale_k. The stores
// are visible after the barrier that the tile's reader waits at anyway.
template <class Layout, int kThreads, class Element>
__device__ __forceinline__ void convert_tile(char* tile, const uint64_t* rows,
                                             const TileColumns& columns, const MatrixArg& matrix) {
#pragma unroll 1
  for (int index = threadIdx.x; index < Layout::kChunks; index += kThreads) {
    const ChunkCoord c = Layout::coord(index);
    const uint64_t row = rows[c.row];
    const int column = columns.first + c.chunk * Layout::kElements;
    float v[Layout::kElements];
    load_chunk<Element>(v, row, column, row == 0 ? 0 : columns.limit - column, matrix);
    if (columns.scale_k != nullptr && row != 0) {
      float factors[Layout::kElements];
      load_factors(factors, c.row, column, columns);
#pragma unroll
      for (int j = 0; j < Layout::kElements; ++j) v[j] *= factors[j];
    }
    *reinterpret_cast<uint4*>(tile + Layout::offset(c.row, c.chunk)) = pack_chunk<Element>(v);
  }
}

// kScalesLater: what is copied is scaled by scale_tile() when it has landed.
template <class Layout, int kThreads, bool kUnrolls, bool kScalesLater, class Element>
__device__ __forceinline__ void load_tile(char* tile, const uint64_t* rows,
                                          const TileColumns& columns, const MatrixArg& matrix) {
  if (is_copied<Element>(matrix) && (kScalesLater || columns.scale_k == nullptr)) {
    copy_tile<Layout, kThreads, kUnrolls>(smem_address(tile), rows, columns);
  } else {
    convert_tile<Layout, kThreads, Element>(tile, rows, columns, matrix);
  }
}

// Each thread scales what it copied itself, so it needs to have waited for no other's copies. It
// takes its chunks in an order that has those with the same factors follow each other.
template <class Layout, int kThreads, class Element>
__device__ __forceinline__ void scale_tile(char* tile, const TileColumns& columns,
                                           const MatrixArg& matrix) {
  if (columns.scale_k == nullptr || !is_copied<Element>(matrix)) return;
  constexpr int kBlock = Layout::kWide == 0 ? 0 : 8 * Layout::kRowsOfTile;
  constexpr bool kByRow =
      kBlock > 0 && kBlock % kThreads == 0 && Layout::kWide * kBlock == Layout::kChunks;
  float factors[kChunk];
  int loaded = -1;
#pragma unroll 1
  for (int turn = 0; turn < ceil_div(Layout::kChunks, kThreads); ++turn) {
    int index = threadIdx.x + turn * kThreads;
    if constexpr (kByRow) {
      index = threadIdx.x + turn / Layout::kWide * kThreads + turn % Layout::kWide * kBlock;
    }
    if (index >= Layout::kChunks) break;
    const ChunkCoord c = Layout::coord(index);
    const int column = columns.first + c.chunk * kChunk;
    const int key = columns.scale_by_row ? c.row : column;
    if (key != loaded) load_factors(factors, c.row, column, columns);
    loaded = key;
    uint4* chunk = reinterpret_cast<uint4*>(tile + Layout::offset(c.row, c.chunk));
    float v[kChunk];
    unpack_8(v, *chunk, Element());
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[j] *= factors[j];
    *chunk = pack_8(v, Element());
  }
}

}  // namespace rasa::cuda
