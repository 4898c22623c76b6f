#include "tile_runner.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "../philox.h"

namespace rasa::cpu {
namespace {

constexpr int64_t kAccElements = std::max(kTileRows * kTileColumns, kWgradRows* kWgradColumns);
constexpr int64_t kOperandElements = std::max(kTileRows * kTileDepth, kWgradDepth* kWgradColumns);
constexpr int64_t kDrawsPerStrip = kDropoutBlock * std::max(kTileDepth, kTileColumns);
// Columns of a rounded tile: its B of some 40 ranks and its draws stay in the L1 cache.
constexpr int64_t kRoundedColumns = 96;
static_assert(kTileRows * kRoundedColumns <= kDrawsPerStrip && kTileRows % kDropoutBlock == 0);
static_assert(kTileDepth % kDropoutBlock == 0 && kTileColumns % kDropoutBlock == 0 &&
                  kWgradColumns % kDropoutBlock == 0 && kTileRows % kDropoutBlock == 0 &&
                  kWgradDepth % kDropoutBlock == 0,
              "tiles start at the corner of a dropout block");

// scale_k is folded into the packed operand, where d·Bt may be far smaller than either: float16,
// alone among the types, has too few exponents for that.
DType product_dtype(const Program& program) {
  const bool scaled = std::any_of(program.segments.begin(), program.segments.end(),
                                  [](const Segment& s) { return s.scale_k != nullptr; });
  return program.dtype == DType::kF16 && scaled ? DType::kF32 : compute_dtype(program.dtype);
}

// A row stride of whole pages puts the same columns of all rows into the same few cache sets.
constexpr int64_t kPageBytes = 4096;

constexpr int64_t kRowsAhead = 8;

}  // namespace

TileRunner::TileRunner(const Program& program)
    : program_(program),
      compute_(product_dtype(program)),
      acc_(acc_dtype(compute_)),
      pairs_(pairs_rows_of_B(compute_)),
      own_(compute_ == DType::kBF16 ? own_bf16_gemm() : nullptr),
      vector_(vector_columns(compute_)),
      table_(tile_ops()) {}

int64_t TileRunner::scratch_bytes() {
  return 8 * (kOperandElements + 2 * kAccElements) +
         static_cast<int64_t>(sizeof(uint16_t)) * kDrawsPerStrip;
}

Scratch TileRunner::scratch_at(char* memory) {
  char* acc = memory + 8 * kOperandElements;
  char* segment_acc = acc + 8 * kAccElements;
  return {memory, acc, segment_acc, reinterpret_cast<uint16_t*>(segment_acc + 8 * kAccElements)};
}

const TileOps& TileRunner::ops(DType storage) const { return *table_.find(storage, compute_); }

char* TileRunner::row(const Matrix& matrix, int64_t i) const {
  for (int32_t b = 0; b < matrix.num_blocks; ++b) {
    const Block& block = program_.blocks[matrix.first_block + b];
    if (i < block.rows) {
      return block.ptr ? static_cast<char*>(block.ptr) + i * block.ld * element_size(matrix.dtype)
                       : nullptr;
    }
    i -= block.rows;
  }
  return nullptr;
}

bool TileRunner::has_rank(const Problem& p, int64_t n) const {
  for (int32_t i = 0; i < p.num_segments; ++i) {
    if (row(program_.segments[p.first_segment + i].B, n)) return true;
  }
  return false;
}

double TileRunner::load_scale(const void* scale, int64_t i) const {
  switch (program_.scale_dtype) {
    case DType::kF64:
      return static_cast<const double*>(scale)[i];
    case DType::kF32:
      return static_cast<const float*>(scale)[i];
    case DType::kBF16:
      return static_cast<const c10::BFloat16*>(scale)[i];
    default:
      return static_cast<const c10::Half*>(scale)[i];
  }
}

void TileRunner::store_scale(void* scale, int64_t i, double value) const {
  const float v = static_cast<float>(value);
  switch (program_.scale_dtype) {
    case DType::kF64:
      static_cast<double*>(scale)[i] = value;
      break;
    case DType::kF32:
      static_cast<float*>(scale)[i] = v;
      break;
    case DType::kBF16:
      static_cast<c10::BFloat16*>(scale)[i] = v;
      break;
    default:
      static_cast<c10::Half*>(scale)[i] = v;
      break;
  }
}

template <class Multiply>
void TileRunner::sum_segments(const Problem& p, int64_t rows, int64_t cols, int64_t m0, char* acc,
                              int64_t ld_acc, bool add, const Scratch& scratch,
                              Multiply multiply) const {
  for (int32_t i = 0; i < p.num_segments; ++i) {
    const Segment& s = program_.segments[p.first_segment + i];
    if (s.K == 0) continue;
    if (s.scale_m && p.num_segments > 1) {
      multiply(i, s, scratch.segment_acc, false);
      for (int64_t r = 0; r < rows; ++r) {
        char* total = acc + r * ld_acc * acc_size();
        if (!add) std::memset(total, 0, cols * acc_size());
        table_.add_scaled_row(acc_, scratch.segment_acc + r * ld_acc * acc_size(),
                              load_scale(s.scale_m, m0 + r), total, cols);
      }
    } else {
      multiply(i, s, acc, add);
    }
    add = true;
  }
  if (!add) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(acc + r * ld_acc * acc_size(), 0, cols * acc_size());
    }
  }
}

