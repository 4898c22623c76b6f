// A warp's part of an fp32 tile times 16 of k, in two mma.m16n8k8 of tf32: as warp_product.cuh.
//
// Operands are rounded to TF32, 11 significant bits. Where the config splits_operands, each is the
// sum of two TF32 numbers, hi and lo, that miss at most its last bit, and three products give what
// float32 would: lo·hi + hi·lo + hi·hi. They are summed from zero for each k16 block and added to
// the accumulators in fp32, since the tensor cores' own sums are not rounded to nearest. An operand
// that is infinite makes NaN of its row.
#pragma once

#include "warp_product.cuh"

namespace rasa::cuda {

// The kN registers of a fragment.
template <int kN, bool kSplits>
class FragmentF32 {
 public:
  __device__ void set(int i, float x) {
    hi_[i] = cvt_rna_tf32(x);
    if constexpr (kSplits) {
      lo_[i] = cvt_rna_tf32(x - __uint_as_float(hi_[i]));
    }
  }
  __device__ const uint32_t* hi(int i) const { return hi_ + i; }
  __device__ const uint32_t* lo(int i) const { return lo_ + i; }

 private:
  uint32_t hi_[kN];
  uint32_t lo_[kSplits ? kN : 1];
};

template <ConfigId kId, bool kDropout>
class WarpProduct<kId, float, kDropout> : TileShape<kId> {
  using Shape = TileShape<kId>;
  using Shape::kTilesM, Shape::kTilesN, Shape::kAByK, Shape::kBByK;
  using typename Shape::Accumulators, typename Shape::ATile, typename Shape::BTile;
  static constexpr Layout kLayout = Shape::kTile.layout;
  static constexpr bool kSplits = Shape::kTile.splits_operands;
  using AOffsets = std::conditional_t<kAByK, LaneOffsetsByK<ATile>, LaneOffsetsByRow<ATile>>;
  using BOffsets = std::conditional_t<kBByK, LaneOffsetsByK<BTile>, LaneOffsetsByRow<BTile>>;
  // Of both m16n8k8 of a k16 block, one after the other.
  using AFragment = FragmentF32<8, kSplits>;
  using BFragment = FragmentF32<4, kSplits>;

 public:
  __device__ explicit WarpProduct(const WarpPlace& place) : at_(place) {}

  // acc += the kk-th k16 block of the tiles at A and B in shared memory, the k16-th of the segment.
  // Of the two operands' fragments, the fewer are kept in registers and the others pass by.
  __device__ void multiply_k16(Accumulators& acc, uint32_t A, uint32_t B, int kk, int k16) const {
    const AOffsets A_at(at_.lane, at_.warp_m);
    const BOffsets B_at(at_.lane, at_.warp_n);
    if constexpr (4 * kTilesM <= 2 * kTilesN) {
      AFragment a[kTilesM];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) load_A(a[i], A, A_at, i, kk, k16);
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        BFragment b[2];
        load_B(b, B, B_at, j, kk, k16);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) multiply(acc[i], a[i], b, j);
      }
    } else {
      BFragment b[(kTilesN + 1) / 2][2];
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) load_B(b[j / 2], B, B_at, j, kk, k16);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        AFragment a;
        load_A(a, A, A_at, i, kk, k16);
#pragma unroll
        for (int j = 0; j < kTilesN; j += 2) multiply(acc[i], a, b[j / 2], j);
      }
    }
  }

 private:
  // The n8 tiles j and j + 1, where the second one exists.
  __device__ static void multiply(float (&acc)[kTilesN][4], const AFragment& a,
                                  const BFragment (&b)[2], int j) {
#pragma unroll
    for (int q = 0; q < 2 && j + q < kTilesN; ++q) {
      if constexpr (kSplits) {
        float sum[4] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mma_m16n8k8_tf32(sum, a.lo(4 * n), b[q].hi(2 * n));
          mma_m16n8k8_tf32(sum, a.hi(4 * n), b[q].lo(2 * n));
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_m16n8k8_tf32(sum, a.hi(4 * n), b[q].hi(2 * n));
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j + q][i] += sum[i];
      } else {
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_m16n8k8_tf32(acc[j + q], a.hi(4 * n), b[q].hi(2 * n));
      }
    }
  }

  // Words of keep_masks are those of mma.m16n8k16: word w has row w % 2 · 8 + lane / 4 and, in its
  // halves, two neighbours in k16's half w / 2. Those are slots t and t + 4 of its m16n8k8.
  __device__ static float kept(float x, uint32_t keep, int half) {
    return (keep >> 16 * half & 1) != 0 ? x : 0.0f;
  }

  __device__ void load_A(AFragment& a, uint32_t tile, const AOffsets& at, int i, int kk,
                         int k16) const {
    float v[8];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int k = 16 * kk + 8 * n;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int m = 16 * i + 8 * r;
        if constexpr (kAByK) {
          v[4 * n + r] = ld_shared(tile + at(k, 0, m));
          v[4 * n + r + 2] = ld_shared(tile + at(k, 1, m));
        } else {
          const float2 pair = ld_shared_2(tile + at(m, k));
          v[4 * n + r] = pair.x;
          v[4 * n + r + 2] = pair.y;
        }
      }
    }
    if constexpr (kDropout && kLayout == Layout::kNT) {
      uint32_t keep[4];
      keep_masks(keep, at_.seed, at_.problem.drop_threshold, (at_.m0 + at_.warp_m) / 16 + i, k16);
#pragma unroll
      for (int r = 0; r < 8; ++r) v[r] = kept(v[r], keep[r / 4 * 2 + r % 2], r / 2 % 2);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) a.set(r, v[r]);
  }

  // The n8 tiles j and j + 1, where the second one exists.
  __device__ void load_B(BFragment (&b)[2], uint32_t tile, const BOffsets& at, int j, int kk,
                         int k16) const {
    float v[2][4];
#pragma unroll
    for (int q = 0; q < 2 && j + q < kTilesN; ++q) {
      const int column = 8 * (j + q);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int k = 16 * kk + 8 * n;
        if constexpr (kBByK) {
          v[q][2 * n] = ld_shared(tile + at(k, 0, column));
          v[q][2 * n + 1] = ld_shared(tile + at(k, 1, column));
        } else {
          const float2 pair = ld_shared_2(tile + at(column, k));
          v[q][2 * n] = pair.x;
          v[q][2 * n + 1] = pair.y;
        }
      }
    }
    if constexpr (kDropout && kLayout == Layout::kTN) {
      // Tokens are along k here: an A fragment's masks, each transposed.
      static_assert(kTilesN % 2 == 0, "a mask is of two n8 tiles");
      uint32_t keep[4];
      keep_masks(keep, at_.seed, at_.problem.drop_threshold, k16,
                 (at_.n0 + at_.warp_n + 8 * j) / 16);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t transposed = movmatrix_trans(keep[w]);
        float* pair = &v[w / 2][2 * (w % 2)];
        pair[0] = kept(pair[0], transposed, 0);
        pair[1] = kept(pair[1], transposed, 1);
      }
    }
#pragma unroll
    for (int q = 0; q < 2 && j + q < kTilesN; ++q) {
#pragma unroll
      for (int r = 0; r < 4; ++r) b[q].set(r, v[q][r]);
    }
  }

  const WarpPlace at_;
};

}  // namespace rasa::cuda
