// The argument block of the kernels: passed by value, so it needs no copy to the device and can be
// captured in a CUDA graph. A header, and flat arrays packed into the bytes after it.
#pragma once

#include "../gemm_problem.h"
#include "../host_device.h"
#include "tile_order.h"

namespace rasa::cuda {

// A launch copies as many bytes as the kernel declares, used or not: kernels that are launched
// often, for a problem or two, declare the small block.
constexpr int kSmallArgBytes = 4096;
constexpr int kLargeArgBytes = 32760;  // 32,764 at most, from CUDA 12.1 on, sm_70+

struct MatrixArg {
  uint16_t first_block, num_blocks;
  uint16_t is_f32;     // else the launch's 16-bit type; in a launch of fp32, what is_f16 says
  uint8_t is_aligned;  // every row starts at a multiple of 16 bytes
  uint8_t is_f16;      // else bf16
};

struct SegmentArg {
  const void* scale_k;
  const void* scale_m;
  MatrixArg A, B;
  const int64_t* seed;  // of dropout
  int32_t K;
  int32_t unused;
};

struct ProblemArg {
  int32_t M, N;
  int32_t first_segment, num_segments;
  MatrixArg C, C_in;
  const void* scale_m;  // of the whole sum; nullptr where each segment has its own
  uint32_t drop_threshold;
  float keep_scale;  // of the sum: 1 without dropout
  // The reduction's k blocks, those of all segments counted on, are shared out to splits: tiles of
  // their own, which follow those of the split before.
  int32_t k_per_split;
  // The partials of C that reduce_partials sums: fp32, rows padded to 4. In units of kWorkspaceUnit
  // bytes; -1: none, the tile stores C itself.
  int32_t partials_at;
  int32_t num_partials;
  int32_t is_diagonal;  // C is (1,M)
};

constexpr int kWorkspaceUnit = 16;
constexpr int32_t kUnsplit = INT32_MAX;  // k_per_split

// Floats of one partial (M,N).
RASA_HD constexpr int64_t partial_size(int64_t M, int64_t N) { return M * round_up(N, 4); }

// Where row m of a split's partial (M,N) begins, in floats from partials_at on.
RASA_HD constexpr int64_t partial_row(int split, int64_t M, int64_t N, int m) {
  return split * partial_size(M, N) + partial_size(m, N);
}

struct KernelArgs {
  // Scratch memory of a group's launches, aligned to 256 bytes. The launcher fills it in.
  void* workspace;
  int32_t num_problems, num_tiles;
  int32_t segments_at, blocks_at, tile_starts_at;  // in data, in bytes; problems are at 0
  DType scale_dtype;

  RASA_HD const unsigned char* data() const {
    return reinterpret_cast<const unsigned char*>(this + 1);
  }

  RASA_HD float* workspace_floats(int32_t at) const {
    return static_cast<float*>(workspace) + int64_t{at} * (kWorkspaceUnit / 4);
  }

  // By reference, never by value: a reference compiles to loads from the constant bank, a copy to
  // local memory.
  RASA_HD const ProblemArg& problem(int i) const {
    return reinterpret_cast<const ProblemArg*>(data())[i];
  }
  RASA_HD const SegmentArg& segment(int i) const {
    return reinterpret_cast<const SegmentArg*>(data() + segments_at)[i];
  }
  RASA_HD const Block& block(int i) const {
    return reinterpret_cast<const Block*>(data() + blocks_at)[i];
  }
  RASA_HD int32_t tile_start(int problem) const {
    return reinterpret_cast<const int32_t*>(data() + tile_starts_at)[problem];
  }

  // tile_start(p) <= tile < tile_start(p + 1)
  RASA_HD int problem_of(int tile) const {
    return problem_of_tile([this](int p) { return tile_start(p); }, num_problems, tile);
  }
};

template <int kBytes>
struct ArgsBlock : KernelArgs {
  unsigned char bytes[kBytes - sizeof(KernelArgs)];
};
static_assert(sizeof(KernelArgs) == 32 && sizeof(ArgsBlock<kLargeArgBytes>) == kLargeArgBytes &&
                  sizeof(ArgsBlock<kSmallArgBytes>) == kSmallArgBytes,
              "data follows the header");
static_assert(sizeof(SegmentArg) == 48 && sizeof(ProblemArg) == 64 && sizeof(Block) == 16,
              "224 merges of two blocks each must fit two launches");

}  // namespace rasa::cuda
