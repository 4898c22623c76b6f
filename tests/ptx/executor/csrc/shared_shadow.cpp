// What is known of every two bytes of a block's shared memory: who wrote and read them, whether a
// copy is on its way.
#include <algorithm>

#include "grid.h"

namespace ptx {
namespace {

constexpr u32 kGranule = 2;
constexpr u8 kNoLane = 255;

// Calls f(record, granule index) for each granule of the range.
template <class F>
void for_granules(Block& b, u32 offset, u32 bytes, F f) {
  const u32 last = (offset + bytes - 1) / kGranule;
  for (u32 g = offset / kGranule; g <= last; ++g) f(b.shadow[g], g);
}

u32 writer_thread(const SharedRecord& s) {
  return s.write_warp == kCopyEngine
             ? kNobody
             : s.write_warp * kWarpSize + (s.write_lane == kNoLane ? 0 : s.write_lane);
}

bool knows_write(const Warp& w, const SharedRecord& s) {
  return s.write_warp == w.index || w.clock.local[s.write_warp] >= s.write_clock;
}

void check_read(Warp& w, u32 lane, u32 offset, u32 instruction, const SharedRecord& s) {
  const u32 other = writer_thread(s);
  if (s.in_flight) {
    report(w, Kind::kUnfinishedCopy, instruction, lane, offset, s.in_flight_by, other);
  } else if (!s.initialised) {
    report(w, Kind::kUninitialised, instruction, lane, offset);
  } else if (!knows_write(w, s)) {
    report(w, Kind::kSharedReadAfterWrite, instruction, lane, offset, s.writer, other);
  } else if (s.write_warp == w.index && s.write_lane != lane && s.write_lane != kNoLane &&
             s.write_epoch == w.epoch) {
    report(w, Kind::kWarpRace, instruction, lane, offset, s.writer, other);
  }
}

void check_write(Warp& w, u32 lane, u32 offset, u32 instruction, const SharedRecord& s,
                 u32 granule) {
  const Block& b = *w.block;
  if (s.in_flight) {
    report(w, Kind::kUnfinishedCopy, instruction, lane, offset, s.in_flight_by, writer_thread(s));
  } else if (s.initialised && !knows_write(w, s)) {
    report(w, Kind::kSharedWriteAfterWrite, instruction, lane, offset, s.writer, writer_thread(s));
  }
  const u32* readers = &b.read_clocks[granule * b.num_warps];
  for (u32 other = 0; other < b.num_warps; ++other) {
    if (other != w.index && readers[other] > w.clock.local[other]) {
      report(w, Kind::kSharedWriteAfterRead, instruction, lane, offset, s.reader,
             other * kWarpSize);
      break;
    }
  }
  if (s.async_reads) report(w, Kind::kSharedWriteAfterRead, instruction, lane, offset, s.reader);
}

void mark_written(const Warp& w, SharedRecord& s, u32 lane, u32 instruction) {
  s.write_warp = w.index;
  s.write_lane = lane;
  s.writer = instruction;
  s.write_clock = w.clock.local[w.index];
  s.write_epoch = w.epoch;
  s.in_flight = 0;
  s.initialised = 1;
  s.atomic = 0;
}

}  // namespace

void shared_read(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction, bool async_proxy) {
  Block& b = *w.block;
  for_granules(b, offset, bytes, [&](SharedRecord& s, u32 g) {
    check_read(w, lane, offset, instruction, s);
    const bool behind_fence =
        s.write_warp == kCopyEngine || s.write_clock <= w.clock.fenced[s.write_warp];
    if (async_proxy && s.generic_write && !behind_fence) {
      report(w, Kind::kProxy, instruction, lane, offset, s.writer, writer_thread(s));
    }
    b.read_clocks[g * b.num_warps + w.index] = w.clock.local[w.index];
    s.reader = instruction;
  });
}

void shared_write(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction) {
  for_granules(*w.block, offset, bytes, [&](SharedRecord& s, u32 g) {
    check_write(w, lane, offset, instruction, s, g);
    mark_written(w, s, lane, instruction);
    s.generic_write = 1;
  });
}

// Atomics are ordered with each other, but not with plain accesses.
void shared_atomic(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction) {
  for_granules(*w.block, offset, bytes, [&](SharedRecord& s, u32) {
    if (!s.atomic) check_read(w, lane, offset, instruction, s);
    mark_written(w, s, kNoLane, instruction);
    s.generic_write = s.atomic = 1;
  });
}

void shared_copy_issue(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction) {
  for_granules(*w.block, offset, bytes, [&](SharedRecord& s, u32 g) {
    check_write(w, lane, offset, instruction, s, g);
    s.write_warp = w.index;
    s.write_lane = lane;
    s.writer = s.in_flight_by = instruction;
    s.generic_write = 0;
    s.in_flight = 1;
  });
}

// A cp.async becomes a write of the thread that waits for it, at that moment.
void shared_copy_land(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction) {
  for_granules(*w.block, offset, bytes, [&](SharedRecord& s, u32) {
    mark_written(w, s, lane, instruction);
    s.generic_write = 1;
  });
}

// A bulk copy is a write of the block's copy engine; its mbarrier makes it known.
void shared_bulk_land(Block& b, u32 offset, u32 bytes, u32 instruction) {
  for_granules(b, offset, bytes, [&](SharedRecord& s, u32) {
    s.in_flight = s.generic_write = s.atomic = 0;
    s.initialised = 1;
    s.write_warp = kCopyEngine;
    s.write_lane = kNoLane;
    s.writer = instruction;
    s.write_clock = b.copy_clock;
  });
}

void shared_async_read(Warp& w, u32 lane, u32 offset, u32 bytes, u32 instruction) {
  shared_read(w, lane, offset, bytes, instruction, true);
  for_granules(*w.block, offset, bytes, [](SharedRecord& s, u32) { ++s.async_reads; });
}

void shared_async_read_end(Warp& w, u32 offset, u32 bytes) {
  Block& b = *w.block;
  for_granules(b, offset, bytes, [&](SharedRecord& s, u32 g) {
    if (s.async_reads) --s.async_reads;
    b.read_clocks[g * b.num_warps + w.index] = w.clock.local[w.index];
  });
}

}  // namespace ptx
