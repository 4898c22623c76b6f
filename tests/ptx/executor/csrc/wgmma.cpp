// wgmma: each warp of the group computes its 16 rows, at the wait. Until then the accumulators hold
// poison and the operands in shared memory are marked as being read.
#include "fragments.h"
#include "grid.h"
#include "swizzle.h"

namespace ptx {
namespace {

// Fields of a shared-memory matrix descriptor, PTX ISA "Matrix descriptor format".
struct Descriptor {
  u32 start, leading, stride, base_offset;
  Swizzle swizzle;
  u32 row_bytes;
  explicit Descriptor(u64 d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        base_offset(d >> 49 & 7) {
    constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128B, Swizzle::k64B, Swizzle::k32B};
    constexpr u32 kRowBytes[] = {16, 128, 64, 32};
    swizzle = kModes[d >> 62];
    row_bytes = kRowBytes[d >> 62];
  }

  // Shared address of the 16 bytes of row mn that hold byte k_byte along K.
  u32 k_major(u32 mn, u32 k_byte) const {
    u32 address = start + (mn >> 3) * stride + (mn & 7) * row_bytes;
    address += swizzle == Swizzle::kNone ? (k_byte >> 4) * leading + (k_byte & 15) : k_byte;
    return swizzle_address(address, swizzle);
  }

