// One group of a program → the launches that run it: kernel, grid, shared memory, argument block.
// Pure C++17, no torch and no CUDA call, so that a machine without a GPU plans what a GPU would
// get.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../philox.h"
#include "gemm_config.h"
#include "kernel_args.h"

namespace rasa::cuda {

// What the plan needs to know of the GPU.
struct DeviceInfo {
  int32_t num_sms;
};

struct Launch {
  ConfigId config;
  DType element;
  bool has_dropout;
  int32_t grid, threads, smem_bytes;
  KernelArgs args;
};

// Run the launches in order on one stream, each with args.workspace set to the same memory of
// workspace_bytes; what lies there before does not matter.
struct GroupPlan {
  std::vector<Launch> launches;
  int64_t workspace_bytes;
};

// The launches of one group. Throws std::invalid_argument where no kernel exists for it.
class GroupPlanner {
 public:
  GroupPlanner(const Program& program, const Group& group, const DeviceInfo& device)
      : program_(program), group_(group), device_(device) {
    if (program.dtype != DType::kBF16 && program.dtype != DType::kF16) {
      throw std::invalid_argument("the CUDA kernels compute in bfloat16 or float16");
    }
  }

  // Problems of one group do not depend on each other: those of one kernel are launched together.
  GroupPlan plan() {
    std::vector<Launch> launches;
    const int32_t end = group_.first_problem + group_.num_problems;
    for (int config = 0; config < kNumConfigs; ++config) {
      for (const bool has_dropout : {false, true}) {
        kernel_ = {static_cast<ConfigId>(config), has_dropout};
        for (int32_t i = group_.first_problem; i < end; ++i) {
          const Problem& p = program_.problems[i];
          if (p.M == 0 || p.N == 0 || !runs_here(p)) continue;
          if (!append(p)) {
            launches.push_back(finish());
            if (!append(p)) {
              throw std::invalid_argument("a problem has more segments than one launch can take");
            }
          }
        }
        if (!problems_.empty()) launches.push_back(finish());
      }
    }
    return {std::move(launches), 0};
  }

 private:
  struct Kernel {
    ConfigId config;
    bool has_dropout;
  };

  const Segment& segment(const Problem& p, int32_t i) const {
    return program_.segments[p.first_segment + i];
  }

  bool runs_here(const Problem& p) const {
    int64_t max_K = 0;
    bool has_scale_m = false;
    for (int32_t i = 0; i < p.num_segments; ++i) {
      max_K = std::max<int64_t>(max_K, segment(p, i).K);
      has_scale_m |= segment(p, i).scale_m != nullptr;
    }
    const bool drops = p.drop_threshold > 0;
    ConfigId id = select_config(group_.layout, p.M, p.N, max_K, has_scale_m && p.num_segments > 1);
    if (drops && id == ConfigId::kMerge) id = ConfigId::kWgrad160;
    if (drops && !has_dropout_kernel(id)) {
      throw std::invalid_argument("no kernel has dropout and a scale_m for each segment");
    }
    if (p.row_dot != nullptr) throw std::invalid_argument("no kernel has row_dot");
    return id == kernel_.config && drops == kernel_.has_dropout;
  }

  // False if the launch is full; nothing is appended then.
  bool append(const Problem& p) {
    const size_t old_segments = segments_.size(), old_blocks = blocks_.size();
    ProblemArg arg = {};
    arg.M = p.M;
    arg.N = p.N;
    arg.first_segment = static_cast<int32_t>(segments_.size());
    arg.num_segments = p.num_segments;
    arg.C = matrix(p.C);
    arg.C_in = matrix(p.C_in);
    arg.drop_threshold = p.drop_threshold;
    arg.keep_scale = static_cast<float>(keep_scale(arg.drop_threshold));
    for (int32_t i = 0; i < p.num_segments; ++i) {
      const Segment& s = segment(p, i);
      segments_.push_back({s.scale_k, s.scale_m, matrix(s.A), matrix(s.B), s.seed, s.K, 0});
    }
    problems_.push_back(arg);
    const TileConfig tile = tile_config(kernel_.config);
    const int64_t tiles = ceil_div(p.M, tile.block_m) * ceil_div(p.N, tile.block_n);
    if (num_bytes() > sizeof(KernelArgs::data) || num_tiles_ + tiles > INT32_MAX) {
      problems_.pop_back();
      segments_.resize(old_segments);
      blocks_.resize(old_blocks);
      return false;
    }
    tile_starts_.push_back(static_cast<int32_t>(num_tiles_));
    num_tiles_ += tiles;
    return true;
  }

  MatrixArg matrix(const Matrix& m) {
    MatrixArg arg = {static_cast<uint16_t>(blocks_.size()), static_cast<uint16_t>(m.num_blocks),
                     m.dtype == DType::kF32, 1};
    if (m.num_blocks > 0 && m.dtype != DType::kF32 && m.dtype != program_.dtype) {
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

  size_t num_bytes() const {
    return problems_.size() * (sizeof(ProblemArg) + sizeof(int32_t)) +
           segments_.size() * sizeof(SegmentArg) + blocks_.size() * sizeof(Block);
  }

  Launch finish() {
    const TileConfig tile = tile_config(kernel_.config);
    Launch launch = {};
    launch.config = kernel_.config;
    launch.element = program_.dtype;
    launch.has_dropout = kernel_.has_dropout;
    launch.threads = tile.threads();
    launch.smem_bytes = tile.smem_bytes();
    // Persistent: no more blocks than fit the GPU at once.
    const int64_t resident =
        int64_t{device_.num_sms} * blocks_per_sm(kernel_.config, kernel_.has_dropout);
    launch.grid = static_cast<int32_t>(std::min(num_tiles_, resident));
    KernelArgs& args = launch.args;
    args.num_problems = static_cast<int32_t>(problems_.size());
    args.num_tiles = static_cast<int32_t>(num_tiles_);
    args.scale_dtype = program_.scale_dtype;
    size_t at = 0;
    const auto put = [&](const void* source, size_t bytes) {
      if (bytes > 0) std::memcpy(args.data + at, source, bytes);
      at += bytes;
      return static_cast<int32_t>(at - bytes);
    };
    put(problems_.data(), problems_.size() * sizeof(ProblemArg));
    args.segments_at = put(segments_.data(), segments_.size() * sizeof(SegmentArg));
    args.blocks_at = put(blocks_.data(), blocks_.size() * sizeof(Block));
    args.tile_starts_at = put(tile_starts_.data(), tile_starts_.size() * sizeof(int32_t));
    problems_.clear();
    segments_.clear();
    blocks_.clear();
    tile_starts_.clear();
    num_tiles_ = 0;
    return launch;
  }

  const Program& program_;
  const Group& group_;
  const DeviceInfo device_;
  Kernel kernel_ = {};
  // Of the launch being filled.
  std::vector<ProblemArg> problems_;
  std::vector<SegmentArg> segments_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tile_starts_;
  int64_t num_tiles_ = 0;
};

inline GroupPlan plan(const Program& program, const Group& group, const DeviceInfo& device) {
  return GroupPlanner(program, group, device).plan();
}

}  // namespace rasa::cuda
