// The grouped GEMM: gemm_problem.h gives the formula of one problem.
//
//            N                        A block computes tiles of kBlockM × kBlockN, one after the
//      ┌────────┬────────┐            other, of all problems of the launch (a persistent grid), by
//      │ warp 0 │ warp 1 │ kWarpM     the loop below or, where B stays, that of column_walk.cuh.
//    M ├────────┼────────┤            Shared memory:
//      │ warp 2 │ warp 3 │              stages × (A tile, B tile), as stored globally and swizzled
//      └────────┴────────┘              (smem_layout.h, or smem_layout_f32.h); over them, in the
//        kWarpN                         epilogue, the staging rows of each warp in fp32
//                                       tables of row addresses: A, B, C, C_in
//
// The three forms differ in which axis of an operand is along its rows:
//   NT   A (M,K)   B (N,K)     NN   A (M,K)   B (K,N)     TN   A (K,M)   B (K,N)
// Rows along M or N have one table per segment, rows along k one per k block, written a turn ahead.
//
// A long reduction is split into ranges of k blocks: each is a tile of its own, whose sums go to
// the workspace as they are. reduce_kernel.cuh adds them. Of a diagonal, only tiles whose corners
// are on it are computed.
//
// Invariant at the top of the k loop: the copies of k blocks k … k + kStages - 2 are committed, one
// group each, and no warp reads stage (k - 1) % kStages after the barrier.
//
// Preconditions: every problem of the launch has the layout of kId; blocks of a matrix that
// is_aligned are 16-byte aligned in base and row stride; dropout only where kDropout.
#pragma once

#include <type_traits>

#include "chunk_store.cuh"
#include "column_walk.cuh"
#include "dropout.cuh"
#include "epilogue.cuh"
#include "gemm_config.h"
#include "operand_tile.cuh"
#include "split.h"
#include "tile_order.h"
#include "warp_product.cuh"
#include "warp_product_f32.cuh"

namespace rasa::cuda {

template <ConfigId kId, class Element, bool kDropout>
class GemmTile {
  static constexpr TileConfig kTile = tile_config(kId);
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kBlockK = kTile.block_k;
  static constexpr int kWarpM = kTile.warp_m(), kWarpN = kTile.warp_n();
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kThreads = kTile.threads(), kStages = kTile.stages;
  static constexpr bool kAByK = kTile.A_rows_are_k(), kBByK = kTile.B_rows_are_k();
  static constexpr Layout kLayout = kTile.layout;
  static constexpr bool kUnrolls = keeps_addresses(kId);
  // The widest wgrad's dropout has no registers for masks of two k16 blocks at once.
  static constexpr int kUnrolledK = kId == ConfigId::kWgrad160Drop ? 1 : kBlockK / 16;
  static constexpr bool kSplits = can_split(kLayout);
  // B is the smaller operand, but fp16 has no room for the product of two small factors, and Bt
  // starts from zero.
  static constexpr bool kScalesA = std::is_same_v<Element, __half>;
  using ATile = typename TileShape<kId>::ATile;
  using BTile = typename TileShape<kId>::BTile;
  using Product = WarpProduct<kId, Element, kDropout>;
  static_assert(config_is_sound(kId), "a config must fit the shared memory it is chosen for");
  static_assert(sizeof(Element) == kTile.element_bytes, "a config is of elements of one size");

 public:
  static constexpr bool kWalks = kTile.walks;
  using Accumulators = typename TileShape<kId>::Accumulators;

  __device__ GemmTile(const KernelArgs& args, char* smem, int tile)
      : args_(args),
        smem_(smem),
        problem_(args.problem(args.problem_of(tile))),
        lane_(threadIdx.x % 32),
        warp_m_(kTile.warps_m == 1 ? 0 : threadIdx.x / 32 / kTile.warps_n * kWarpM),
        warp_n_(threadIdx.x / 32 % kTile.warps_n * kWarpN) {
    const int block_m = is_diagonal() ? kTile.diagonal_block() : kBlockM;
    const int tiles_m = ceil_div(problem_.M, block_m);
    const int tiles_n = is_diagonal() ? 1 : ceil_div(problem_.N, kBlockN);
    const int in_problem = tile - args.tile_start(args.problem_of(tile));
    const TilePlace place = tile_place(kLayout, in_problem, tiles_m, tiles_n);
    split_ = place.split;
    m0_ = place.coord.m * block_m;
    n0_ = is_diagonal() ? m0_ : place.coord.n * kBlockN;
  }

