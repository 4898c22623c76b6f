// Who wrote and read every two bytes of global memory, and the release/acquire pairs that order
// blocks.
//
// The model is the causality order of the PTX memory model, kept as vector clocks: a release
// (st.release, atom.release, or a fence followed by a strong write) leaves at its address what its
// warp knows; an acquire (ld.acquire, atom.acquire, or a strong read followed by a fence) of that
// address adds it to what the reader knows. Barriers of a block carry that knowledge to its other
// warps. Order between lanes of one warp is taken for granted.
#include <algorithm>

#include "grid.h"

namespace ptx {
namespace {

constexpr u32 kGranule = 2;
constexpr u32 kMaxInstruction = (1 << 14) - 1;

bool knows(const Warp& w, const GlobalRecord& r) {
  if (r.block == w.block->linear) return r.warp == w.index || w.clock.local[r.warp] >= r.clock;
  if (!w.clock.remote) return false;
  const auto it = w.clock.remote->find(r.block);
  return it != w.clock.remote->end() && it->second[r.warp] >= r.clock;
}

bool is_none(const GlobalRecord& r) { return r.clock == 0; }

// Two accesses conflict when one is a write, unless both are strong.
bool conflict(const Warp& w, const GlobalRecord& earlier, bool strong, u32 bytes) {
  return !is_none(earlier) && !(earlier.strong && strong) && (earlier.bytes & bytes) &&
         !knows(w, earlier);
}

void report_conflict(Warp& w, u32 lane, const GlobalBuffer& buffer, u64 address, u32 instruction,
                     const GlobalRecord& earlier, const char* what) {
  const bool same_block = earlier.block == w.block->linear;
  report(w, same_block ? Kind::kGlobalRace : Kind::kBlockOrder, instruction, lane,
         address - buffer.base, earlier.instruction, earlier.warp * kWarpSize, earlier.block, what);
}

GlobalRecord record_of(const Warp& w, u32 instruction, bool strong, u32 bytes) {
  GlobalRecord r{};
  r.clock = w.clock.local[w.index];
  r.block = w.block->linear;
  r.instruction = std::min(instruction, kMaxInstruction);
  r.warp = w.index;
  r.strong = strong;
  r.bytes = bytes;
  return r;
}

// Calls f(granule index, which of its two bytes) for each granule of the range.
template <class F>
void for_granules(const GlobalBuffer& buffer, u64 address, u32 bytes, F f) {
  const u64 offset = address - buffer.base;
  if (bytes == 1) return f(offset / kGranule, 1u << (offset & 1));
  for (u64 g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) f(g, 3u);
}

void merge(RemoteClock& into, u32 block, const BlockClock& clock) {
  const auto [it, is_new] = into.try_emplace(block, clock);
  if (!is_new) join(it->second, clock);
}

void merge(RemoteClock& into, const RemoteClock& from) {
  for (const auto& [block, clock] : from) merge(into, block, clock);
}

// All that a warp knows, its own block included, in the form another block can use.
RemoteClock knowledge_of(const Warp& w) {
  RemoteClock all = w.clock.remote ? *w.clock.remote : RemoteClock();
  merge(all, w.block->linear, w.clock.local);
  return all;
}

void learn(Warp& w, const RemoteClock& message) {
  const auto own = message.find(w.block->linear);
  if (own != message.end()) join(w.clock.local, own->second);
  auto remote = std::make_shared<RemoteClock>(w.clock.remote ? *w.clock.remote : RemoteClock());
  for (const auto& [block, clock] : message) {
    if (block != w.block->linear) merge(*remote, block, clock);
  }
  w.clock.remote = remote;
}

}  // namespace

void join(BlockClock& into, const BlockClock& from) {
  for (u32 i = 0; i < kClockSlots; ++i) into[i] = std::max(into[i], from[i]);
}

void join(Clock& into, const Clock& from) {
  join(into.local, from.local);
  join(into.fenced, from.fenced);
  if (!from.remote || into.remote == from.remote) return;
  if (!into.remote) {
    into.remote = from.remote;
    return;
  }
  auto both = std::make_shared<RemoteClock>(*into.remote);
  merge(*both, *from.remote);
  into.remote = both;
}

void global_read(Warp& w, u32 lane, GlobalBuffer& buffer, u64 address, u32 bytes, u32 instruction,
                 bool strong) {
  for_granules(buffer, address, bytes, [&](u64 g, u32 which) {
    const GlobalRecord write = buffer.writes[g];
    if (conflict(w, write, strong, which)) {
      report_conflict(w, lane, buffer, address, instruction, write,
                      "read of bytes that another warp wrote");
    }
    buffer.reads[g] = record_of(w, instruction, strong, which);
  });
}

void global_write(Warp& w, u32 lane, GlobalBuffer& buffer, u64 address, u32 bytes, u32 instruction,
                  bool strong) {
  for_granules(buffer, address, bytes, [&](u64 g, u32 which) {
    const GlobalRecord write = buffer.writes[g], read = buffer.reads[g];
    if (conflict(w, write, strong, which)) {
      report_conflict(w, lane, buffer, address, instruction, write,
                      "write over bytes that another warp wrote");
    } else if (conflict(w, read, strong, which)) {
      report_conflict(w, lane, buffer, address, instruction, read,
                      "write over bytes that another warp read");
    }
    buffer.writes[g] = record_of(w, instruction, strong, which);
  });
}

// A strong write by `lane`. A read-modify-write continues the release sequence of what it read.
void release_at(Warp& w, u32 lane, u64 address, bool release, bool read_modify_write) {
  auto& messages = w.grid->messages;
  const bool fenced = w.released_lanes >> lane & 1;
  if (!release && !fenced) {
    if (!read_modify_write && !messages.empty()) messages.erase(address);
    return;
  }
  RemoteClock published = release ? knowledge_of(w) : w.released;
  if (read_modify_write) {
    merge(messages[address], published);
  } else {
    messages[address] = std::move(published);
  }
  if (release) ++w.clock.local[w.index];  // what follows is not released
}

// A strong read by `lane`.
void acquire_at(Warp& w, u32 lane, u64 address, bool acquire) {
  const auto& messages = w.grid->messages;
  if (messages.empty()) return;
  const auto it = messages.find(address);
  if (it == messages.end()) return;
  if (acquire) {
    learn(w, it->second);
  } else {
    merge(w.unfenced, it->second);
    w.unfenced_lanes |= 1u << lane;
  }
}

namespace {

void fence(Warp& w, const Op&, u32 mask) {
  if (w.unfenced_lanes & mask) {
    learn(w, w.unfenced);
    w.unfenced.clear();
    w.unfenced_lanes = 0;
  }
  w.released = knowledge_of(w);
  w.released_lanes |= mask;
  ++w.clock.local[w.index];
}

const bool registered = [] {
  add_op("fence", fence);
  return true;
}();

}  // namespace
}  // namespace ptx
