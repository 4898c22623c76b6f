// One group of a program → the launches that run it: kernel, grid, shared memory, argument block.
// Pure C++17, no torch and no CUDA call, so that a machine without a GPU plans what a GPU would
// get.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "args_builder.h"
#include "f32_kernels.h"
#include "gemm_config.h"
#include "kernel_args.h"
#include "split.h"

namespace rasa::cuda {

struct Launch {
  ConfigId config;
  DType element;
  bool has_dropout;
  int32_t grid, threads, smem_bytes;
  LaunchArgs args;
};

// Run the launches in order on one stream, each with args->workspace set to the same memory of
// workspace_bytes; what lies there before does not matter.
struct GroupPlan {
  std::vector<Launch> launches;
  int64_t workspace_bytes;
};

// The launches of one group. Throws std::invalid_argument where no kernel exists for it.
class GroupPlanner {
 public:
  GroupPlanner(const Program& program, const Group& group, const DeviceInfo& device)
      : program_(program), group_(group), device_(device), builder_(program, group.layout) {
    if (program.dtype == DType::kF64) {
      throw std::invalid_argument("the CUDA kernels compute in bfloat16, float16 or float32");
    }
  }

  // Problems of one group do not depend on each other: those of one kernel are launched together.
  GroupPlan plan() {
    choose_kernels();
    for (int config = 0; config < kNumConfigs; ++config) {
      for (const bool has_dropout : {false, true}) {
        kernel_ = {static_cast<ConfigId>(config), has_dropout};
        add_problems();
        if (!builder_.is_empty()) launch();
      }
    }
    kernel_ = {ConfigId::kReduce, false};
    for (const Reduction& r : reductions_) add_reduction(r);
    if (!builder_.is_empty()) launch();
    return {std::move(launches_), workspace_units_ * kWorkspaceUnit};
  }

 private:
  struct Kernel {
    ConfigId config;
    bool has_dropout;
    bool operator==(const Kernel& other) const {
      return config == other.config && has_dropout == other.has_dropout;
    }
  };

  // Segments of a problem that one launch computes.
  struct Piece {
    int32_t first_segment, num_segments;  // in the program
    int32_t num_k, num_splits;
  };

  // What reduce_partials sums.
  struct Reduction {
    ProblemArg arg;
    Problem problem;
  };

  const Segment* segments(const Problem& p) const {
    return program_.segments.data() + p.first_segment;
  }

  const Problem& problem(int32_t i) const { return program_.problems[group_.first_problem + i]; }

  // Problems of one layer, or of siblings, share a launch where a kernel computes them all: a
  // launch costs more than tiles that are partly empty. Where they are too many for one argument
  // block, a launch costs little beside their work, and each problem gets the kernel of its size.
  void choose_kernels() {
    std::vector<ProblemShape> shapes;
    for (int32_t i = 0; i < group_.num_problems; ++i) shapes.push_back(shape(problem(i)));
    for (int32_t i = 0; i < group_.num_problems; ++i) {
      ProblemShape shared = shapes[i];
      size_t bytes = 0;
      for (int32_t j = 0; j < group_.num_problems && bytes <= kSmallArgBytes; ++j) {
        if (!can_share_kernel(shapes[i], shapes[j])) continue;
        shared = widest(shared, shapes[j]);
        bytes += num_bytes(problem(j));
      }
      const bool shares = bytes > 0 && bytes <= kSmallArgBytes;
      kernels_.push_back(shares ? Kernel{choose(shared), shared.has_dropout}
                                : kernel_alone(shapes[i], problem(i)));
    }
    // Kernels with dropout run problems without it too, where no two warps draw the same.
    for (Kernel& kernel : kernels_) {
      const Kernel other = {kernel.config, true};
      const bool draws_once = tile_config(kernel.config).warps_m == 1;
      if (group_.layout == Layout::kTN && draws_once &&
          std::find(kernels_.begin(), kernels_.end(), other) != kernels_.end()) {
        kernel.has_dropout = true;
      }
    }
  }

