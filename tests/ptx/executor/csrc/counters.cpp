// Traffic: 32-byte sectors of global memory, per access and unique; wavefronts of shared memory
// against the ideal.
#include <algorithm>

#include "grid.h"

namespace ptx {
namespace {

constexpr u32 kSectorShift = 5, kNumBanks = 32;

// Marks a sector in the row of the instruction's source line and kind of access.
void touch(Grid& g, u32 instruction, u64 sector) {
  const s32 slot = g.program->line_slots[instruction];
  if (slot < 0) return;
  const u64 words = (g.num_sectors + 63) / 64;
  g.touched[slot * words + sector / 64] |= 1ull << sector % 64;
}

}  // namespace

// One access of a warp: the sectors its active lanes touch, each counted once. bytes[lane] may be
// 0.
void count_global(Warp& w, u32 instruction, u32 mask, const u64* addresses, const u32* bytes) {
  Grid& g = *w.grid;
  InstructionCount& count = g.counts[instruction];
  u64 seen[2 * kWarpSize];
  u32 num_seen = 0;
  for_each_lane(mask, [&](u32 lane) {
    if (!bytes[lane]) return;
    count.global_bytes += bytes[lane];
    const u64 last = (addresses[lane] + bytes[lane] - 1) >> kSectorShift;
    for (u64 sector = addresses[lane] >> kSectorShift; sector <= last; ++sector) {
      bool is_new = true;
      for (u32 i = num_seen; i-- > 0 && is_new;) is_new = seen[i] != sector;
      if (!is_new) continue;
      seen[num_seen++] = sector;
      const GlobalBuffer& buffer =
          global_buffer(w, instruction, lane, addresses[lane], bytes[lane], "access");
      touch(g, instruction, buffer.first_sector + sector - (buffer.base >> kSectorShift));
    }
  });
  ++count.global_requests;
  count.sectors += num_seen;
}

// A run of consecutive bytes moved by a bulk copy.
void count_global_run(Warp& w, u32 instruction, GlobalBuffer& buffer, u64 address, u32 bytes) {
  Grid& g = *w.grid;
  const u64 first = address >> kSectorShift, last = (address + bytes - 1) >> kSectorShift;
  g.counts[instruction].global_bytes += bytes;
  g.counts[instruction].sectors += last - first + 1;
  for (u64 s = first; s <= last; ++s)
    touch(g, instruction, buffer.first_sector + s - (buffer.base >> kSectorShift));
}

// Lanes are served 32 at a time for up to 4 bytes, 16 for 8, 8 for 16; each group takes as many
// wavefronts as its most loaded bank has different words. The ideal moves 32 words per wavefront.
void count_shared(Warp& w, u32 instruction, u32 mask, u32 bytes, const u64* addresses) {
  const u32 group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  u32 wavefronts = 0, words = 0;
  static u32 word_stamp[1 << 16], stamp = 0;
  const u32 access_stamp = ++stamp;
  for (u32 first = 0; first < kWarpSize; first += group) {
    const u32 lanes = mask & (group == 32 ? kFullMask : ((1u << group) - 1) << first);
    u8 load[kNumBanks] = {};
    u32 worst = 0;
    const u32 group_stamp = ++stamp;
    for_each_lane(lanes, [&](u32 lane) {
      for (u64 word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
        u32& seen = word_stamp[word & 0xffff];
        if (seen == group_stamp) continue;
        words += seen < access_stamp;
        seen = group_stamp;
        worst = std::max<u32>(worst, ++load[word % kNumBanks]);
      }
    });
    wavefronts += worst;
  }
  InstructionCount& count = w.grid->counts[instruction];
  ++count.shared_requests;
  count.shared_bytes += static_cast<u64>(bytes) * __builtin_popcount(mask);
  count.wavefronts += wavefronts;
  count.ideal_wavefronts += std::max(1u, (words + kNumBanks - 1) / kNumBanks);
}

u32 count_unique_sectors(const Grid& grid, const std::vector<u32>& slots) {
  const u64 words = (grid.num_sectors + 63) / 64;
  u32 total = 0;
  for (u64 i = 0; i < words; ++i) {
    u64 any = 0;
    for (u32 slot : slots) any |= grid.touched[slot * words + i];
    total += __builtin_popcountll(any);
  }
  return total;
}

}  // namespace ptx