  __device__ void run() {
    Accumulators acc = {};
    int first_k = 0;  // k blocks of the segments before
    for (int s = 0; s < problem_.num_segments; ++s) {
      const SegmentArg& segment = args_.segment(problem_.first_segment + s);
      const int num_k = ceil_div(segment.K, kBlockK);
      const KRange k =
          kSplits ? split_range(split_, problem_.k_per_split, first_k, num_k) : KRange{0, num_k};
      first_k += num_k;
      if (k.begin >= k.end) continue;
      if constexpr (kTile.scales_segments) {
        Accumulators sum = {};
        add_segment(sum, segment, k);
        add_scaled(acc, sum, segment.scale_m);
      } else {
        // Segments share the accumulators: they are summed in registers, never in memory.
        add_segment(acc, segment, k);
      }
    }
    __syncthreads();  // every warp has read the last stage, and the last tile's rows of C
    write_C_rows();
    __syncthreads();  // the tables are written
    store(acc, smem_);
  }

  // The steps of a tile in a walk; its problem has one segment, of one k block.
  static constexpr int kSlots = kStages;
  __device__ bool is_first_of_column() const { return m0_ == 0; }
  __device__ void write_A_rows() const {
    if constexpr (kAByK) {
      write_rows(A_rows(0), kBlockK, args_, only_segment().A, 0, only_segment().K);
    } else {
      write_rows(A_rows(0), kBlockM, args_, only_segment().A, m0_, problem_.M);
    }
  }
  __device__ void write_B_rows() const {
    write_rows(B_rows(0), kBlockK, args_, only_segment().B, 0, only_segment().K);
  }
  __device__ void load_A(int slot) const { load_A(only_segment(), 0, A_stage(slot)); }
  __device__ void load_panel() const { load_B(only_segment(), 0, panel()); }
  // After this thread's copies of it have landed.
  __device__ void scale_A(int slot) const {
    scale_tile<ATile, kThreads, Element>(A_stage(slot), A_columns(only_segment(), 0),
                                         only_segment().A);
  }
  __device__ void scale_panel() const {
    scale_tile<BTile, kThreads, Element>(panel(), B_columns(only_segment(), 0), only_segment().B);
  }
  __device__ void write_C_rows() const {
    if (!kWalks && problem_.partials_at >= 0) {
      write_partial_rows(C_rows(), kBlockM, args_, problem_, m0_, split_);
    } else {
      write_rows(C_rows(), kBlockM, args_, problem_.C, m0_, problem_.M);
      write_rows(C_rows() + kBlockM, kBlockM, args_, problem_.C_in, m0_, problem_.M);
    }
  }
  __device__ void multiply_panel(Accumulators& acc, int slot) {
    if constexpr (kDropout) read_seed(only_segment());
    const int K = only_segment().K;
#pragma unroll
    for (int kk = 0; kk < kBlockK / 16; ++kk) {
      if (16 * kk >= K) break;
      Product(place()).multiply_k16(acc, smem_address(A_stage(slot)), smem_address(panel()), kk,
                                    kk);
    }
  }
  // C_in in registers, if C and C_in are stored by chunks.
  using Chunks = ChunkStore<kWarpN, kTile.staging_n(), kTile.pitch(kTile.staging_n()), Element>;
  using Base = typename Chunks::Base;
  static constexpr bool kLoadsBaseFirst = blocks_per_sm(kId, kDropout) == 1;
  __device__ bool stores_chunks() const {
    return Chunks::is_possible(problem_) && problem_.scale_m == nullptr;
  }
  __device__ void load_base(Base& base) const {
#pragma unroll
    for (int n = 0; n < kWarpN; n += kTile.staging_n()) chunks().load_base(base, warp_m_, n);
  }
  __device__ void store_chunks(Accumulators& acc, Base& base, int slot) const {
    constexpr int kStagingN = kTile.staging_n(), kPitch = kTile.pitch(kStagingN);
    float* rows16 = reinterpret_cast<float*>(A_stage(slot)) + threadIdx.x / 32 * 16 * kPitch;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      if constexpr (kDropout && kLayout == Layout::kNN) drop_sums(acc[i], i);
#pragma unroll
      for (int n = 0; n < kWarpN; n += kStagingN) {
        Chunks::stage(rows16, acc[i] + n / kChunk);
        __syncwarp();  // the warp's rows are staged
        chunks().store(rows16, base, warp_m_ + 16 * i, n);
        if (i + 1 < kTilesM) chunks().load_base(base, warp_m_ + 16 * (i + 1), n);
        __syncwarp();  // they are read, the next ones may be staged
      }
    }
  }
  __device__ void store_rows_of(Accumulators& acc, int slot) const { store(acc, A_stage(slot)); }

