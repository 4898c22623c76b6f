// Runs one tile of a problem: the operands' rows, their packed forms, the dropout draws, the
// epilogue.
//
// In every form one operand is small, the ranks: it is packed once per call into the layout of the
// products. The other is as long as the batch: it streams through in tiles, in place where the
// micro-kernel can read it and converted tile by tile in cache where it cannot (dropout, another
// dtype, rows in pairs).
#pragma once

#include "../host_device.h"
#include "micro_kernel.h"

namespace rasa::cpu {

// Tile sizes. A row tile's x (64 × 256), s and accumulators stay in the L2 cache; 96 columns × R
// ranks of a wgrad tile keep the accumulators of one micro-kernel call in registers.
constexpr int64_t kTileRows = 64;
constexpr int64_t kTileDepth = 256;
// The longest chain of fp32 additions over features in the library's micro-kernels: a sum of short
// chains rounds less than one long chain would. 64 costs 1 % of the shrink's time.
constexpr int64_t kChainLength = 64;
constexpr int64_t kTileColumns = 512;
constexpr int64_t kWgradRows = 256;
constexpr int64_t kWgradColumns = 96;
constexpr int64_t kWgradDepth = 128;

// What a row without memory reads as, in any type.
alignas(64) inline constexpr char kZeroRow[8 * kTileDepth] = {};

// The small operand of one segment, packed: B (K,N) in NT and NN; in TN A (K,M) with its rows in
// pairs for bf16_gemm.h, else op(A) in blocks (M, kWgradDepth), one after the other, less deep only
// where K is shorter: a row stride of K would make new micro-kernels for every number of tokens,
// and the library keeps them all.
struct Packed {
  char* data;
  int64_t ld;
};

// One thread's buffers.
struct Scratch {
  char* operand;      // the converted tile of the streamed operand
  char* acc;          // accumulators of the tile
  char* segment_acc;  // accumulators of one segment, where segments have their own scale_m
  uint16_t* draws;    // of dropout: 16 rows of a tile, or all of a rounded tile
};

class TileRunner {
 public:
  explicit TileRunner(const Program& program);

  DType compute() const { return compute_; }

  // The caller provides the memory of scratch and packed operands.
  static int64_t scratch_bytes();
  static Scratch scratch_at(char* memory);

  int64_t packed_bytes(Layout layout, const Problem& p, const Segment& s) const;
  int64_t packed_ld(Layout layout, const Problem& p, const Segment& s) const;
  // A packing job is 16 rows of the operand as stored; jobs are independent.
  int64_t num_pack_jobs(Layout layout, const Problem& p, const Segment& s) const;
  void pack(Layout layout, const Problem& p, const Segment& s, Packed packed, int64_t job) const;

  // Rows [m0, m0 + kTileRows) of an NT or NN problem. packed: one per segment of the problem.
  void row_tile(Layout layout, const Problem& p, const Packed* packed, int64_t m0,
                const Scratch& scratch) const;

  // Tile (m0, n0) of a TN problem.
  void wgrad_tile(const Problem& p, const Packed* packed, int64_t m0, int64_t n0,
                  const Scratch& scratch) const;

  // Elements [n0, n0 + kWgradColumns) of a diagonal.
  void diagonal_tile(const Problem& p, int64_t n0) const;

  double load_scale(const void* scale, int64_t i) const;
  void store_scale(void* scale, int64_t i, double value) const;

 private:
  int64_t compute_size() const { return element_size(compute_); }
  int64_t acc_size() const { return element_size(acc_); }
  char* row(const Matrix& matrix, int64_t i) const;
  // Whether some B of an NT problem has a row n; if not, C's column n is padding.
  bool has_rank(const Problem& p, int64_t n) const;
  // Exact zeros where there is padding, also where A holds an infinity.
  void clear_padding(const Problem& p, int64_t n0, int64_t cols, int64_t rows, char* acc,
                     int64_t ld_acc) const;
  const TileOps& ops(DType storage) const;
  static uint64_t seed(const Segment& s) { return static_cast<uint64_t>(*s.seed); }

  struct Tile {
    const char* data;
    int64_t ld;
  };
  Tile stream_rows(const Problem& p, const Segment& s, bool dropout, int64_t m0, int64_t rows,
                   int64_t k0, int64_t depth, const Scratch& scratch) const;
  Tile stream_columns(const Problem& p, const Segment& s, int64_t k0, int64_t depth, int64_t n0,
                      int64_t cols, const Scratch& scratch) const;
  // acc (rows, cols) = Σ segments, scale_m applied where there is more than one; multiply(i,
  // segment, out, add).
  template <class Multiply>
  void sum_segments(const Problem& p, int64_t rows, int64_t cols, int64_t m0, char* acc,
                    int64_t ld_acc, bool add, const Scratch& scratch, Multiply multiply) const;
  double row_scale(const Problem& p, int64_t m) const;
  // acc (rows, cols) = a (rows, depth) · b (depth, cols) (+ acc) of a row tile; b is packed.
  void multiply_rows(int64_t rows, int64_t cols, int64_t depth, Tile a, Packed b, char* acc,
                     int64_t ld_acc, bool add) const;
  // Whether an NN problem's products can be rounded into C as they are summed.
  bool rounds_at_once(Layout layout, const Problem& p) const;
  void rounded_tile(const Problem& p, Packed b, int64_t m0, const Scratch& scratch) const;
  // C itself can be the accumulator: same type, and nothing is left to do to the sum.
  bool accumulates_in_place(const Problem& p, bool dropout) const;

  const Program& program_;
  DType compute_, acc_;
  bool pairs_;
  const Bf16Gemm* own_;  // nullptr: tile_gemm multiplies
  int64_t vector_;       // columns of a whole vector of tile_gemm
  const TileOpsTable& table_;
};

}  // namespace rasa::cpu