double TileRunner::row_scale(const Problem& p, int64_t m) const {
  const void* scale_m = p.num_segments == 1 ? program_.segments[p.first_segment].scale_m : nullptr;
  return scale_m ? load_scale(scale_m, m) : 1.0;
}

bool TileRunner::accumulates_in_place(const Problem& p, bool dropout) const {
  if (p.C.dtype != acc_ || p.C.num_blocks != 1 || p.C_in.num_blocks > 1 || dropout) return false;
  for (int32_t i = 0; i < p.num_segments; ++i) {
    if (program_.segments[p.first_segment + i].scale_m) return false;
  }
  return true;
}

void TileRunner::clear_padding(const Problem& p, int64_t n0, int64_t cols, int64_t rows, char* acc,
                               int64_t ld_acc) const {
  for (int64_t n = 0; n < cols;) {
    int64_t end = n;
    while (end < cols && !has_rank(p, n0 + end)) ++end;
    for (int64_t r = 0; end > n && r < rows; ++r) {
      std::memset(acc + (r * ld_acc + n) * acc_size(), 0, (end - n) * acc_size());
    }
    n = end + 1;
  }
}

TileRunner::Tile TileRunner::stream_rows(const Problem& p, const Segment& s, bool dropout,
                                         int64_t m0, int64_t rows, int64_t k0, int64_t depth,
                                         const Scratch& scratch) const {
  const int64_t size = element_size(s.A.dtype);
  if (s.A.dtype == compute_ && s.A.num_blocks == 1 && !dropout && !(pairs_ && depth % 2)) {
    return {row(s.A, m0) + k0 * size, program_.blocks[s.A.first_block].ld};
  }
  for (int64_t r = 0; r < rows; ++r) {
    RowMask mask;
    if (dropout) {
      if (r % kDropoutBlock == 0) {
        table_.draw_strip(seed(s), (m0 + r) / kDropoutBlock, k0 / kDropoutBlock,
                          ceil_div(depth, kDropoutBlock), scratch.draws, kTileDepth);
      }
      mask = {scratch.draws + r % kDropoutBlock * kTileDepth, p.drop_threshold};
    }
    char* dst = scratch.operand + r * kTileDepth * compute_size();
    const char* data = row(s.A, m0 + r);
    ops(s.A.dtype).convert_row(data ? data + k0 * size : kZeroRow, 1.0, mask, dst, depth);
    if (pairs_ && depth % 2) std::memset(dst + depth * compute_size(), 0, compute_size());
  }
  return {scratch.operand, kTileDepth};
}

