// What loads, stores and atomics share.
#pragma once
#include "grid.h"

namespace ptx {

enum class Order : u32 { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };

struct Place {
  u8* bytes;
  Space space;
  u64 address;           // within the space
  GlobalBuffer* buffer;  // of a global address
};

// Checks alignment and bounds of one lane's access at w.address[lane].
Place resolve(Warp& w, u32 instruction, Space space, u32 lane, u32 bytes, const char* what);
void count_access(Warp& w, u32 instruction, Space space, u32 mask, u32 bytes);
// Notes a store to an output whose bytes must be stored exactly once.
void store_once(Warp& w, u32 instruction, u32 lane, GlobalBuffer& buffer, u64 address, u32 bytes);

}  // namespace ptx
