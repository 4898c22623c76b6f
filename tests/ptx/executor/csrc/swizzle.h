// The shared-memory swizzles of TMA and wgmma: bits of the row index exchange 16-byte chunks.
#pragma once
#include "machine.h"

namespace ptx {

enum class Swizzle : u32 { kNone, k32B, k64B, k128B };

inline u32 swizzle_address(u32 address, Swizzle mode) {
  switch (mode) {
    case Swizzle::k128B:
      return address ^ (address >> 7 & 7) << 4;
    case Swizzle::k64B:
      return address ^ (address >> 7 & 3) << 4;
    case Swizzle::k32B:
      return address ^ (address >> 7 & 1) << 4;
    case Swizzle::kNone:
      return address;
  }
  return address;
}

}  // namespace ptx
