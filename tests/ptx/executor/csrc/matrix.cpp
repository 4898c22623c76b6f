// ldmatrix, stmatrix, movmatrix and mma.sync.
#include "fragments.h"
#include "grid.h"

namespace ptx {
namespace {

using Tile = u16[8][8];

// Lane l holds elements (l/4, 2 (l%4)) and the next one of the row; transposed: of the column.
u32 fragment_word(const Tile& tile, u32 lane, bool transposed) {
  const u32 r = lane / 4, c = lane % 4 * 2;
  return transposed ? tile[c][r] | static_cast<u32>(tile[c + 1][r]) << 16
                    : tile[r][c] | static_cast<u32>(tile[r][c + 1]) << 16;
}

void set_fragment_word(Tile& tile, u32 lane, bool transposed, u32 word) {
  const u32 r = lane / 4, c = lane % 4 * 2;
  (transposed ? tile[c][r] : tile[r][c]) = word;
  (transposed ? tile[c + 1][r] : tile[r][c + 1]) = word >> 16;
}

// Lane 8 j + r gives the address of row r of matrix j.
u8* row_bytes(Warp& w, const Op& op, u32 lane, u64* address, const char* what) {
  *address = strip_shared_window(w.address[lane]);
  if (*address & 15) {
    fail(w, Kind::kMisaligned, op.instruction, lane, *address, "%s row address is %llu mod 16",
         what, static_cast<unsigned long long>(*address & 15));
  }
  return shared_bytes(w, op.instruction, lane, *address, 16, what);
}

// imm: matrices, transposed, address offset, base bytes. arg: address base, then one register per
// matrix.
void load_matrices(Warp& w, const Op& op, u32 mask) {
  require_full_warp(w, op, mask, "ldmatrix");
  resolve_addresses(w, op, 0, 2);
  const bool transposed = op.imm[1];
  for (u32 j = 0; j < op.imm[0]; ++j) {
    Tile tile;
    u64 addresses[kWarpSize] = {};
    for (u32 r = 0; r < 8; ++r) {
      memcpy(tile[r], row_bytes(w, op, j * 8 + r, &addresses[r], "ldmatrix"), 16);
      if (w.grid->options.check_races)
        shared_read(w, j * 8 + r, addresses[r] - kSharedBase, 16, op.instruction);
    }
    if (w.grid->options.count) count_shared(w, op.instruction, 0xff, 16, addresses);
    u32* d = reg<u32>(w, op.arg[1 + j]);
    for (u32 lane = 0; lane < kWarpSize; ++lane) d[lane] = fragment_word(tile, lane, transposed);
  }
}

void store_matrices(Warp& w, const Op& op, u32 mask) {
  require_full_warp(w, op, mask, "stmatrix");
  resolve_addresses(w, op, 0, 2);
  const bool transposed = op.imm[1];
  for (u32 j = 0; j < op.imm[0]; ++j) {
    Tile tile;
    u64 addresses[kWarpSize] = {};
    const u32* a = reg<u32>(w, op.arg[1 + j]);
    for (u32 lane = 0; lane < kWarpSize; ++lane) set_fragment_word(tile, lane, transposed, a[lane]);
    for (u32 r = 0; r < 8; ++r) {
      memcpy(row_bytes(w, op, j * 8 + r, &addresses[r], "stmatrix"), tile[r], 16);
      if (w.grid->options.check_races)
        shared_write(w, j * 8 + r, addresses[r] - kSharedBase, 16, op.instruction);
    }
    if (w.grid->options.count) count_shared(w, op.instruction, 0xff, 16, addresses);
  }
}

void move_matrix(Warp& w, const Op& op, u32 mask) {
  require_full_warp(w, op, mask, "movmatrix");
  Tile tile;
  const u32* a = reg<u32>(w, op.arg[1]);
  for (u32 lane = 0; lane < kWarpSize; ++lane) set_fragment_word(tile, lane, false, a[lane]);
  u32* d = reg<u32>(w, op.arg[0]);
  for (u32 lane = 0; lane < kWarpSize; ++lane) d[lane] = fragment_word(tile, lane, true);
}

// B (K,8): register r of lane l holds column l/4, rows (l%4) E .. + 4 E r. Filled as B^T (8,K).
template <MmaType kType>
void read_fragment_b(const u32* const* b, u32 K, float (*Bt)[32]) {
  constexpr u32 E = elements_per_word(kType);
  for (u32 r = 0; r < K / (4 * E); ++r) {
    for (u32 g = 0; g < 8; ++g) {
      for (u32 t = 0; t < 4; ++t) {
        for (u32 i = 0; i < E; ++i)
          Bt[g][t * E + i + r * 4 * E] = element<kType>(b[r][g * 4 + t], i);
      }
    }
  }
}

// C and D (16,8): register q of lane l holds row l/4 + 8 (q/2), column 2 (l%4) + q%2; as f16, q%2
// is the half of register q/2.
void add_float_accumulator(u32* const* d, const u32* const* c, const float (*sum)[16]) {
  for (u32 q = 0; q < 4; ++q) {
    for (u32 lane = 0; lane < kWarpSize; ++lane) {
      float x;
      memcpy(&x, &c[q][lane], 4);
      x += sum[lane % 4 * 2 + q % 2][lane / 4 + 8 * (q / 2)];
      memcpy(&d[q][lane], &x, 4);
    }
  }
}

void add_half_accumulator(u32* const* d, const u32* const* c, const float (*sum)[16]) {
  for (u32 q = 0; q < 2; ++q) {
    for (u32 lane = 0; lane < kWarpSize; ++lane) {
      u32 word = 0;
      for (u32 i = 0; i < 2; ++i) {
        const float old = to_float(F16{static_cast<u16>(c[q][lane] >> 16 * i)});
        word |= static_cast<u32>(narrow<F16>(old + sum[lane % 4 * 2 + i][lane / 4 + 8 * q]).bits)
                << 16 * i;
      }
      d[q][lane] = word;
    }
  }
}

// imm: K, half accumulator. arg: D, A, B, C registers in this order.
template <MmaType kType>
void multiply_accumulate(Warp& w, const Op& op, u32 mask) {
  require_full_warp(w, op, mask, "mma");
  const u32 K = op.imm[0];
  const bool half = op.imm[1];
  const u32 num_c = half ? 2 : 4, num_b = K / (4 * elements_per_word(kType)), num_a = 2 * num_b;
  u32* registers[16];
  for (u32 i = 0; i < 2 * num_c + num_a + num_b; ++i) registers[i] = reg<u32>(w, op.arg[i]);
  u32 *const *d = registers, *const *a = d + num_c, *const *b = a + num_a, *const *c = b + num_b;
  alignas(64) float At[32][16], Bt[8][32], sum[8][16];
  read_fragment_a<kType>(a, K, At);
  read_fragment_b<kType>(b, K, Bt);
  for (u32 n = 0; n < 8; ++n) multiply_column(At, Bt[n], K, sum[n]);
  half ? add_half_accumulator(d, c, sum) : add_float_accumulator(d, c, sum);
  w.grid->counts[op.instruction].flops += 2 * 16 * 8 * K;
}

const bool registered = [] {
  add_op("ldmatrix", load_matrices);
  add_op("stmatrix", store_matrices);
  add_op("movmatrix", move_matrix);
  add_op("mma.f16", multiply_accumulate<MmaType::kF16>);
  add_op("mma.bf16", multiply_accumulate<MmaType::kBF16>);
  add_op("mma.tf32", multiply_accumulate<MmaType::kTF32>);
  add_op("mma.e4m3", multiply_accumulate<MmaType::kE4M3>);
  add_op("mma.e5m2", multiply_accumulate<MmaType::kE5M2>);
  return true;
}();

}  // namespace
}  // namespace ptx