  ProblemShape shape(const Problem& p) const {
    // A diagonal takes any kernel, in one tile or several.
    ProblemShape shape = {group_.layout, p.is_diagonal ? 1 : p.M, p.N, 0, p.num_segments, false,
                          false,         p.drop_threshold > 0};
    for (const Segment* s = segments(p); s < segments(p) + p.num_segments; ++s) {
      shape.max_K = std::max<int64_t>(shape.max_K, s->K);
      shape.scales_segments |= s->scale_m != nullptr && p.num_segments > 1;
      shape.scales_k |= s->scale_k != nullptr;
    }
    return shape;
  }

  size_t num_bytes(const Problem& p) const {
    return ArgsBuilder::num_bytes(p, segments(p), p.num_segments);
  }

  Kernel kernel_alone(ProblemShape shape, const Problem& p) const {
    // The kernels with a scale for each segment take the most arguments.
    shape.scales_segments |= num_bytes(p) > static_cast<size_t>(arg_bytes(choose(shape)));
    return {choose(shape), shape.has_dropout};
  }

  ConfigId choose(const ProblemShape& shape) const {
    return program_.dtype == DType::kF32 ? select_f32_config(shape, program_.is_full_precision)
                                         : select_config(shape, device_.smem_bytes);
  }

  TileConfig tile() const { return tile_config(kernel_.config); }
  int64_t num_slots() const {
    return int64_t{device_.num_sms} * blocks_per_sm(kernel_.config, kernel_.has_dropout);
  }
  int64_t num_tiles(const Problem& p) const {
    if (p.is_diagonal) return ceil_div(p.M, tile().diagonal_block());
    return ceil_div(p.M, tile().block_m) * ceil_div(p.N, tile().block_n);
  }
  int32_t num_k(const Segment* segments, int32_t count) const {
    int64_t sum = 0;
    for (int32_t i = 0; i < count; ++i) sum += ceil_div(segments[i].K, tile().block_k);
    return static_cast<int32_t>(std::min<int64_t>(sum, kUnsplit));
  }

  // The problems of kernel_.
  void add_problems() {
    std::vector<const Problem*> problems;
    std::vector<SplitWork> work;
    for (int32_t i = 0; i < group_.num_problems; ++i) {
      const Problem& p = problem(i);
      if (p.M == 0 || p.N == 0 || !(kernels_[i] == kernel_)) continue;
      problems.push_back(&p);
      work.push_back({num_tiles(p), num_k(segments(p), p.num_segments)});
    }
    if (problems.empty()) return;
    const int32_t k_per_split = choose_k_per_split(work.data(), static_cast<int>(work.size()),
                                                   tile(), device_, num_slots());
    for (const Problem* p : problems) add_problem(*p, k_per_split);
  }

  void add_problem(const Problem& p, int32_t k_per_split) {
    const std::vector<Piece> pieces = cut(p, k_per_split);
    ProblemArg arg = {};
    arg.M = p.M;
    arg.N = p.N;
    arg.is_diagonal = p.is_diagonal;
    arg.partials_at = -1;
    if (p.num_segments == 1) arg.scale_m = segments(p)->scale_m;
    int32_t splits = 0;
    for (const Piece& piece : pieces) splits += piece.num_splits;
    const int32_t C_rows = p.is_diagonal ? 1 : p.M;
    if (splits > 1) {
      arg.partials_at = allocate(splits * partial_size(C_rows, p.N));
      Reduction r = {arg, p};
      r.arg.M = C_rows;
      r.arg.num_partials = splits;
      reductions_.push_back(r);
    }
    for (const Piece& piece : pieces) {
      const bool is_split = piece.num_splits > 1;
      arg.k_per_split = is_split ? even_k_per_split(piece.num_k, k_per_split) : kUnsplit;
      add_piece(arg, p, piece);
      if (arg.partials_at >= 0) {
        arg.partials_at +=
            static_cast<int32_t>(piece.num_splits * partial_size(C_rows, p.N) * 4 / kWorkspaceUnit);
      }
    }
  }

