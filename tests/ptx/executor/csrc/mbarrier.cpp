// mbarrier objects of shared memory. Their state is kept beside the bytes.
#include "grid.h"

namespace ptx {

static u32 mbarrier_address(Warp& w, u32 instruction, u32 lane, u64 address) {
  address = strip_shared_window(address);
  if (address & 7)
    fail(w, Kind::kMisaligned, instruction, lane, address, "mbarrier address is no multiple of 8");
  shared_bytes(w, instruction, lane, address, 8, "mbarrier");
  return address;
}

MBarrier& mbarrier_at(Warp& w, u32 instruction, u32 lane, u64 address) {
  const auto it = w.block->mbarriers.find(mbarrier_address(w, instruction, lane, address));
  if (it == w.block->mbarriers.end()) {
    fail(w, Kind::kMisuse, instruction, lane, address, "mbarrier that is not initialised");
  }
  return it->second;
}

void complete_mbarrier_phase(Block& b, MBarrier& barrier) {
  if (barrier.pending || barrier.transactions) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.completed = barrier.clock;
  ++b.progress;
}

// arg: address base, predicate, phase parity or state. imm: address offset, base bytes, 1 parity /
// 0 state.
bool test_mbarrier(Warp& w, const Op& op, u32 mask) {
  resolve_addresses(w, op, 0, 0);
  u32 done = 0;
  for_each_lane(mask, [&](u32 lane) {
    const MBarrier& barrier = mbarrier_at(w, op.instruction, lane, w.address[lane]);
    const bool complete = op.imm[2] ? (barrier.phase & 1) != (reg<u32>(w, op.arg[2])[lane] & 1)
                                    : barrier.phase != reg<u64>(w, op.arg[2])[lane];
    if (!complete) return;
    done |= 1u << lane;
    join(w.clock, barrier.completed);
  });
  if (done) ++w.epoch;
  set_predicate(w, op.arg[1], done, mask);
  return done == mask;
}

namespace {

// arg: address base, count. imm: address offset, base bytes.
void initialise(Warp& w, const Op& op, u32 mask) {
  resolve_addresses(w, op, 0, 0);
  for_each_lane(mask, [&](u32 lane) {
    MBarrier barrier{};
    barrier.count = barrier.pending = reg<u32>(w, op.arg[1])[lane];
    w.block->mbarriers[mbarrier_address(w, op.instruction, lane, w.address[lane])] = barrier;
  });
}

void invalidate(Warp& w, const Op& op, u32 mask) {
  resolve_addresses(w, op, 0, 0);
  for_each_lane(mask, [&](u32 lane) {
    mbarrier_at(w, op.instruction, lane, w.address[lane]);
    w.block->mbarriers.erase(mbarrier_address(w, op.instruction, lane, w.address[lane]));
  });
}

// arg: address base, state or none, arrivals or none, expected bytes or none. imm: address offset,
// base bytes, 1 if it arrives.
void arrive(Warp& w, const Op& op, u32 mask) {
  resolve_addresses(w, op, 0, 0);
  const bool arrives = op.imm[2];
  for_each_lane(mask, [&](u32 lane) {
    MBarrier& barrier = mbarrier_at(w, op.instruction, lane, w.address[lane]);
    if (op.arg[1] != kNoOperand) reg<u64>(w, op.arg[1])[lane] = barrier.phase;
    if (op.arg[3] != kNoOperand) barrier.transactions += reg<u32>(w, op.arg[3])[lane];
    if (!arrives) return;
    const u32 n = op.arg[2] == kNoOperand ? 1 : reg<u32>(w, op.arg[2])[lane];
    if (n > barrier.pending) {
      fail(w, Kind::kMisuse, op.instruction, lane, w.address[lane],
           "mbarrier gets %u arrivals with %u pending of %u", n, barrier.pending, barrier.count);
    }
    join(barrier.clock, w.clock);
    barrier.pending -= n;
    complete_mbarrier_phase(*w.block, barrier);
  });
  if (arrives) ++w.clock.local[w.index];
}

const bool registered = [] {
  add_op("mbarrier.init", initialise);
  add_op("mbarrier.inval", invalidate);
  add_op("mbarrier.arrive", arrive);
  return true;
}();

}  // namespace
}  // namespace ptx