void TileRunner::multiply_rows(int64_t rows, int64_t cols, int64_t depth, Tile a, Packed b,
                               char* acc, int64_t ld_acc, bool add) const {
  const int64_t pair = pairs_ ? 2 : 1;
  if (own_) {
    own_->sum(rows, cols, round_up(depth, pair), {a.data, 2 * a.ld, 4}, {b.data, b.ld},
              {reinterpret_cast<float*>(acc), ld_acc, add});
    return;
  }
  for (int64_t k = 0; k < depth; k += kChainLength) {
    const int64_t chain = round_up(std::min<int64_t>(kChainLength, depth - k), pair);
    for (int64_t m = 0; m < rows;) {
      const int64_t piece = largest_piece(rows - m, kTileRows);
      tile_gemm(compute_, piece, cols, chain, a.data + (m * a.ld + k) * compute_size(), a.ld,
                b.data + k * b.ld * compute_size(), b.ld, acc + m * ld_acc * acc_size(), ld_acc,
                add || k > 0);
      m += piece;
    }
  }
}

bool TileRunner::rounds_at_once(Layout layout, const Problem& p) const {
  const auto is_whole = [&](const Matrix& matrix) {
    const Block& block = program_.blocks[matrix.first_block];
    return matrix.num_blocks == 1 && matrix.dtype == DType::kBF16 && block.ptr && block.rows >= p.M;
  };
  if (!own_ || layout != Layout::kNN || p.num_segments != 1 || !is_whole(p.C)) return false;
  const Segment& s = program_.segments[p.first_segment];
  return s.K <= kTileDepth && !s.scale_m && (p.C_in.num_blocks == 0 || is_whole(p.C_in));
}

void TileRunner::rounded_tile(const Problem& p, Packed b, int64_t m0,
                              const Scratch& scratch) const {
  const int64_t rows = std::min<int64_t>(kTileRows, p.M - m0);
  const Segment& s = program_.segments[p.first_segment];
  const bool dropout = p.drop_threshold > 0;
  const Tile a = stream_rows(p, s, false, m0, rows, 0, s.K, scratch);
  for (int64_t n0 = 0; n0 < p.N; n0 += kRoundedColumns) {
    const int64_t cols = std::min<int64_t>(kRoundedColumns, p.N - n0);
    for (int64_t r = 0; dropout && r < rows; r += kDropoutBlock) {
      table_.draw_strip(seed(s), (m0 + r) / kDropoutBlock, n0 / kDropoutBlock,
                        ceil_div(cols, kDropoutBlock), scratch.draws + r * kRoundedColumns,
                        kRoundedColumns);
    }
    RoundedOut out = {};
    out.C = row(p.C, m0) + 2 * n0;
    out.ld = program_.blocks[p.C.first_block].ld;
    if (p.C_in.num_blocks > 0) {
      out.c_in = row(p.C_in, m0) + 2 * n0;
      out.ld_in = program_.blocks[p.C_in.first_block].ld;
    }
    out.scale = static_cast<float>(keep_scale(p.drop_threshold));
    out.draws = dropout ? scratch.draws : nullptr;
    out.ld_draws = kRoundedColumns;
    out.drop_threshold = p.drop_threshold;
    own_->rounded(rows, cols, round_up(s.K, 2), {a.data, 2 * a.ld, 4}, {b.data + 4 * n0, b.ld},
                  out);
  }
}

