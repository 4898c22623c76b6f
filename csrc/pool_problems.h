// The gradients of pools as problems: each one output with a segment for each layer of the pool, so
// that it is summed in one accumulator and written once.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "op_inputs.h"

namespace rasa {

// What one layer contributes; rows of every matrix follow each other. s and g have the pool's ranks
// first.
struct PoolSegment {
  Tensor x, dy, g, s;
  const void* d;
  Dropout dropout;
};

// dA_shared = C_in + Σ d ∘rows gᵀ·x̃ and dBt_shared = C_in + Σ d ∘rows sᵀ·dy of one pool. A gradient
// that is undefined or has no rows is not computed.
//
// A problem drops at one rate, so the segments of each further rate are a further round, in a later
// group, which adds to the result of the one before.
class PoolProblems {
 public:
  PoolProblems(const Tensor& dA_shared, const Tensor& dBt_shared, bool adds_to_C)
      : dA_shared_(dA_shared), dBt_shared_(dBt_shared), adds_to_C_(adds_to_C) {}

  bool wants_dA() const { return dA_shared_.defined() && dA_shared_.size(0) > 0; }
  bool wants_dBt() const { return dBt_shared_.defined() && dBt_shared_.size(0) > 0; }

  bool has_problems() const { return !segments_.empty() && (wants_dA() || wants_dBt()); }

  void add(PoolSegment segment) {
    const uint32_t threshold = segment.dropout.threshold;
    if (std::find(thresholds_.begin(), thresholds_.end(), threshold) == thresholds_.end()) {
      thresholds_.push_back(threshold);
    }
    segments_.push_back(std::move(segment));
  }

  // Adds the problems of one round to the group that the builder has begun, if there are any.
  void build(ProgramBuilder& builder, size_t round) const {
    if (round >= thresholds_.size()) return;
    if (wants_dA()) {
      begin_problem(builder, dA_shared_, adds_to_C_ || round > 0);
      for (const PoolSegment& segment : segments_) {
        if (segment.dropout.threshold != thresholds_[round]) continue;
        add_segment(builder, segment.g, segment.x, segment.d);
        builder.drop(segment.dropout.seed, segment.dropout.threshold);
      }
    }
    if (wants_dBt() && round == 0) {
      begin_problem(builder, dBt_shared_, adds_to_C_);
      for (const PoolSegment& segment : segments_) {
        add_segment(builder, segment.s, segment.dy, segment.d);
      }
    }
  }

  // The rounds after the first of some pools, which are wanted in groups of their own.
  static void build_further_rounds(ProgramBuilder& builder,
                                   const std::vector<PoolProblems>& pools) {
    size_t num_rounds = 0;
    for (const PoolProblems& pool : pools) {
      if (pool.wants_dA()) num_rounds = std::max(num_rounds, pool.thresholds_.size());
    }
    for (size_t round = 1; round < num_rounds; ++round) {
      builder.begin_group(Layout::kTN);
      for (const PoolProblems& pool : pools) pool.build(builder, round);
    }
  }

 private:
  static void begin_problem(ProgramBuilder& builder, const Tensor& C, bool adds_to_C) {
    Problem& problem = builder.add_problem(C.size(0), C.size(1));
    problem.C = builder.matrix(C);
    if (adds_to_C) problem.C_in = problem.C;
  }

  static void add_segment(ProgramBuilder& builder, const Tensor& ranks, const Tensor& features,
                          const void* d) {
    builder.add_segment(builder.matrix(ranks), builder.matrix(features), features.size(0)).scale_m =
        d;
  }

  Tensor dA_shared_, dBt_shared_;
  bool adds_to_C_;
  std::vector<PoolSegment> segments_;
  std::vector<uint32_t> thresholds_;  // in order of first use
};

}  // namespace rasa
