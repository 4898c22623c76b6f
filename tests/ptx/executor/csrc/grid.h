// One launch: its buffers, blocks, findings and counts, and the checks that instructions call.
#pragma once
#include <stdarg.h>

#include <chrono>

#include "machine.h"

namespace ptx {

// Mirrored by findings.py, which holds the names.
enum class Kind : s32 {
  kOutOfBounds = 1,
  kMisaligned,
  kDivergent,
  kDeadlock,
  kSharedReadAfterWrite,
  kSharedWriteAfterWrite,
  kSharedWriteAfterRead,
  kUnfinishedCopy,
  kUninitialised,
  kStoredTwice,
  kStoredNever,
  kWatchdog,
  kMisuse,
  kExitWithCopy,
  kWarpRace,
  kProxy,
  kExitWithBulk,
  kBlockOrder,
  kGlobalRace,
};

// A finding after which the launch cannot go on.
struct Fatal {
  Finding finding;
};

// What is known of the last write to, or read of, two bytes of a global buffer, in one word; 0
// means none.
struct GlobalRecord {
  u64 clock : 22, block : 20, instruction : 14, warp : 5, strong : 1, bytes : 2;
};
static_assert(sizeof(GlobalRecord) == 8, "one word per granule");

struct GlobalBuffer {
  u64 base, size;
  u64 first_sector;                // in the numbering of the launch's sectors
  std::vector<u8> stored;          // per byte, for outputs that must be stored exactly once
  const u8* expected = nullptr;    // per byte: must be stored (null: all)
  GlobalRecord* writes = nullptr;  // per granule of two bytes
  GlobalRecord* reads = nullptr;
};

struct Grid {
  const Program* program;
  Options options;
  LaunchShape shape;
  std::vector<GlobalBuffer> buffers;    // by address
  std::vector<u32> last_buffer;         // per instruction: where it last hit
  std::map<u64, RemoteClock> messages;  // by address: what the last strong write there released
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Finding> findings;
  std::vector<u64> block_runs, block_lanes;
  std::vector<InstructionCount> counts;
  std::vector<u64> touched;  // unique-sector bits [line slot][sector]
  u64 num_sectors = 0;
  u64 steps = 0;
  std::chrono::steady_clock::time_point deadline;
};

// ---- findings (findings.cpp)

constexpr u32 kNobody = ~0u;
u32 thread_of(const Warp& w, u32 lane);
void report(Warp& w, Kind kind, u32 instruction, u32 lane, u64 address, s32 other_instruction = -1,
            u32 other_thread = kNobody, u32 other_block = kNobody, const char* message = "");
[[noreturn]] void fail(Warp& w, Kind kind, s32 instruction, u32 lane, u64 address,
                       const char* format, ...) __attribute__((format(printf, 6, 7)));
void require_full_warp(Warp& w, const Op& op, u32 mask, const char* what);

// ---- addresses (memory.cpp)

// Fills w.address for a memory operand encoded as arg[first]: base, imm[first_imm]: offset,
// imm[first_imm + 1]: base bytes.
void resolve_addresses(Warp& w, const Op& op, u32 arg, u32 imm);
u8* shared_bytes(Warp& w, u32 instruction, u32 lane, u64 address, u32 bytes, const char* what);
GlobalBuffer& global_buffer(Warp& w, u32 instruction, u32 lane, u64 address, u32 bytes,
                            const char* what);
u64 strip_shared_window(u64 address);

// ---- shared-memory shadow (shared_shadow.cpp)

void shared_read(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction,
                 bool async_proxy = false);
void shared_write(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction);
void shared_atomic(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction);
void shared_copy_issue(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction);
void shared_copy_land(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction);
void shared_bulk_land(Block& b, u32 offset, u32 bytes, u32 instruction);
void shared_async_read(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction);
void shared_async_read_end(Warp& w, u32 offset, u32 bytes);

// ---- global-memory shadow and the order between blocks (global_shadow.cpp)

void global_read(Warp& w, u32 lane, GlobalBuffer& buffer, u64 address, u32 bytes, u32 instruction,
                 bool strong);
void global_write(Warp& w, u32 lane, GlobalBuffer& buffer, u64 address, u32 bytes, u32 instruction,
                  bool strong);
void join(Clock& into, const Clock& from);
void join(BlockClock& into, const BlockClock& from);
void release_at(Warp& w, u32 lane, u64 address, bool release, bool read_modify_write);
void acquire_at(Warp& w, u32 lane, u64 address, bool acquire);

// ---- counters (counters.cpp)

void count_global(Warp& w, u32 instruction, u32 mask, const u64* addresses, const u32* bytes);
void count_global_run(Warp& w, u32 instruction, GlobalBuffer& buffer, u64 address, u32 bytes);
void count_shared(Warp& w, u32 instruction, u32 mask, u32 bytes, const u64* addresses);
u32 count_unique_sectors(const Grid& grid, const std::vector<u32>& slots);

// ---- asynchronous copies (async_copy.cpp, bulk_copy.cpp) and barriers (barrier.cpp, mbarrier.cpp)

bool arrive_at_barrier(Warp& w, const Op& op, u32 mask);
void release_barriers_of_exited_warp(Warp& w);
bool test_mbarrier(Warp& w, const Op& op, u32 mask);
MBarrier& mbarrier_at(Warp& w, u32 instruction, u32 lane, u64 address);
void complete_mbarrier_phase(Block& b, MBarrier& barrier);
void land_some_bulk_copies(Block& b);
bool land_one_bulk_copy(Block& b);
void check_exit(Warp& w);

// ---- scheduler (scheduler.cpp)

void run_grid(Grid& grid);

}  // namespace ptx