 private:
  __device__ bool is_diagonal() const {
    return kLayout == Layout::kTN && !kWalks && problem_.is_diagonal != 0;
  }
  __device__ char* A_stage(int k) const { return smem_ + k % kStages * kTile.stage_bytes(); }
  __device__ char* B_stage(int k) const { return A_stage(k) + ATile::kBytes; }
  __device__ char* panel() const { return smem_ + kStages * kTile.stage_bytes(); }
  __device__ uint64_t* tables() const {
    return reinterpret_cast<uint64_t*>(smem_ + kTile.tiles_bytes());
  }
  __device__ uint64_t* A_rows(int k) const { return tables() + (kAByK ? k % 2 * kBlockK : 0); }
  __device__ uint64_t* B_rows(int k) const {
    return tables() + kTile.A_entries() + (kBByK ? k % 2 * kBlockK : 0);
  }
  __device__ uint64_t* C_rows() const { return tables() + kTile.C_table(); }
  __device__ Chunks chunks() const {
    return {problem_, C_rows(), C_rows() + kBlockM, n0_ + warp_n_};
  }
  __device__ const SegmentArg& only_segment() const {
    return args_.segment(problem_.first_segment);
  }

  __device__ void write_fixed_rows(const SegmentArg& segment) const {
    if constexpr (!kAByK) write_rows(A_rows(0), kBlockM, args_, segment.A, m0_, problem_.M);
    if constexpr (!kBByK) write_rows(B_rows(0), kBlockN, args_, segment.B, n0_, problem_.N);
  }
  __device__ void write_k_rows(const SegmentArg& segment, int k) const {
    const int first = k * kBlockK;
    if constexpr (kAByK) write_rows(A_rows(k), kBlockK, args_, segment.A, first, segment.K);
    if constexpr (kBByK) write_rows(B_rows(k), kBlockK, args_, segment.B, first, segment.K);
  }

  __device__ TileColumns A_columns(const SegmentArg& segment, int k) const {
    const int k0 = k * kBlockK;
    return {kAByK ? m0_ : k0,
            kAByK ? problem_.M : segment.K,
            kScalesA ? segment.scale_k : nullptr,
            k0,
            segment.K,
            kAByK,
            args_.scale_dtype};
  }
  __device__ TileColumns B_columns(const SegmentArg& segment, int k) const {
    const int k0 = k * kBlockK;
    return {kBByK ? n0_ : k0,
            kBByK ? problem_.N : segment.K,
            kScalesA ? nullptr : segment.scale_k,
            k0,
            segment.K,
            kBByK,
            args_.scale_dtype};
  }
  __device__ void load_A(const SegmentArg& segment, int k, char* tile) const {
    load_tile<ATile, kThreads, kUnrolls, kWalks, Element>(tile, A_rows(k), A_columns(segment, k),
                                                          segment.A);
  }
  __device__ void load_B(const SegmentArg& segment, int k, char* tile) const {
    load_tile<BTile, kThreads, kUnrolls, kWalks, Element>(tile, B_rows(k), B_columns(segment, k),
                                                          segment.B);
  }

  __device__ WarpPlace place() const {
    return {problem_, lane_, warp_m_, warp_n_, m0_, n0_, seed_};
  }

  // A problem without dropout, whose threshold keeps all, has no seed.
  __device__ void read_seed(const SegmentArg& segment) {
    seed_ = problem_.drop_threshold > 0 ? static_cast<uint64_t>(*segment.seed) : 0;
  }

  // acc += op(A_s) · scale_k ∘ op(B_s), over the k blocks of `range`.
  __device__ void add_segment(Accumulators& acc, const SegmentArg& segment, const KRange& range) {
    if constexpr (kDropout) read_seed(segment);
    __syncthreads();  // the tables and stages of the segment or tile before are read
    write_fixed_rows(segment);
    // kStages - 1 turns that only load come first: one loop, so the loads' code exists once.
#pragma unroll 1
    for (int k = range.begin + 1 - kStages; k < range.end; ++k) {
      const int next = k + kStages - 1;
      if (next < range.end) write_k_rows(segment, next);
      cp_async_wait<kStages - 2>();  // leaves exactly the newer ones pending: k has landed
      // k and the tables of next are visible to all; k - 1 is read, its stage may be overwritten.
      __syncthreads();
      if (next < range.end) {
        load_A(segment, next, A_stage(next));
        load_B(segment, next, B_stage(next));
      }
      cp_async_commit();
      if (k >= range.begin) compute_stage(acc, k);
    }
    cp_async_wait<0>();
  }

