// The order of work where B stays: a block walks over consecutive tiles, down the columns of C.
//
// Tiles of one column need the same columns of B, the panel, which is loaded (and scaled) once per
// column and block. A is loaded for each tile, kSlots - 1 tiles ahead, so that with two slots it
// comes in while the tile before is multiplied and stored. Staging rows lie over the slot just
// read.
#pragma once

#include "kernel_args.h"
#include "ptx.cuh"
#include "tile_order.h"

namespace rasa::cuda {

template <class Tile>
__device__ __forceinline__ void walk_columns(const KernelArgs& args, char* smem) {
  constexpr int kAhead = Tile::kSlots - 1;
  static_assert(kAhead <= 1, "a turn commits the panel's copies and then those of one A");
  const TileRange range = tile_range(args.num_tiles, gridDim.x, blockIdx.x);
  // The first kAhead turns only load A: one loop, so the loads' code exists once.
#pragma unroll 1
  for (int t = range.first - kAhead; t < range.end; ++t) {
    const bool computes = t >= range.first;
    Tile tile(args, smem, computes ? t : range.first);
    const bool needs_panel = computes && (t == range.first || tile.is_first_of_column());
    const int next = t + kAhead;
    __syncthreads();  // the tile before is stored: tables, panel and staging rows are read
    if (next < range.end) Tile(args, smem, next).write_A_rows();
    if (needs_panel) tile.write_B_rows();
    __syncthreads();  // the tables are written
    if (needs_panel) tile.load_panel();
    cp_async_commit();
    if (next < range.end) Tile(args, smem, next).load_A(next);
    cp_async_commit();
    if (!computes) continue;
    cp_async_wait<kAhead>();  // all but the next tile's A
    tile.scale_A(t);
    if (needs_panel) tile.scale_panel();
    __syncthreads();  // A and the panel are visible to all; the tables are read
    tile.write_C_rows();
    __syncthreads();  // the tables of C are written
    const bool by_chunks = tile.stores_chunks();
    typename Tile::Base base = {};
    // On its way while the tile is multiplied. Where two blocks share an SM there are no registers
    // for that, and the other block has work meanwhile.
    if (Tile::kLoadsBaseFirst && by_chunks) tile.load_base(base);
    typename Tile::Accumulators acc = {};
    tile.multiply_panel(acc, t);
    if (!Tile::kLoadsBaseFirst && by_chunks) tile.load_base(base);
    __syncthreads();  // every warp has read A, so staging may lie over it
    if (by_chunks) {
      tile.store_chunks(acc, base, t);
    } else {
      tile.store_rows_of(acc, t);
    }
  }
}

}  // namespace rasa::cuda