void TileRunner::row_tile(Layout layout, const Problem& p, const Packed* packed, int64_t m0,
                          const Scratch& scratch) const {
  if (rounds_at_once(layout, p)) return rounded_tile(p, packed[0], m0, scratch);
  const int64_t rows = std::min<int64_t>(kTileRows, p.M - m0);
  const int64_t pair = pairs_ ? 2 : 1;
  const bool has_dropout = p.drop_threshold > 0;
  const bool drops_input = has_dropout && layout == Layout::kNT;
  const bool drops_product = has_dropout && layout == Layout::kNN;
  // Not with C_in in NT, whose padding columns are cleared below.
  const bool adds_in_NT = layout == Layout::kNT && p.C_in.num_blocks > 0;
  // Packed B ends in zeros, which fill the last vector of a tile beside C.
  const int64_t vector = layout == Layout::kNT ? vector_ : 1;
  const bool in_place = accumulates_in_place(p, has_dropout) && !adds_in_NT && p.N % vector == 0;
  const TileOps& c_ops = ops(p.C.dtype);
  const int64_t c_size = element_size(p.C.dtype);

  for (int64_t n0 = 0; n0 < p.N; n0 += kTileColumns) {
    const int64_t cols = std::min<int64_t>(kTileColumns, p.N - n0);
    char* acc = in_place ? row(p.C, m0) + n0 * c_size : scratch.acc;
    const int64_t ld_acc = in_place ? program_.blocks[p.C.first_block].ld : round_up(cols, 16);
    const bool add = in_place && p.C_in.num_blocks > 0;
    if (add && row(p.C_in, m0) != row(p.C, m0)) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(row(p.C, m0 + r) + n0 * c_size, row(p.C_in, m0 + r) + n0 * c_size,
                    cols * c_size);
      }
    }
    const auto multiply = [&](int32_t i, const Segment& s, char* out, bool add_out) {
      for (int64_t k0 = 0; k0 < s.K; k0 += kTileDepth) {
        const int64_t depth = std::min<int64_t>(kTileDepth, s.K - k0);
        const Tile a = stream_rows(p, s, drops_input, m0, rows, k0, depth, scratch);
        char* b = packed[i].data + (k0 * packed[i].ld + n0 * pair) * compute_size();
        multiply_rows(rows, round_up(cols, vector), depth, a, {b, packed[i].ld}, out, ld_acc,
                      add_out || k0 > 0);
      }
    };
    sum_segments(p, rows, cols, m0, acc, ld_acc, add, scratch, multiply);
    if (layout == Layout::kNT) clear_padding(p, n0, cols, rows, acc, ld_acc);
    if (in_place) continue;

    const double keep = keep_scale(p.drop_threshold);
    for (int64_t r = 0; r < rows; ++r) {
      RowMask mask;
      if (drops_product) {
        if (r % kDropoutBlock == 0) {
          table_.draw_strip(seed(program_.segments[p.first_segment]), (m0 + r) / kDropoutBlock,
                            n0 / kDropoutBlock, ceil_div(cols, kDropoutBlock), scratch.draws,
                            kTileColumns);
        }
        mask = {scratch.draws + r % kDropoutBlock * kTileColumns, p.drop_threshold};
      }
      char* out = row(p.C, m0 + r);
      if (!out) continue;
      const char* c_in = row(p.C_in, m0 + r);
      c_ops.finish_row(acc + r * ld_acc * acc_size(), keep * row_scale(p, m0 + r), mask,
                       c_in ? c_in + n0 * c_size : nullptr, out + n0 * c_size, cols);
    }
  }
}

TileRunner::Tile TileRunner::stream_columns(const Problem& p, const Segment& s, int64_t k0,
                                            int64_t depth, int64_t n0, int64_t cols,
                                            const Scratch& scratch) const {
  const int64_t size = element_size(s.B.dtype);
  const bool dropout = p.drop_threshold > 0;
  const int64_t ld = program_.blocks[s.B.first_block].ld;
  if (s.B.dtype == compute_ && !pairs_ && !dropout && !s.scale_k && s.B.num_blocks == 1 &&
      ld * size % kPageBytes != 0) {
    return {row(s.B, k0) + n0 * size, ld};
  }
  const int64_t pair = pairs_ ? 2 : 1;
  for (int64_t k = 0; k < round_up(depth, 16); k += pair) {
    if (dropout && k % kDropoutBlock == 0) {
      table_.draw_strip(seed(s), (k0 + k) / kDropoutBlock, n0 / kDropoutBlock,
                        ceil_div(cols, kDropoutBlock), scratch.draws, kWgradColumns);
    }
    const void* src[2] = {nullptr, nullptr};
    double scale[2] = {1, 1};
    RowMask mask[2];
    for (int64_t h = 0; h < pair; ++h) {
      if (const char* ahead = row(s.B, k0 + k + h + kRowsAhead)) {
        for (int64_t n = 0; n < cols * size; n += 64) __builtin_prefetch(ahead + n0 * size + n);
      }
      const char* data = k + h < depth ? row(s.B, k0 + k + h) : nullptr;
      if (!data) continue;
      src[h] = data + n0 * size;
      if (s.scale_k) scale[h] = load_scale(s.scale_k, k0 + k + h);
      if (dropout) {
        mask[h] = {scratch.draws + (k + h) % kDropoutBlock * kWgradColumns, p.drop_threshold};
      }
    }
    char* dst = scratch.operand + k * kWgradColumns * compute_size();
    if (pairs_) {
      ops(s.B.dtype).interleave_rows(src, scale, mask, dst, cols);
    } else if (src[0]) {
      ops(s.B.dtype).convert_row(src[0], scale[0], mask[0], dst, cols);
    } else {
      std::memset(dst, 0, cols * compute_size());
    }
  }
  return {scratch.operand, kWgradColumns};
}