  // To the launch being filled, or to the next one.
  void add_piece(const ProblemArg& arg, const Problem& p, const Piece& piece) {
    const Segment* first = program_.segments.data() + piece.first_segment;
    const auto added = [&] {
      return builder_.add(arg, p, first, piece.num_segments, num_tiles(p) * piece.num_splits,
                          arg_bytes(kernel_.config));
    };
    if (added()) return;
    if (!builder_.is_empty()) launch();
    if (!added()) throw std::invalid_argument("a problem has more tiles than one launch can take");
  }

  // All segments in one piece, or as many as a launch takes in each of several.
  std::vector<Piece> cut(const Problem& p, int32_t k_per_split) const {
    std::vector<Piece> pieces;
    int32_t first = 0;
    do {
      int32_t count = std::min(p.num_segments - first, 1);
      const Segment* s = segments(p) + first;
      const size_t room = arg_bytes(kernel_.config);
      while (first + count < p.num_segments && ArgsBuilder::num_bytes(p, s, count + 1) <= room) {
        ++count;
      }
      if (ArgsBuilder::num_bytes(p, s, count) > room) {
        throw std::invalid_argument("a segment and its problem may have at most " +
                                    std::to_string(ArgsBuilder::kMaxBlocks) +
                                    " row blocks in their matrices");
      }
      const int32_t k = num_k(s, count);
      pieces.push_back({p.first_segment + first, count, k, num_splits(k, k_per_split)});
      first += count;
    } while (first < p.num_segments);
    return pieces;
  }

  void add_reduction(const Reduction& r) {
    const int64_t tiles = num_reduce_tiles(r.arg.M, r.arg.N, r.arg.num_partials);
    const auto added = [&] {
      return builder_.add(r.arg, r.problem, nullptr, 0, tiles, arg_bytes(kernel_.config));
    };
    if (added()) return;
    if (!builder_.is_empty()) launch();
    if (!added()) throw std::invalid_argument("C is too large for one launch");
  }

  // Where `floats` of the workspace begin, in kWorkspaceUnit bytes.
  int32_t allocate(int64_t floats) {
    const int64_t at = workspace_units_;
    workspace_units_ += ceil_div(floats * 4, kWorkspaceUnit);
    if (workspace_units_ > INT32_MAX - kReduceThreads) {
      throw std::invalid_argument("partial sums would take more than 32 GiB");
    }
    return static_cast<int32_t>(at);
  }

  void launch() {
    const bool reduces = kernel_.config == ConfigId::kReduce;
    // Persistent: no more blocks than fit the GPU at once.
    const int64_t resident = reduces ? int64_t{device_.num_sms} * kReduceBlocks : num_slots();
    const int64_t tiles = builder_.num_tiles();
    int64_t grid = std::min(tiles, resident);
    // Walks of equal length take no longer than the longest one, and load fewer panels.
    if (!reduces && tile().walks) grid = ceil_div(tiles, ceil_div(tiles, grid));
    launches_.push_back({kernel_.config, program_.dtype, kernel_.has_dropout,
                         static_cast<int32_t>(grid), reduces ? kReduceThreads : tile().threads(),
                         reduces ? 0 : tile().smem_bytes(),
                         builder_.finish(arg_bytes(kernel_.config))});
  }

  const Program& program_;
  const Group& group_;
  const DeviceInfo device_;
  ArgsBuilder builder_;
  std::vector<Kernel> kernels_;  // of each problem
  Kernel kernel_ = {};           // of the launches being filled
  std::vector<Launch> launches_;
  std::vector<Reduction> reductions_;
  int64_t workspace_units_ = 0;
};

inline GroupPlan plan(const Program& program, const Group& group, const DeviceInfo& device) {
  return GroupPlanner(program, group, device).plan();
}

}  // namespace rasa::cuda
