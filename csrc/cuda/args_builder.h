// Problems of a group → the argument block of one launch.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../philox.h"
#include "kernel_args.h"
#include "smem_layout.h"

namespace rasa::cuda {

// An argument block of the size that a kernel declares.
class LaunchArgs {
 public:
  explicit LaunchArgs(int num_bytes) : words_(num_bytes / sizeof(uint64_t)) {}

  KernelArgs* operator->() { return reinterpret_cast<KernelArgs*>(words_.data()); }
  const KernelArgs* operator->() const {
    return reinterpret_cast<const KernelArgs*>(words_.data());
  }
  unsigned char* data() { return reinterpret_cast<unsigned char*>(words_.data() + kHeaderWords); }
  size_t num_bytes() const { return words_.size() * sizeof(uint64_t); }

 private:
  static constexpr size_t kHeaderWords = sizeof(KernelArgs) / sizeof(uint64_t);
  std::vector<uint64_t> words_;
};

class ArgsBuilder {
 public:
  ArgsBuilder(const Program& program, Layout layout) : program_(program), layout_(layout) {}

  // What a problem with these segments takes of an argument block.
  static size_t num_bytes(const Problem& p, const Segment* segments, int32_t num_segments) {
    int64_t blocks = int64_t{p.C.num_blocks} + p.C_in.num_blocks;
    for (int32_t i = 0; i < num_segments; ++i) {
      blocks += int64_t{segments[i].A.num_blocks} + segments[i].B.num_blocks;
    }
    return num_bytes(1, num_segments, blocks);
  }

  // Row blocks that a problem of one segment may have.
  static constexpr size_t kMaxBlocks = (kLargeArgBytes - sizeof(KernelArgs) - sizeof(ProblemArg) -
                                        sizeof(int32_t) - sizeof(SegmentArg)) /
                                       sizeof(Block);

  // All of the problem, or nothing of it where it does not fit. Fills in what `arg` says of the
  // matrices, the segments and dropout.
  bool add(ProblemArg arg, const Problem& p, const Segment* segments, int32_t num_segments,
           int64_t num_tiles, int arg_bytes) {
    const size_t old_segments = segments_.size(), old_blocks = blocks_.size();
    arg.first_segment = static_cast<int32_t>(old_segments);
    arg.num_segments = num_segments;
    arg.C = matrix(p.C);
    arg.C_in = matrix(p.C_in);
    arg.drop_threshold = p.drop_threshold;
    arg.keep_scale = static_cast<float>(keep_scale(p.drop_threshold));
    for (int32_t i = 0; i < num_segments; ++i) {
      const Segment& s = segments[i];
      const void* scale_m = arg.scale_m == nullptr ? s.scale_m : nullptr;  // once
      segments_.push_back({s.scale_k, scale_m, matrix(s.A), matrix(s.B), s.seed, reduction(s), 0});
    }
    const size_t bytes = num_bytes(problems_.size() + 1, segments_.size(), blocks_.size());
    if (bytes > static_cast<size_t>(arg_bytes) || num_tiles_ + num_tiles > INT32_MAX) {
      segments_.resize(old_segments);
      blocks_.resize(old_blocks);
      return false;
    }
    problems_.push_back(arg);
    tile_starts_.push_back(static_cast<int32_t>(num_tiles_));
    num_tiles_ += num_tiles;
    return true;
  }

  bool is_empty() const { return problems_.empty(); }
  int64_t num_tiles() const { return num_tiles_; }

  // Hands over the block and starts an empty one.
  LaunchArgs finish(int arg_bytes) {
    LaunchArgs args(arg_bytes);
    args->num_problems = static_cast<int32_t>(problems_.size());
    args->num_tiles = static_cast<int32_t>(num_tiles_);
    args->scale_dtype = program_.scale_dtype;
    size_t at = 0;
    const auto put = [&](const void* source, size_t bytes) {
      if (bytes > 0) std::memcpy(args.data() + at, source, bytes);
      at += bytes;
      return static_cast<int32_t>(at - bytes);
    };
    put(problems_.data(), problems_.size() * sizeof(ProblemArg));
    args->segments_at = put(segments_.data(), segments_.size() * sizeof(SegmentArg));
    args->blocks_at = put(blocks_.data(), blocks_.size() * sizeof(Block));
    args->tile_starts_at = put(tile_starts_.data(), tile_starts_.size() * sizeof(int32_t));
    problems_.clear();
    segments_.clear();
    blocks_.clear();
    tile_starts_.clear();
    num_tiles_ = 0;
    return args;
  }

 private:
  static size_t num_bytes(size_t problems, size_t segments, size_t blocks) {
    return sizeof(KernelArgs) + problems * (sizeof(ProblemArg) + sizeof(int32_t)) +
           segments * sizeof(SegmentArg) + blocks * sizeof(Block);
  }

  // Rows of B beyond its last one are zeros, for which there may be no scale_k.
  int32_t reduction(const Segment& s) const {
    if (layout_ == Layout::kNT) return s.K;
    int64_t rows = 0;
    for (int32_t i = 0; i < s.B.num_blocks; ++i) {
      rows += program_.blocks[s.B.first_block + i].rows;
    }
    return static_cast<int32_t>(std::min<int64_t>(s.K, rows));
  }

  MatrixArg matrix(const Matrix& m) {
    MatrixArg arg = {static_cast<uint16_t>(blocks_.size()), static_cast<uint16_t>(m.num_blocks),
                     m.dtype == DType::kF32, 1, m.dtype == DType::kF16};
    const bool is_known = m.dtype == DType::kF32 || m.dtype == program_.dtype ||
                          (m.dtype != DType::kF64 && program_.dtype == DType::kF32);
    if (m.num_blocks > 0 && !is_known) {
      throw std::invalid_argument("an operand has neither the program's dtype nor float32");
    }
    for (int32_t i = 0; i < m.num_blocks; ++i) {
      const Block& block = program_.blocks[m.first_block + i];
      const bool is_aligned =
          reinterpret_cast<uintptr_t>(block.ptr) % kChunkBytes == 0 &&
          (block.rows == 1 || block.ld * element_size(m.dtype) % kChunkBytes == 0);
      arg.is_aligned = arg.is_aligned && is_aligned;
      blocks_.push_back(block);
    }
    return arg;
  }

  const Program& program_;
  const Layout layout_;
  std::vector<ProblemArg> problems_;
  std::vector<SegmentArg> segments_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tile_starts_;
  int64_t num_tiles_ = 0;
};

}  // namespace rasa::cuda