void TileRunner::wgrad_tile(const Problem& p, const Packed* packed, int64_t m0, int64_t n0,
                            const Scratch& scratch) const {
  const int64_t rows = std::min<int64_t>(kWgradRows, p.M - m0);
  const int64_t cols = std::min<int64_t>(kWgradColumns, p.N - n0);
  const auto multiply = [&](int32_t i, const Segment& s, char* out, bool add) {
    for (int64_t k0 = 0; k0 < s.K; k0 += kWgradDepth) {
      const int64_t depth = std::min<int64_t>(kWgradDepth, s.K - k0);
      const Tile b = stream_columns(p, s, k0, depth, n0, cols, scratch);
      const int64_t ld = packed[i].ld;
      if (own_) {
        own_->sum(rows, cols, round_up(depth, 2),
                  {packed[i].data + 2 * k0 * ld + 4 * m0, 4, 4 * ld}, {b.data, b.ld},
                  {reinterpret_cast<float*>(out), kWgradColumns, add || k0 > 0});
        continue;
      }
      const char* a = packed[i].data + (k0 / kWgradDepth * p.M + m0) * ld * compute_size();
      // A converted tile is zero up to a multiple of 16 tokens, as packed A is; one read in place
      // ends where it ends.
      const bool converted = b.data == scratch.operand;
      const int64_t whole = converted ? round_up(depth, 16) : depth;
      for (int64_t k = 0; k < whole;) {
        const int64_t piece = converted ? whole : largest_piece(whole - k, kWgradDepth);
        tile_gemm(compute_, rows, cols, piece, a + k * compute_size(), ld,
                  b.data + k * b.ld * compute_size(), b.ld, out, kWgradColumns, add || k0 + k > 0);
        k += piece;
      }
    }
  };
  sum_segments(p, rows, cols, m0, scratch.acc, kWgradColumns, false, scratch, multiply);

  const double keep = keep_scale(p.drop_threshold);
  for (int64_t r = 0; r < rows; ++r) {
    const char* acc = scratch.acc + r * kWgradColumns * acc_size();
    char* out = row(p.C, m0 + r);
    if (!out) continue;
    const int64_t size = element_size(p.C.dtype);
    const char* c_in = row(p.C_in, m0 + r);
    ops(p.C.dtype).finish_row(acc, keep * row_scale(p, m0 + r), {},
                              c_in ? c_in + n0 * size : nullptr, out + n0 * size, cols);
  }
}

void TileRunner::diagonal_tile(const Problem& p, int64_t n0) const {
  const Segment& s = program_.segments[p.first_segment];
  const int64_t cols = std::min<int64_t>(kWgradColumns, p.M - n0);
  const int64_t offset = n0 * element_size(s.A.dtype);
  double sums[kWgradColumns] = {};
  for (int64_t k = 0; k < s.K; ++k) {
    const char *a = row(s.A, k), *b = row(s.B, k);
    if (a && b) ops(s.A.dtype).add_products(a + offset, b + offset, sums, cols);
  }
  char* out = row(p.C, 0);
  for (int64_t i = 0; i < cols; ++i) store_scale(out, n0 + i, sums[i]);
}

}  // namespace rasa::cpu
