// Address resolution, loads and stores.
#include <algorithm>

#include "memory_access.h"

namespace ptx {

void resolve_addresses(Warp& w, const Op& op, u32 arg, u32 imm) {
  const u64 offset = op.imm[imm];
  if (op.imm[imm + 1] == 4) {
    const u32* base = reg<u32>(w, op.arg[arg]);
    for (u32 i = 0; i < kWarpSize; ++i) w.address[i] = static_cast<u32>(base[i] + offset);
  } else {
    const u64* base = reg<u64>(w, op.arg[arg]);
    for (u32 i = 0; i < kWarpSize; ++i) w.address[i] = base[i] + offset;
  }
}

u64 strip_shared_window(u64 address) {
  return (address & kWindowMask) == kSharedWindow ? address & ~kWindowMask : address;
}

u8* shared_bytes(Warp& w, u32 instruction, u32 lane, u64 address, u32 bytes, const char* what) {
  Block& b = *w.block;
  const u64 size = w.grid->shape.shared_bytes;
  if (address < kSharedBase || address + bytes > kSharedBase + size) {
    fail(w, Kind::kOutOfBounds, instruction, lane, address,
         "%s of %u bytes at shared offset %lld of a block with %llu bytes of shared memory", what,
         bytes, static_cast<long long>(address - kSharedBase),
         static_cast<unsigned long long>(size));
  }
  return b.shared.data() + (address - kSharedBase);
}

static bool contains(const GlobalBuffer& buffer, u64 address, u32 bytes) {
  return address - buffer.base < buffer.size && address - buffer.base + bytes <= buffer.size;
}

[[noreturn]] static void fail_outside_buffers(Warp& w, u32 instruction, u32 lane, u64 address,
                                              u32 bytes, const char* what) {
  const GlobalBuffer* nearest = nullptr;
  u64 best = 1ull << 32;
  for (const GlobalBuffer& buffer : w.grid->buffers) {
    const u64 distance = address < buffer.base ? buffer.base - address : address - buffer.base;
    if (distance < best) {
      best = distance;
      nearest = &buffer;
    }
  }
  if (!nearest) {
    fail(w, Kind::kOutOfBounds, instruction, lane, address,
         "%s of %u bytes at %#llx, which is in no buffer", what, bytes,
         static_cast<unsigned long long>(address));
  }
  fail(w, Kind::kOutOfBounds, instruction, lane, address,
       "%s of %u bytes at byte %lld of a buffer of %llu bytes", what, bytes,
       static_cast<long long>(address - nearest->base),
       static_cast<unsigned long long>(nearest->size));
}

GlobalBuffer& global_buffer(Warp& w, u32 instruction, u32 lane, u64 address, u32 bytes,
                            const char* what) {
  Grid& g = *w.grid;
  u32& last = g.last_buffer[instruction];
  if (last < g.buffers.size() && contains(g.buffers[last], address, bytes)) return g.buffers[last];
  const auto above =
      std::upper_bound(g.buffers.begin(), g.buffers.end(), address,
                       [](u64 a, const GlobalBuffer& buffer) { return a < buffer.base; });
  if (above != g.buffers.begin() && contains(above[-1], address, bytes)) {
    last = above - g.buffers.begin() - 1;
    return g.buffers[last];
  }
  fail_outside_buffers(w, instruction, lane, address, bytes, what);
}

static Space space_of(u64& address) {
  const u64 window = address & kWindowMask;
  if (window == 0) return Space::kGlobal;
  address &= ~kWindowMask;
  return window == kSharedWindow  ? Space::kShared
         : window == kLocalWindow ? Space::kLocal
                                  : Space::kParam;
}

Place resolve(Warp& w, u32 instruction, Space space, u32 lane, u32 bytes, const char* what) {
  u64 address = w.address[lane];
  if (space == Space::kGeneric) space = space_of(address);
  if (address & (bytes - 1)) {
    fail(w, Kind::kMisaligned, instruction, lane, address,
         "%s of %u bytes at an address that is %llu mod %u", what, bytes,
         static_cast<unsigned long long>(address & (bytes - 1)), bytes);
  }
  const Grid& g = *w.grid;
  switch (space) {
    case Space::kShared:
      return {shared_bytes(w, instruction, lane, address, bytes, what), space, address, nullptr};
    case Space::kLocal: {
      const u64 size = g.program->local_bytes;
      if (address + bytes > size) {
        fail(w, Kind::kOutOfBounds, instruction, lane, address,
             "%s of %u bytes at local offset %llu of %llu", what, bytes,
             static_cast<unsigned long long>(address), static_cast<unsigned long long>(size));
      }
      return {w.local.data() + lane * size + address, space, address, nullptr};
    }
    case Space::kParam: {
      const u64 offset = address & ~kWindowMask;
      if (offset + bytes > g.shape.param_bytes) {
        fail(w, Kind::kOutOfBounds, instruction, lane, offset,
             "%s of %u bytes at byte %llu of %llu bytes of arguments", what, bytes,
             static_cast<unsigned long long>(offset),
             static_cast<unsigned long long>(g.shape.param_bytes));
      }
      return {const_cast<u8*>(g.shape.params) + offset, space, offset, nullptr};
    }
    default:
      return {reinterpret_cast<u8*>(address), Space::kGlobal, address,
              &global_buffer(w, instruction, lane, address, bytes, what)};
  }
}

// Counts one access, whose lanes all lie in the space of the first.
void count_access(Warp& w, u32 instruction, Space space, u32 mask, u32 bytes) {
  if (!w.grid->options.count) return;
  u64 addresses[kWarpSize];
  memcpy(addresses, w.address, sizeof addresses);
  if (space == Space::kGeneric) {
    for (u64& address : addresses) space = space_of(address);
    u64 first = w.address[lowest_lane(mask)];
    space = space_of(first);
  }
  if (space == Space::kShared) count_shared(w, instruction, mask, bytes, addresses);
  if (space != Space::kGlobal) return;
  u32 sizes[kWarpSize];
  for (u32& size : sizes) size = bytes;
  count_global(w, instruction, mask, addresses, sizes);
}

void store_once(Warp& w, u32 instruction, u32 lane, GlobalBuffer& buffer, u64 address, u32 bytes) {
  if (buffer.stored.empty()) return;
  const u64 offset = address - buffer.base;
  bool again = false;
  for (u64 i = offset; i < offset + bytes; ++i) {
    again |= buffer.stored[i];
    buffer.stored[i] = 1;
  }
  if (again) report(w, Kind::kStoredTwice, instruction, lane, offset);
}

namespace {

struct Access {
  Space space;
  u32 element_bytes, num_elements, register_bytes;
  bool is_signed;
  Order order;
  bool gpu_scope;
  explicit Access(const s64* imm)
      : space(static_cast<Space>(imm[0])),
        element_bytes(imm[1]),
        num_elements(imm[2]),
        register_bytes(imm[3]),
        is_signed(imm[4]),
        order(static_cast<Order>(imm[5])),
        gpu_scope(imm[6]) {}
  u32 bytes() const { return element_bytes * num_elements; }
  bool strong() const { return order != Order::kWeak && gpu_scope; }
};

// imm: Access, then the address. arg: address base, destinations.
void load(Warp& w, const Op& op, u32 mask) {
  const Access access(op.imm);
  resolve_addresses(w, op, 0, 7);
  for_each_lane(mask, [&](u32 lane) {
    const Place place = resolve(w, op.instruction, access.space, lane, access.bytes(), "load");
    if (w.grid->options.check_races) {
      if (place.space == Space::kShared) {
        shared_read(w, lane, place.address - kSharedBase, access.bytes(), op.instruction);
      } else if (place.buffer) {
        if (access.strong()) acquire_at(w, lane, place.address, access.order == Order::kAcquire);
        global_read(w, lane, *place.buffer, place.address, access.bytes(), op.instruction,
                    access.strong());
      }
    }
    for (u32 v = 0; v < access.num_elements; ++v) {
      if (op.arg[1 + v] == kNoOperand) continue;
      u64 x = 0;
      memcpy(&x, place.bytes + v * access.element_bytes, access.element_bytes);
      const u32 up = 64 - 8 * access.element_bytes;
      if (access.is_signed) x = static_cast<u64>(static_cast<s64>(x << up) >> up);
      memcpy(reg<u8>(w, op.arg[1 + v]) + lane * access.register_bytes, &x, access.register_bytes);
    }
  });
  count_access(w, op.instruction, access.space, mask, access.bytes());
}

// imm: Access, then the address. arg: address base, sources.
void store(Warp& w, const Op& op, u32 mask) {
  const Access access(op.imm);
  resolve_addresses(w, op, 0, 7);
  ++w.block->progress;
  for_each_lane(mask, [&](u32 lane) {
    const Place place = resolve(w, op.instruction, access.space, lane, access.bytes(), "store");
    if (w.grid->options.check_races) {
      if (place.space == Space::kShared) {
        shared_write(w, lane, place.address - kSharedBase, access.bytes(), op.instruction);
      } else if (place.buffer) {
        global_write(w, lane, *place.buffer, place.address, access.bytes(), op.instruction,
                     access.strong());
        if (access.strong())
          release_at(w, lane, place.address, access.order == Order::kRelease, false);
      }
    }
    if (place.buffer)
      store_once(w, op.instruction, lane, *place.buffer, place.address, access.bytes());
    for (u32 v = 0; v < access.num_elements; ++v) {
      memcpy(place.bytes + v * access.element_bytes,
             reg<u8>(w, op.arg[1 + v]) + lane * access.register_bytes, access.element_bytes);
    }
  });
  count_access(w, op.instruction, access.space, mask, access.bytes());
}

// A parameter at a constant offset, the same for all lanes. arg: destination; imm: offset, bytes,
// register bytes, signed.
void load_parameter(Warp& w, const Op& op, u32 mask) {
  u64 x = 0;
  memcpy(&x, w.grid->shape.params + op.imm[0], op.imm[1]);
  const u32 up = 64 - 8 * op.imm[1];
  if (op.imm[3]) x = static_cast<u64>(static_cast<s64>(x << up) >> up);
  for_each_lane(mask,
                [&](u32 lane) { memcpy(reg<u8>(w, op.arg[0]) + lane * op.imm[2], &x, op.imm[2]); });
}

const bool registered = [] {
  add_op("ld", load);
  add_op("st", store);
  add_op("ld.param", load_parameter);
  return true;
}();

}  // namespace
}  // namespace ptx
