// A warp's part of a tile times 16 of k, in mma.m16n8k16 of bf16 or fp16: shared memory → fragments
// → accumulators. warp_product_f32.cuh is the same for fp32 tiles.
//
// Dropout acts on the fragments of A in NT and of B in TN; in NN, on the finished sums.
#pragma once

#include <type_traits>

#include "dropout.cuh"
#include "gemm_config.h"
#include "kernel_args.h"
#include "ptx.cuh"
#include "smem_layout.h"
#include "smem_layout_f32.h"

namespace rasa::cuda {

template <ConfigId kId, int kRows, int kCols>
using OperandTile = std::conditional_t<tile_config(kId).element_bytes == 4,
                                       TileLayoutF32<kRows, kCols>, TileLayout<kRows, kCols>>;

// The shapes of a config, for those who compute with its tiles.
template <ConfigId kId>
struct TileShape {
  static constexpr TileConfig kTile = tile_config(kId);
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kBlockK = kTile.block_k;
  static constexpr int kTilesM = kTile.warp_m() / 16, kTilesN = kTile.warp_n() / 8;
  static constexpr bool kAByK = kTile.A_rows_are_k(), kBByK = kTile.B_rows_are_k();
  using ATile = OperandTile<kId, kAByK ? kBlockK : kBlockM, kAByK ? kBlockM : kBlockK>;
  using BTile = OperandTile<kId, kBByK ? kBlockK : kBlockN, kBByK ? kBlockN : kBlockK>;
  using Accumulators = float[kTilesM][kTilesN][4];
};

// Where a warp is: its corner in the tile, the tile's corner in C, and dropout's draws.
struct WarpPlace {
  const ProblemArg& problem;
  int lane;
  int warp_m, warp_n, m0, n0;
  uint64_t seed;
};

template <ConfigId kId, class Element, bool kDropout>
class WarpProduct : TileShape<kId> {
  using Shape = TileShape<kId>;
  using Shape::kTilesM, Shape::kTilesN, Shape::kAByK, Shape::kBByK;
  using typename Shape::Accumulators, typename Shape::ATile, typename Shape::BTile;
  static constexpr Layout kLayout = Shape::kTile.layout;

 public:
  __device__ explicit WarpProduct(const WarpPlace& place) : at_(place) {}

  // acc += the kk-th k16 block of the tiles at A and B in shared memory, the k16-th of the segment.
  // Of the two operands' fragments, the fewer are kept in registers and the others pass by.
  __device__ void multiply_k16(Accumulators& acc, uint32_t A, uint32_t B, int kk, int k16) const {
    if constexpr (4 * kTilesM <= 2 * kTilesN) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) A_fragment(a[i], A, i, kk, k16);
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        uint32_t b[4];
        B_fragment(b, B, j, kk, k16);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) multiply(acc[i], a[i], b, j);
      }
    } else {
      uint32_t b[(kTilesN + 1) / 2][4];
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) B_fragment(b[j / 2], B, j, kk, k16);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        uint32_t a[4];
        A_fragment(a, A, i, kk, k16);
#pragma unroll
        for (int j = 0; j < kTilesN; j += 2) multiply(acc[i], a, b[j / 2], j);
      }
    }
  }

 private:
  // The n8 tiles j and j + 1, where the second one exists.
  __device__ static void multiply(float (&acc)[kTilesN][4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[4], int j) {
    mma_m16n8k16(acc[j], a, b[0], b[1], Element());
    if (j + 1 < kTilesN) mma_m16n8k16(acc[j + 1], a, b[2], b[3], Element());
  }

  __device__ void A_fragment(uint32_t (&a)[4], uint32_t tile, int i, int kk, int k16) const {
    const int m = at_.warp_m + 16 * i;
    if constexpr (kAByK) {
      const ChunkCoord c = fragment_by_columns(at_.lane);
      ldmatrix_x4_trans(a, tile + ATile::offset(16 * kk + c.row, m / kChunk + c.chunk));
    } else {
      const ChunkCoord c = fragment_by_rows(at_.lane);
      ldmatrix_x4(a, tile + ATile::offset(m + c.row, 2 * kk + c.chunk));
    }
    if constexpr (kDropout && kLayout == Layout::kNT) {
      uint32_t keep[4];
      keep_masks(keep, at_.seed, at_.problem.drop_threshold, (at_.m0 + m) / 16, k16);
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] &= keep[r];
    }
  }

  __device__ void B_fragment(uint32_t (&b)[4], uint32_t tile, int j, int kk, int k16) const {
    const int n = at_.warp_n + 8 * j;
    if constexpr (kBByK) {
      static_assert(kTilesN % 2 == 0, "n8 tiles come in pairs where B is stored (K,N)");
      const ChunkCoord c = fragment_by_rows(at_.lane);
      ldmatrix_x4_trans(b, tile + BTile::offset(16 * kk + c.row, n / kChunk + c.chunk));
    } else if (j + 1 < kTilesN) {
      const ChunkCoord c = fragment_by_columns(at_.lane);
      ldmatrix_x4(b, tile + BTile::offset(n + c.row, 2 * kk + c.chunk));
    } else {
      const ChunkCoord c = fragment_by_columns(at_.lane % 16);
      ldmatrix_x2(b[0], b[1], tile + BTile::offset(n + c.row, 2 * kk + c.chunk));
    }
    if constexpr (kDropout && kLayout == Layout::kTN) {
      // Tokens are along k here: an A fragment's masks, each transposed.
      uint32_t keep[4];
      keep_masks(keep, at_.seed, at_.problem.drop_threshold, k16, (at_.n0 + n) / 16);
#pragma unroll
      for (int q = 0; q < 4; ++q) b[q] &= movmatrix_trans(keep[q]);
    }
  }

  const WarpPlace at_;
};

}  // namespace rasa::cuda
