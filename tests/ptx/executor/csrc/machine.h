// The state of a launch: encoded kernel, grid, blocks, warps. No instruction semantics.
#pragma once
#include <stdint.h>
#include <string.h>

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

enum class Space : u32 { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

// A generic address names its state space in the upper 16 bits; a global address is a host address.
constexpr u64 kSharedWindow = 0xF0ull << 48, kLocalWindow = 0xF1ull << 48;
constexpr u64 kParamWindow = 0xF2ull << 48, kWindowMask = 0xFFFFull << 48;

constexpr u32 kWarpSize = 32, kMaxWarps = 32, kNumBarriers = 16, kNumSpecialRegisters = 23;
constexpr u32 kFullMask = ~0u;

// Clock slots: one per warp of a block, and one for its asynchronous copies.
constexpr u32 kCopyEngine = kMaxWarps, kClockSlots = kMaxWarps + 1;

// ---- the encoded kernel

struct Warp;
struct Op;
using OpFn = void (*)(Warp&, const Op&, u32 mask);

// An operand is a byte offset into the register file (or, with kConstBit, into the constants): 32
// lane values in a row, or one 32-bit lane mask for a predicate.
constexpr u32 kConstBit = 1, kNegateBit = 2, kNoOperand = ~0u;

struct Op {
  OpFn fn;
  const u32* arg;
  const s64* imm;
  u32 guard;        // predicate operand, or kNoOperand
  u32 instruction;  // index in PTX order: what findings and counters refer to
};

enum class End : u32 { kFallThrough, kBranch, kExit, kBarrier, kPoll };
enum class Collective : u32 { kNone, kAllLanes, kMemberMask };

struct BasicBlock {
  u32 first_op, num_ops;
  Collective collective;  // of the block's first instruction: lanes wait there until all it needs
                          // have arrived
  u32 member;             // operand: the member mask
  End end;
  u32 target, guard;  // of a branch
};

struct Program {
  std::vector<Op> ops;
  std::vector<BasicBlock> blocks;
  std::vector<u32> args;
  std::vector<s64> imms;
  std::vector<u8> constants;
  std::vector<s32> line_slots;  // per instruction: row of the unique-sector table, or -1
  u32 num_instructions, num_line_slots, register_bytes, local_bytes;
};

// ---- options and results: mirrored by layouts.py

struct Options {
  u32 seed, adversarial, check_races, poison, count, resident_blocks, bulk_copy_timing,
      max_findings;
  u64 time_limit_ms;
};

struct LaunchShape {
  u32 grid[3], block[3], shared_bytes, num_outputs;
  const u8* params;
  u64 param_bytes;
};

struct InstructionCount {
  u64 global_requests, global_bytes, sectors, shared_requests, shared_bytes, wavefronts,
      ideal_wavefronts, flops;
};

struct Finding {
  s32 kind, instruction, other_instruction;
  u32 block, thread, other_thread, other_block;
  u64 address, count;
  char message[256];
};

// ---- clocks: an access by warp w at time c happened before whatever knows w up to c

using BlockClock = std::array<u32, kClockSlots>;
using RemoteClock = std::map<u32, BlockClock>;  // by block index

struct Clock {
  BlockClock local{};                         // of this block
  BlockClock fenced{};                        // what of it is also behind a proxy fence
  std::shared_ptr<const RemoteClock> remote;  // of other blocks; null: nothing
};

// ---- blocks and warps

constexpr u32 kSharedBase =
    1024;  // shared address of the first byte: no pointer into shared memory is null

struct SharedRecord {
  u32 write_clock, write_epoch;
  u16 writer, reader, in_flight_by;  // instructions
  u8 write_warp, write_lane, in_flight, initialised, generic_write, async_reads, atomic, pad;
};

struct Barrier {
  u32 arrived, expected, instruction;
  Clock clock;
};

struct MBarrier {
  u32 count, pending;
  s64 transactions;
  u64 phase;
  Clock clock, completed;
};

struct CopyAsync {
  u32 mask, instruction, bytes;
  std::array<u32, kWarpSize> target, source_bytes, group;
  std::array<u64, kWarpSize> source;
};

enum class BulkKind : u32 { kTensorLoad, kTensorStore, kLinearLoad };
struct BulkCopy {
  BulkKind kind;
  u32 instruction, warp, lane, shared, mbarrier, bytes, group;
  u64 tensor_map, global;
  s32 coordinates[5];
};

struct WgmmaOp {
  u32 instruction, group, N, K, type;
  bool half_accumulator, transpose_a, transpose_b, keep;
  s32 scale;
  u64 descriptor_a, descriptor_b;
  std::vector<u32*> d;
  std::vector<const u32*> fragment_a;
  std::vector<u32> saved, shared_chunks;
};

enum class State : u32 { kRunnable, kAtBarrier, kDone };
enum class Leave : u32 { kStay, kBarrier, kPolling, kYield, kDone };

struct Block;
struct Grid;
struct Warp {
  Block* block;
  Grid* grid;
  u32 index, live, born;
  State state;
  Leave leave;
  u32 barrier;
  s64 fuel;  // backward jumps (plain) or scheduling steps (adversarial) until the next warp gets
             // its turn
  u32 random;
  u32 pc[kWarpSize];
  u8* operands[2];  // register file, constants
  std::vector<u8> registers, local;
  u64 address[kWarpSize];  // of the memory instruction under way
  Clock clock;
  u32 epoch;  // counts warp synchronisations
  // Fence-based synchronisation: what a later strong write publishes, what a later fence makes
  // known.
  RemoteClock released, unfenced;
  u32 released_lanes, unfenced_lanes;
  std::vector<CopyAsync> copies;
  u32 copies_committed[kWarpSize], bulk_committed[kWarpSize];
  std::vector<WgmmaOp> wgmmas;
  u32 wgmmas_committed;
};

struct Block {
  Grid* grid;
  u32 linear, index[3], num_warps;
  std::vector<u8> shared;
  std::vector<SharedRecord> shadow;
  std::vector<u32> read_clocks;  // [granule * num_warps + warp]
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barriers[kNumBarriers];
  std::map<u32, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  u64 progress;  // counts what a spinning warp may wait for
  u32 random, copy_clock;
};

// ---- operand access

template <class T>
inline T* reg(Warp& w, u32 operand) {
  return reinterpret_cast<T*>(w.operands[operand & kConstBit] +
                              (operand & ~(kConstBit | kNegateBit)));
}

inline u32 predicate(Warp& w, u32 operand) {
  const u32 lanes = *reg<u32>(w, operand);
  return operand & kNegateBit ? ~lanes : lanes;
}

inline void set_predicate(Warp& w, u32 operand, u32 lanes, u32 mask) {
  if (operand == kNoOperand) return;
  u32& p = *reg<u32>(w, operand);
  p = (p & ~mask) | (lanes & mask);
}

inline u32 lowest_lane(u32 mask) { return __builtin_ctz(mask); }

template <class F>
inline void for_each_lane(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(lowest_lane(mask));
}

// d[i] = f(i) for every element of the active lanes; kPerLane elements belong to one lane.
template <u32 kPerLane, class T, class F>
inline __attribute__((always_inline)) void for_elements(T* d, u32 mask, F f) {
  if (mask == kFullMask) {
#pragma GCC ivdep
    for (u32 i = 0; i < kWarpSize * kPerLane; ++i) d[i] = f(i);
  } else {
#pragma GCC ivdep
    for (u32 i = 0; i < kWarpSize * kPerLane; ++i) {
      const T value = f(i);
      d[i] = (mask >> (i / kPerLane) & 1) ? value : d[i];
    }
  }
}

inline u32 next_random(u32& state) {  // xorshift32
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

// ---- registration of instructions under the names that the encoder uses

void add_op(const std::string& name, OpFn fn);

}  // namespace ptx
