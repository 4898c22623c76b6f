// Accumulators → C, 16 bytes at a time: for 16-bit C and C_in whose rows and width are whole
// chunks.
//
// As epilogue.cuh's rows, with half the instructions, and with C_in loaded before it is needed: a
// lane has the C_in of an m16 row of its warp's tile in registers, and loads that of the next row
// into each as soon as it is used.
#pragma once

#include "element.cuh"
#include "smem_layout.h"

namespace rasa::cuda {

template <int kWarpN, int kStagingN, int kPitch, class Element>
class ChunkStore {
  static constexpr int kRowChunks = kStagingN / kChunk;
  static constexpr int kPerPass = kStagingN / 16;  // chunks of a lane

 public:
  using Base = uint4[kWarpN / 16];

  __device__ ChunkStore(const ProblemArg& problem, const uint64_t* C_rows,
                        const uint64_t* C_in_rows, int n0)
      : problem_(problem), C_rows_(C_rows), C_in_rows_(C_in_rows), n0_(n0) {}

  // Whether C and C_in have such rows.
  __device__ static bool is_possible(const ProblemArg& problem) {
    const auto has_chunks = [](const MatrixArg& m) {
      return m.num_blocks == 0 || (m.is_aligned && !m.is_f32);
    };
    return problem.N % kChunk == 0 && has_chunks(problem.C) && has_chunks(problem.C_in);
  }

  // C_in of the 16 rows from row0 of the tile on, at the columns from n of the warp's on.
  __device__ void load_base(Base& base, int row0, int n) const {
#pragma unroll
    for (int q = 0; q < kPerPass; ++q) {
      const ChunkCoord c = coord(q);
      const uint64_t row = C_in_rows_[row0 + c.row];
      const int column = n0_ + n + c.chunk * kChunk;
      uint4& chunk = base[n / 16 + q];
      chunk = {0, 0, 0, 0};
      if (row != 0 && column < problem_.N) {
        chunk = *reinterpret_cast<const uint4*>(row + int64_t{2} * column);
      }
    }
  }

  // As stage_rows; the halves of some chunks change places, so that a quarter of a warp reads from
  // all banks.
  __device__ static void stage(float* rows16, const float (*acc)[4]) {
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRowChunks; ++j) {
      float* out = rows16 + row * kPitch + kChunk * j + (column ^ swap(row, j));
      *reinterpret_cast<float2*>(out) = {acc[j][0], acc[j][1]};
      *reinterpret_cast<float2*>(out + 8 * kPitch) = {acc[j][2], acc[j][3]};
    }
  }

  __device__ void store(const float* rows16, const Base& base, int row0, int n) const {
#pragma unroll
    for (int q = 0; q < kPerPass; ++q) {
      const ChunkCoord c = coord(q);
      const uint64_t row = C_rows_[row0 + c.row];
      const int column = n0_ + n + c.chunk * kChunk;
      if (row == 0 || column >= problem_.N) continue;
      const float* staged = rows16 + c.row * kPitch + c.chunk * kChunk;
      const int half = swap(c.row, c.chunk);
      const float4 lo = *reinterpret_cast<const float4*>(staged + half);
      const float4 hi = *reinterpret_cast<const float4*>(staged + (half ^ 4));
      const float sum[kChunk] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      float v[kChunk];
      unpack_8(v, base[n / 16 + q], Element());
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] += sum[i] * problem_.keep_scale;
      *reinterpret_cast<uint4*>(row + int64_t{2} * column) = pack_8(v, Element());
    }
  }

 private:
  __device__ static ChunkCoord coord(int q) {
    const int index = threadIdx.x % 32 + 32 * q;
    return {index / kRowChunks, index % kRowChunks};
  }
  __device__ static int swap(int row, int chunk) {
    return (kRowChunks > 4 ? chunk / 4 : row) % 2 * 4;
  }

  const ProblemArg& problem_;
  const uint64_t* const C_rows_;
  const uint64_t* const C_in_rows_;
  const int n0_;
};

}  // namespace rasa::cuda
