// cp.async.bulk and TMA through an emulated tensor map (tensor_map.py), and the proxy fence that
// they need.
#include <algorithm>

#include "grid.h"
#include "memory_access.h"
#include "swizzle.h"

namespace ptx {
namespace {

// Mirrored by tensor_map.py.
struct __attribute__((packed)) TensorMap {
  u32 magic;
  u8 rank, element_bytes, swizzle, oob_nan;
  u16 box[5];
  u8 stride[5], pad;
  u64 global, dim[5], byte_stride[4];
};
constexpr u32 kMagic = 0x4d545850;

const TensorMap& tensor_map_at(Warp& w, u32 instruction, u32 lane, u64 address) {
  if (address & 63)
    fail(w, Kind::kMisaligned, instruction, lane, address, "tensor map is not aligned to 64 bytes");
  w.address[lane] = address;
  const Place place = resolve(w, instruction, Space::kGeneric, lane, 64, "tensor map");
  const auto* map = reinterpret_cast<const TensorMap*>(place.bytes);
  if (map->magic != kMagic)
    fail(w, Kind::kMisuse, instruction, lane, address, "operand is no tensor map");
  return *map;
}

u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.element_bytes;
  for (u32 i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// The bytes of a row of the box that lie inside the tensor: [low, high) of the row, and where the
// row starts in memory.
struct BoxRow {
  u32 shared, bytes, low, high;
  u64 global;
};

template <class F>
void for_each_row(const TensorMap& map, u32 shared, const s32* c, F f) {
  u32 num_rows = 1;
  for (u32 i = 1; i < map.rank; ++i) num_rows *= map.box[i];
  const u32 bytes = map.box[0] * map.element_bytes;
  for (u32 r = 0; r < num_rows; ++r) {
    u32 rest = r;
    bool inside = true;
    u64 global = map.global + static_cast<s64>(c[0]) * map.element_bytes;
    for (u32 i = 1; i < map.rank; ++i) {
      const s64 x = static_cast<s64>(c[i]) + rest % map.box[i];
      rest /= map.box[i];
      inside &= x >= 0 && x < static_cast<s64>(map.dim[i]);
      global += x * map.byte_stride[i - 1];
    }
    const s64 first = std::max<s64>(0, -static_cast<s64>(c[0]));
    const s64 end = std::min<s64>(map.box[0], static_cast<s64>(map.dim[0]) - c[0]);
    BoxRow row{shared + r * bytes, bytes, 0, 0, global};
    if (inside && end > first) {
      row.low = first * map.element_bytes;
      row.high = end * map.element_bytes;
    }
    f(row);
  }
}

// Copies the inside of a row between its swizzled 16-byte chunks and memory. Byte i of the row is
// at shared_at(i).
template <class F>
void for_each_chunk(const TensorMap& map, const BoxRow& row, F f) {
  for (u32 b = 0; b < row.bytes; b += 16) {
    const u32 low = std::max(row.low, b), high = std::min(row.high, std::min(b + 16, row.bytes));
    f(swizzle_address(row.shared + b, static_cast<Swizzle>(map.swizzle)), b, low, high);
  }
}

void check_box(Warp& w, const Op& op, u32 lane, const TensorMap& map, u32 rank, u32 shared) {
  if (map.rank != rank)
    fail(w, Kind::kMisuse, op.instruction, lane, 0, "tensor map of rank %u used as %u", map.rank,
         rank);
  if (shared & 127)
    fail(w, Kind::kMisaligned, op.instruction, lane, shared, "TMA shared address is %u mod 128",
         shared & 127);
  if (static_cast<Swizzle>(map.swizzle) == Swizzle::k128B && (shared & 1023)) {
    report(w, Kind::kMisaligned, op.instruction, lane, shared, -1, kNobody, kNobody,
           "TMA box with 128-byte swizzle does not start at a multiple of 1024");
  }
  shared_bytes(w, op.instruction, lane, shared, box_bytes(map), "TMA box");
}

void start_load(Warp& w, const BulkCopy& copy) {
  const Options& options = w.grid->options;
  if (options.check_races)
    shared_copy_issue(w, copy.lane, copy.shared - kSharedBase, copy.bytes, copy.instruction);
  if (options.poison)
    memset(w.block->shared.data() + (copy.shared - kSharedBase), 0xff, copy.bytes);
  w.block->bulk_copies.push_back(copy);
  ++w.grid->counts[copy.instruction].global_requests;
}

BulkCopy make_copy(Warp& w, const Op& op, BulkKind kind, u32 lane) {
  BulkCopy copy{};
  copy.kind = kind;
  copy.instruction = op.instruction;
  copy.warp = w.index;
  copy.lane = lane;
  copy.group = w.bulk_committed[lane] + 1;
  return copy;
}

// imm: rank, tensor map offset, mbarrier offset, shared offset.
// arg: shared, tensor map, mbarrier (or none: a store), coordinates.
void tensor_copy(Warp& w, const Op& op, u32 mask) {
  const u32 rank = op.imm[0];
  const bool is_load = op.arg[2] != kNoOperand;
  for_each_lane(mask, [&](u32 lane) {
    BulkCopy copy =
        make_copy(w, op, is_load ? BulkKind::kTensorLoad : BulkKind::kTensorStore, lane);
    copy.shared = reg<u32>(w, op.arg[0])[lane] + op.imm[3];
    copy.tensor_map = reg<u64>(w, op.arg[1])[lane] + op.imm[1];
    const TensorMap& map = tensor_map_at(w, op.instruction, lane, copy.tensor_map);
    for (u32 i = 0; i < rank; ++i) copy.coordinates[i] = reg<s32>(w, op.arg[3 + i])[lane];
    check_box(w, op, lane, map, rank, copy.shared);
    copy.bytes = box_bytes(map);
    if (is_load) {
      copy.mbarrier = reg<u32>(w, op.arg[2])[lane] + op.imm[2];
      mbarrier_at(w, op.instruction, lane, copy.mbarrier);
      return start_load(w, copy);
    }
    if (w.grid->options.check_races) {
      shared_async_read(w, lane, copy.shared - kSharedBase, copy.bytes, op.instruction);
    }
    w.block->bulk_copies.push_back(copy);
    ++w.grid->counts[op.instruction].global_requests;
  });
}

// arg: shared, global, bytes, mbarrier.
void linear_load(Warp& w, const Op& op, u32 mask) {
  for_each_lane(mask, [&](u32 lane) {
    BulkCopy copy = make_copy(w, op, BulkKind::kLinearLoad, lane);
    copy.shared = reg<u32>(w, op.arg[0])[lane];
    copy.global = reg<u64>(w, op.arg[1])[lane];
    copy.bytes = reg<u32>(w, op.arg[2])[lane];
    copy.mbarrier = reg<u32>(w, op.arg[3])[lane];
    if ((copy.shared | copy.global | copy.bytes) & 15) {
      fail(w, Kind::kMisaligned, op.instruction, lane, copy.global,
           "cp.async.bulk with an address or size that is no multiple of 16");
    }
    shared_bytes(w, op.instruction, lane, copy.shared, copy.bytes, "cp.async.bulk");
    global_buffer(w, op.instruction, lane, copy.global, copy.bytes, "cp.async.bulk read");
    mbarrier_at(w, op.instruction, lane, copy.mbarrier);
    start_load(w, copy);
  });
}

void read_run(Warp& w, const BulkCopy& copy, u64 address, u32 bytes) {
  GlobalBuffer& buffer = global_buffer(w, copy.instruction, copy.lane, address, bytes, "bulk load");
  if (w.grid->options.check_races)
    global_read(w, copy.lane, buffer, address, bytes, copy.instruction, false);
  if (w.grid->options.count) count_global_run(w, copy.instruction, buffer, address, bytes);
}

void land_store(Warp& w, const BulkCopy& copy) {
  const TensorMap& map = tensor_map_at(w, copy.instruction, copy.lane, copy.tensor_map);
  u8* shared = w.block->shared.data() - kSharedBase;
  for_each_row(map, copy.shared, copy.coordinates, [&](const BoxRow& row) {
    if (row.high == row.low) return;
    const u64 first = row.global + row.low;
    const u32 bytes = row.high - row.low;
    GlobalBuffer& buffer = global_buffer(w, copy.instruction, copy.lane, first, bytes, "TMA store");
    store_once(w, copy.instruction, copy.lane, buffer, first, bytes);
    if (w.grid->options.check_races)
      global_write(w, copy.lane, buffer, first, bytes, copy.instruction, false);
    if (w.grid->options.count) count_global_run(w, copy.instruction, buffer, first, bytes);
    for_each_chunk(map, row, [&](u32 chunk, u32 b, u32 low, u32 high) {
      if (high > low)
        memcpy(reinterpret_cast<u8*>(row.global + low), shared + chunk + (low - b), high - low);
    });
  });
  if (w.grid->options.check_races) shared_async_read_end(w, copy.shared - kSharedBase, copy.bytes);
}

void land_tensor_load(Warp& w, const BulkCopy& copy) {
  const TensorMap& map = tensor_map_at(w, copy.instruction, copy.lane, copy.tensor_map);
  u8* shared = w.block->shared.data() - kSharedBase;
  for_each_row(map, copy.shared, copy.coordinates, [&](const BoxRow& row) {
    if (row.high > row.low) read_run(w, copy, row.global + row.low, row.high - row.low);
    for_each_chunk(map, row, [&](u32 chunk, u32 b, u32 low, u32 high) {
      memset(shared + chunk, 0, std::min(16u, row.bytes - b));
      if (high > low)
        memcpy(shared + chunk + (low - b), reinterpret_cast<const u8*>(row.global + low),
               high - low);
    });
  });
}

void land(Block& b, size_t which) {
  const BulkCopy copy = b.bulk_copies[which];
  b.bulk_copies.erase(b.bulk_copies.begin() + which);
  Warp& w = *b.warps[copy.warp];
  ++b.progress;
  if (copy.kind == BulkKind::kTensorStore) return land_store(w, copy);
  ++b.copy_clock;
  if (copy.kind == BulkKind::kTensorLoad) {
    land_tensor_load(w, copy);
  } else {
    read_run(w, copy, copy.global, copy.bytes);
    memcpy(b.shared.data() + (copy.shared - kSharedBase), reinterpret_cast<const u8*>(copy.global),
           copy.bytes);
  }
  if (w.grid->options.check_races)
    shared_bulk_land(b, copy.shared - kSharedBase, copy.bytes, copy.instruction);
  MBarrier& barrier = mbarrier_at(w, copy.instruction, copy.lane, copy.mbarrier);
  barrier.transactions -= copy.bytes;
  barrier.clock.local[kCopyEngine] = b.copy_clock;
  complete_mbarrier_phase(b, barrier);
}

void commit(Warp& w, const Op&, u32 mask) {
  for_each_lane(mask, [&](u32 lane) { ++w.bulk_committed[lane]; });
}

// imm[0]: groups that may stay in flight.
void wait(Warp& w, const Op& op, u32 mask) {
  Block& b = *w.block;
  for (size_t k = 0; k < b.bulk_copies.size();) {
    const BulkCopy& copy = b.bulk_copies[k];
    const bool mine =
        copy.kind == BulkKind::kTensorStore && copy.warp == w.index && (mask >> copy.lane & 1);
    if (mine && copy.group <= static_cast<s64>(w.bulk_committed[copy.lane]) - op.imm[0]) {
      land(b, k);
    } else {
      ++k;
    }
  }
}

// Covers every write that is ordered before it: the warp's own, and those that it knows of through
// barriers. A fence by some of the lanes does not cover what the others have just written.
void proxy_fence(Warp& w, const Op&, u32 mask) {
  for (u32 slot = 0; slot < kClockSlots; ++slot) {
    const u32 own_part = slot == w.index && mask != w.live;
    w.clock.fenced[slot] = std::max(w.clock.fenced[slot], w.clock.local[slot] - own_part);
  }
  ++w.clock.local[w.index];
}

const bool registered = [] {
  add_op("tensor_copy", tensor_copy);
  add_op("bulk_load", linear_load);
  add_op("bulk.commit_group", commit);
  add_op("bulk.wait_group", wait);
  add_op("fence.proxy.async", proxy_fence);
  return true;
}();

}  // namespace

// options.bulk_copy_timing: 0 as late as possible, 1 at random, 2 at once.
void land_some_bulk_copies(Block& b) {
  const u32 timing = b.grid->options.bulk_copy_timing;
  while (timing && !b.bulk_copies.empty() && (timing == 2 || (next_random(b.random) & 1))) {
    land(b, timing == 2 ? 0 : next_random(b.random) % b.bulk_copies.size());
  }
}

bool land_one_bulk_copy(Block& b) {
  if (b.bulk_copies.empty()) return false;
  land(b, 0);
  return true;
}

void check_exit(Warp& w) {
  if (w.grid->options.check_races && !w.copies.empty()) {
    report(w, Kind::kExitWithCopy, w.copies[0].instruction, lowest_lane(w.copies[0].mask), 0);
  }
  for (const BulkCopy& copy : w.block->bulk_copies) {
    if (copy.kind != BulkKind::kTensorStore || copy.warp != w.index) continue;
    report(w, Kind::kExitWithBulk, copy.instruction, copy.lane, copy.shared);
    break;
  }
  if (!w.wgmmas.empty()) report(w, Kind::kExitWithBulk, w.wgmmas[0].instruction, 0, 0);
  bool last = true;
  for (const auto& other : w.block->warps) last &= other->state == State::kDone;
  while (last && land_one_bulk_copy(*w.block)) {
  }
}

}  // namespace ptx