  __device__ void compute_stage(Accumulators& acc, int k) const {
    const uint32_t A = smem_address(A_stage(k)), B = smem_address(B_stage(k));
#pragma unroll(kUnrolledK)
    for (int kk = 0; kk < kBlockK / 16; ++kk) {
      Product(place()).multiply_k16(acc, A, B, kk, k * (kBlockK / 16) + kk);
    }
  }

  // acc += scale_m ∘ sum
  __device__ void add_scaled(Accumulators& acc, const Accumulators& sum,
                             const void* scale_m) const {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = m0_ + warp_m_ + 16 * i + 8 * half + lane_ / 4;
        const bool is_scaled = scale_m != nullptr && m < problem_.M;
        const float scale = is_scaled ? load_scale(scale_m, m, args_.scale_dtype) : 1.0f;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          acc[i][j][2 * half] += scale * sum[i][j][2 * half];
          acc[i][j][2 * half + 1] += scale * sum[i][j][2 * half + 1];
        }
      }
    }
  }

  // staging: kTile.staging_room() bytes that nobody else reads or writes.
  __device__ void store(Accumulators& acc, char* staging) const {
    constexpr int kStagingN = kTile.staging_n(), kPitch = kTile.pitch(kStagingN);
    float* rows16 = reinterpret_cast<float*>(staging) + threadIdx.x / 32 * 16 * kPitch;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      if constexpr (kDropout && kLayout == Layout::kNN) drop_sums(acc[i], i);
#pragma unroll
      for (int n = 0; n < kWarpN; n += kStagingN) {
        stage_rows<kStagingN / 8, kPitch>(rows16, acc[i] + n / 8);
        __syncwarp();  // the warp's rows are staged
        const int row0 = warp_m_ + 16 * i, n0 = n0_ + warp_n_ + n;
        if (is_diagonal()) {
          store_diagonal<kStagingN, kPitch, Element>(rows16, m0_ + row0, n0, split_, problem_,
                                                     args_);
        } else {
          store_rows<kStagingN, kPitch, Element>(rows16, {C_rows(), C_rows() + kBlockM}, row0, m0_,
                                                 n0, problem_, args_.scale_dtype);
        }
        __syncwarp();  // they are read, the next ones may be staged
      }
    }
  }

  __device__ void drop_sums(float (&acc)[kTilesN][4], int i) const {
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t keep[4];
      keep_masks(keep, seed_, problem_.drop_threshold, (m0_ + warp_m_) / 16 + i,
                 (n0_ + warp_n_ + 8 * j) / 16);
#pragma unroll
      for (int q = 0; q < 4; ++q) {  // q: rows + 8 (q % 2), columns + 8 (q / 2)
        float* pair = &acc[j + q / 2][2 * (q % 2)];
        if ((keep[q] & 0xffffu) == 0) pair[0] = 0.0f;
        if ((keep[q] & 0xffff0000u) == 0) pair[1] = 0.0f;
      }
    }
  }

  const KernelArgs& args_;
  char* const smem_;
  const ProblemArg& problem_;
  const int lane_;
  const int warp_m_, warp_n_;  // the warp's corner in the tile
  int m0_, n0_;                // the tile's corner in C
  int split_ = 0;
  uint64_t seed_ = 0;  // of the current segment
};

template <ConfigId kId, class Element, bool kDropout>
__global__ void __launch_bounds__(tile_config(kId).threads(), blocks_per_sm(kId, kDropout))
    grouped_gemm_sm80(const __grid_constant__ ArgsBlock<arg_bytes(kId)> args) {
  extern __shared__ __align__(1024) char smem[];
  using Tile = GemmTile<kId, Element, kDropout>;
  if constexpr (Tile::kWalks) {
    walk_columns<Tile>(args, smem);
  } else {
#pragma unroll 1
    for (int tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
      Tile(args, smem, tile).run();
    }
  }
}

}  // namespace rasa::cuda
