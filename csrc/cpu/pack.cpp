// Packing the small operand, the ranks, into the layout of the micro-kernels.
#include <algorithm>
#include <cstring>

#include "tile_runner.h"

namespace rasa::cpu {

static_assert(kTileDepth <= kMostColumns, "packing transposes tiles of the full depth");

int64_t TileRunner::packed_ld(Layout layout, const Problem& p, const Segment& s) const {
  if (layout != Layout::kTN) return round_up(p.N, 16);
  if (own_) return p.M;
  // Where the reduction is over ranks, blocks of the full depth would be mostly padding.
  return std::min<int64_t>(kWgradDepth, round_up(s.K, 16));
}

int64_t TileRunner::packed_bytes(Layout layout, const Problem& p, const Segment& s) const {
  const bool in_blocks = layout == Layout::kTN && !own_;
  const int64_t rows = in_blocks ? ceil_div(s.K, kWgradDepth) * p.M : round_up(s.K, 2);
  return rows * packed_ld(layout, p, s) * compute_size();
}

int64_t TileRunner::num_pack_jobs(Layout layout, const Problem& p, const Segment& s) const {
  switch (layout) {
    case Layout::kNT:
      return ceil_div(p.N, 16) * ceil_div(s.K, kTileDepth);
    case Layout::kNN:
      return ceil_div(s.K, 16) * ceil_div(p.N, kTileColumns);
    default:
      return ceil_div(s.K, 16);
  }
}

void TileRunner::pack(Layout layout, const Problem& p, const Segment& s, Packed packed,
                      int64_t job) const {
  const int64_t pair = pairs_ ? 2 : 1;
  const Matrix& matrix = layout == Layout::kTN ? s.A : s.B;
  const int64_t size = element_size(matrix.dtype);
  const int64_t num_groups = ceil_div(layout == Layout::kNT ? p.N : s.K, 16);
  const int64_t row0 = job % num_groups * 16;
  const int64_t chunk = job / num_groups;

  if (layout == Layout::kNN || (layout == Layout::kTN && own_)) {
    const int64_t n0 = chunk * kTileColumns;
    const int64_t cols = layout == Layout::kTN ? p.M : std::min<int64_t>(kTileColumns, p.N - n0);
    const void* scale_k = layout == Layout::kTN ? nullptr : s.scale_k;  // TN scales B
    for (int64_t k = row0; k < std::min<int64_t>(row0 + 16, s.K); k += pair) {
      const void* src[2] = {nullptr, nullptr};
      double scale[2] = {1, 1};
      for (int64_t h = 0; h < pair && k + h < s.K; ++h) {
        if (char* data = row(matrix, k + h)) {
          src[h] = data + n0 * size;
          if (scale_k) scale[h] = load_scale(scale_k, k + h);
        }
      }
      char* dst = packed.data + (k * packed.ld + n0 * pair) * compute_size();
      const RowMask none[2] = {};
      if (pairs_) {
        ops(matrix.dtype).interleave_rows(src, scale, none, dst, cols);
      } else if (src[0]) {
        ops(matrix.dtype).convert_row(src[0], scale[0], none[0], dst, cols);
      } else {
        std::memset(dst, 0, cols * compute_size());
      }
    }
    return;
  }

  // NT: B (N,K) becomes (K,N). TN: A (K,M) becomes blocks (M, kWgradDepth).
  const int64_t c0 = layout == Layout::kNT ? chunk * kTileDepth : 0;
  const int64_t cols = layout == Layout::kNT ? std::min<int64_t>(kTileDepth, s.K - c0) : p.M;
  const int64_t rows_wanted = std::min<int64_t>(16, (layout == Layout::kNT ? p.N : s.K) - row0);
  const void* src[16];
  const auto point_at_rows = [&](int64_t c) {
    for (int64_t j = 0; j < rows_wanted; ++j) {
      const char* data = row(matrix, row0 + j);
      src[j] = data ? data + c * size : kZeroRow;
    }
  };
  if (layout == Layout::kTN) {
    const int64_t block = row0 / kWgradDepth * p.M * packed.ld;
    char* dst = packed.data + (block + row0 % kWgradDepth) * compute_size();
    for (int64_t c = 0; c < cols; c += kTileDepth) {
      point_at_rows(c);
      ops(matrix.dtype)
          .transpose(src, rows_wanted, std::min<int64_t>(kTileDepth, cols - c), nullptr,
                     dst + c * packed.ld * compute_size(), packed.ld);
    }
    return;
  }
  point_at_rows(c0);
  double scale[kTileDepth];
  if (s.scale_k) {
    for (int64_t c = 0; c < cols; ++c) {
      const double value = load_scale(s.scale_k, c0 + c);
      if (acc_ == DType::kF64) {
        scale[c] = value;
      } else {
        reinterpret_cast<float*>(scale)[c] = static_cast<float>(value);
      }
    }
  }
  char* dst = packed.data + (c0 * packed.ld + row0 * pair) * compute_size();
  const auto transpose = pairs_ ? ops(matrix.dtype).transpose_pairs : ops(matrix.dtype).transpose;
  transpose(src, rows_wanted, cols, s.scale_k ? scale : nullptr, dst, packed.ld);
}

}  // namespace rasa::cpu
