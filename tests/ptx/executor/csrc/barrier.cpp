// bar.sync and bar.arrive. A barrier carries what each arriving warp knows to all that leave it.
#include "grid.h"

namespace ptx {
namespace {

u32 warps_alive(const Block& b) {
  u32 alive = 0;
  for (const auto& w : b.warps) alive += w->state != State::kDone;
  return alive;
}

void open_barrier(Block& b, u32 number) {
  Barrier& barrier = b.barriers[number];
  for (const auto& w : b.warps) {
    if (w->state != State::kAtBarrier || w->barrier != number) continue;
    w->state = State::kRunnable;
    join(w->clock, barrier.clock);
  }
  barrier.arrived = 0;
  ++b.progress;
}

// Checks the use of a barrier and returns how many warps it waits for. arg: number, thread count or
// none.
u32 expected_warps(Warp& w, const Op& op, u32 mask, u32 number, u32 threads) {
  if (number >= kNumBarriers)
    fail(w, Kind::kMisuse, op.instruction, 0, number, "barrier number %u", number);
  if (mask != w.live) {
    fail(w, Kind::kDivergent, op.instruction, lowest_lane(w.live & ~mask), 0,
         "barrier executed by a part of the warp (mask %08x of %08x)", mask, w.live);
  }
  if (mask != w.born) {
    report(w, Kind::kDivergent, op.instruction, lowest_lane(w.born & ~mask), number, -1, kNobody,
           kNobody, "lanes of this warp have exited before the barrier");
  }
  if (threads % kWarpSize) {
    fail(w, Kind::kMisuse, op.instruction, 0, threads, "barrier count %u is no multiple of 32",
         threads);
  }
  return threads ? threads / kWarpSize : warps_alive(*w.block);
}

}  // namespace

// Returns whether the warp may go on. imm[0]: 1 waits (sync), 0 only arrives.
bool arrive_at_barrier(Warp& w, const Op& op, u32 mask) {
  Block& b = *w.block;
  const u32 lane = lowest_lane(mask), number = reg<u32>(w, op.arg[0])[lane];
  const u32 threads = op.arg[1] == kNoOperand ? 0 : reg<u32>(w, op.arg[1])[lane];
  const u32 expected = expected_warps(w, op, mask, number, threads);
  Barrier& barrier = b.barriers[number];
  if (barrier.arrived == 0) {
    barrier.clock = Clock();
    barrier.expected = expected;
  } else if (threads && barrier.expected != expected) {
    report(w, Kind::kMisuse, op.instruction, 0, number, barrier.instruction, kNobody, kNobody,
           "one barrier is used with different thread counts");
  }
  barrier.instruction = op.instruction;
  ++barrier.arrived;
  join(barrier.clock, w.clock);
  ++w.clock.local[w.index];
  ++w.epoch;
  const bool waits = op.imm[0];
  if (waits) {
    w.state = State::kAtBarrier;
    w.barrier = number;
  }
  if (barrier.arrived >= expected) {
    open_barrier(b, number);
    return true;
  }
  if (waits) w.leave = Leave::kBarrier;
  return !waits;
}

// An exited warp no longer counts for barriers of the whole block.
void release_barriers_of_exited_warp(Warp& w) {
  Block& b = *w.block;
  const u32 alive = warps_alive(b);
  for (u32 number = 0; number < kNumBarriers; ++number) {
    const Barrier& barrier = b.barriers[number];
    if (barrier.arrived && barrier.expected > alive && barrier.arrived >= alive)
      open_barrier(b, number);
  }
}

namespace {

// The scheduler runs block barriers and mbarrier waits itself, as ends of basic blocks.
void never_called(Warp& w, const Op& op, u32) {
  fail(w, Kind::kMisuse, op.instruction, 0, 0, "internal error: a barrier inside a basic block");
}

const bool registered = [] {
  add_op("bar.sync", never_called);
  add_op("mbarrier.wait", never_called);
  return true;
}();

}  // namespace
}  // namespace ptx