  // Shared address of element mn of row k.
  u32 mn_major(u32 mn, u32 k, u32 element_bytes) const {
    const u32 per_row = row_bytes / element_bytes, column = (mn % per_row) * element_bytes;
    const u32 across = swizzle == Swizzle::kNone ? stride : leading,
              down = swizzle == Swizzle::kNone ? leading : stride;
    return swizzle_address(
        start + (mn / per_row) * across + (k >> 3) * down + (k & 7) * row_bytes + column, swizzle);
  }
};

struct Operand {
  Descriptor descriptor;
  u32 first_row, num_rows;
  bool transposed;
};

// Calls f(shared address of 16 bytes, mn, k): consecutive elements along K, or along MN when
// transposed.
template <class F>
void for_each_chunk(const WgmmaOp& o, const Operand& operand, F f) {
  const u32 element_bytes = 4 / elements_per_word(static_cast<MmaType>(o.type)),
            per_chunk = 16 / element_bytes;
  if (operand.transposed) {
    for (u32 k = 0; k < o.K; ++k) {
      for (u32 mn = 0; mn < operand.num_rows; mn += per_chunk) {
        f(operand.descriptor.mn_major(operand.first_row + mn, k, element_bytes), mn, k);
      }
    }
    return;
  }
  for (u32 mn = 0; mn < operand.num_rows; ++mn) {
    for (u32 k = 0; k < o.K; k += per_chunk)
      f(operand.descriptor.k_major(operand.first_row + mn, k * element_bytes), mn, k);
  }
}

Operand operand_a(const Warp& w, const WgmmaOp& o) {
  return {Descriptor(o.descriptor_a), 16 * (w.index & 3), 16, o.transpose_a};
}
Operand operand_b(const WgmmaOp& o) { return {Descriptor(o.descriptor_b), 0, o.N, o.transpose_b}; }

void mark_as_being_read(Warp& w, WgmmaOp& o, const Operand& operand) {
  if (operand.descriptor.base_offset) {
    fail(w, Kind::kMisuse, o.instruction, 0, 0, "wgmma descriptor with a base offset");
  }
  for_each_chunk(o, operand, [&](u32 address, u32, u32) {
    shared_bytes(w, o.instruction, 0, address, 16, "wgmma operand");
    if (!w.grid->options.check_races) return;
    shared_async_read(w, 0, address - kSharedBase, 16, o.instruction);
    o.shared_chunks.push_back(address - kSharedBase);
  });
}

// put(mn, k, value) for every element.
template <class F>
void read_operand(Warp& w, const WgmmaOp& o, const Operand& operand, F put) {
  const MmaType type = static_cast<MmaType>(o.type);
  const u32 per_word = elements_per_word(type);
  for_each_chunk(o, operand, [&](u32 address, u32 mn, u32 k) {
    const u8* p = shared_bytes(w, o.instruction, 0, address, 16, "wgmma operand");
    for (u32 i = 0; i < 4 * per_word; ++i) {
      u32 word;
      memcpy(&word, p + i / per_word * 4, 4);
      const float value = element(type, word, i % per_word);
      operand.transposed ? put(mn + i, k, value) : put(mn, k + i, value);
    }
  });
}

void accumulate_column(WgmmaOp& o, u32 n, const float* sum) {
  for (u32 i = 0; i < 16; ++i) {
    const u32 lane = (i & 7) * 4 + (n >> 1 & 3);
    const float product = o.scale * sum[i];
    if (o.half_accumulator) {
      F16* p = reinterpret_cast<F16*>(&o.d[(n >> 3) * 2 + (i >> 3)][lane]) + (n & 1);
      *p = narrow<F16>((o.keep ? to_float(*p) : 0.f) + product);
    } else {
      float* p = reinterpret_cast<float*>(&o.d[(n >> 3) * 4 + (n & 1) + 2 * (i >> 3)][lane]);
      *p = (o.keep ? *p : 0.f) + product;
    }
  }
}

void complete(Warp& w, WgmmaOp& o) {
  alignas(64) static float At[32][16], Bt[256][32];
  for (size_t i = 0; i * kWarpSize < o.saved.size(); ++i)
    memcpy(o.d[i], &o.saved[i * kWarpSize], 4 * kWarpSize);
  if (o.fragment_a.empty()) {
    read_operand(w, o, operand_a(w, o), [&](u32 r, u32 k, float v) { At[k][r] = v; });
  } else {
    read_fragment_a(static_cast<MmaType>(o.type), o.fragment_a.data(), o.K, At);
  }
  read_operand(w, o, operand_b(o), [&](u32 n, u32 k, float v) { Bt[n][k] = v; });
  for (u32 n = 0; n < o.N; ++n) {
    alignas(64) float sum[16];
    multiply_column(At, Bt[n], o.K, sum);
    accumulate_column(o, n, sum);
  }
  for (u32 offset : o.shared_chunks) shared_async_read_end(w, offset, 16);
}

// The accumulators are unreadable until the wait, unless an earlier wgmma has already saved them.
void hide_accumulators(Warp& w, WgmmaOp& o) {
  for (const WgmmaOp& earlier : w.wgmmas) {
    if (earlier.d[0] == o.d[0]) return;
  }
  o.saved.resize(o.d.size() * kWarpSize);
  for (size_t i = 0; i < o.d.size(); ++i) {
    memcpy(&o.saved[i * kWarpSize], o.d[i], 4 * kWarpSize);
    if (w.grid->options.poison) memset(o.d[i], 0xff, 4 * kWarpSize);
  }
}

// imm: N, K, type, half accumulator, scale, transpose a, transpose b, number of D and of A
// registers. arg: B descriptor, scale-d predicate, A descriptor or none, D, A registers.
void issue(Warp& w, const Op& op, u32 mask) {
  require_full_warp(w, op, mask, "wgmma");
  const u32 keep = predicate(w, op.arg[1]);
  if (keep != 0 && keep != kFullMask)
    fail(w, Kind::kMisuse, op.instruction, 0, 0, "wgmma scale-d differs between lanes");
  WgmmaOp o{};
  o.instruction = op.instruction;
  o.group = w.wgmmas_committed + 1;
  o.N = op.imm[0];
  o.K = op.imm[1];
  o.type = op.imm[2];
  o.half_accumulator = op.imm[3];
  o.scale = op.imm[4];
  o.transpose_a = op.imm[5];
  o.transpose_b = op.imm[6];
  o.keep = keep != 0;
  o.descriptor_b = reg<u64>(w, op.arg[0])[0];
  for (u32 i = 0; i < op.imm[7]; ++i) o.d.push_back(reg<u32>(w, op.arg[3 + i]));
  for (u32 i = 0; i < op.imm[8]; ++i)
    o.fragment_a.push_back(reg<u32>(w, op.arg[3 + op.imm[7] + i]));
  if (op.arg[2] != kNoOperand) {
    o.descriptor_a = reg<u64>(w, op.arg[2])[0];
    mark_as_being_read(w, o, operand_a(w, o));
  }
  mark_as_being_read(w, o, operand_b(o));
  hide_accumulators(w, o);
  w.grid->counts[op.instruction].flops += 2ull * 16 * o.N * o.K;
  w.wgmmas.push_back(std::move(o));
}

void commit(Warp& w, const Op&, u32) { ++w.wgmmas_committed; }

// imm[0]: groups that may stay in flight.
void wait(Warp& w, const Op& op, u32) {
  size_t done = 0;
  while (done < w.wgmmas.size() &&
         w.wgmmas[done].group <= static_cast<s64>(w.wgmmas_committed) - op.imm[0]) {
    complete(w, w.wgmmas[done++]);
  }
  w.wgmmas.erase(w.wgmmas.begin(), w.wgmmas.begin() + done);
}

const bool registered = [] {
  add_op("wgmma", issue);
  add_op("wgmma.commit_group", commit);
  add_op("wgmma.wait_group", wait);
  return true;
}();

}  // namespace
}  // namespace ptx
