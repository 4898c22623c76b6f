// cp.async: the bytes arrive at the wait; until then their destination holds poison.
#include <algorithm>

#include "grid.h"

namespace ptx {
namespace {

void issue_lane(Warp& w, CopyAsync& copy, u32 lane) {
  const u64 target = copy.target[lane], source = copy.source[lane];
  const u32 bytes = copy.bytes, source_bytes = copy.source_bytes[lane];
  if (source_bytes > bytes) {
    fail(w, Kind::kMisuse, copy.instruction, lane, source_bytes,
         "cp.async source size %u exceeds %u", source_bytes, bytes);
  }
  const bool target_bad = target & (bytes - 1);
  if (target_bad || (source_bytes && (source & (bytes - 1)))) {
    fail(w, Kind::kMisaligned, copy.instruction, lane, target_bad ? target : source,
         "cp.async of %u bytes: %s address is not aligned", bytes,
         target_bad ? "destination" : "source");
  }
  u8* p = shared_bytes(w, copy.instruction, lane, target, bytes, "cp.async");
  const Options& options = w.grid->options;
  if (source_bytes) {
    GlobalBuffer& buffer =
        global_buffer(w, copy.instruction, lane, source, source_bytes, "cp.async read");
    if (options.check_races)
      global_read(w, lane, buffer, source, source_bytes, copy.instruction, false);
  }
  if (options.check_races)
    shared_copy_issue(w, lane, target - kSharedBase, bytes, copy.instruction);
  if (options.poison) memset(p, 0xff, bytes);
}

// imm: bytes, destination offset, destination base bytes, source offset. arg: destination, source,
// source size or none. A lane whose ignore-src predicate holds copies nothing: arg[3].
void issue(Warp& w, const Op& op, u32 mask) {
  CopyAsync copy{};
  copy.mask = mask;
  copy.instruction = op.instruction;
  copy.bytes = op.imm[0];
  resolve_addresses(w, op, 0, 1);
  const u64* source = reg<u64>(w, op.arg[1]);
  const u32* size = op.arg[2] == kNoOperand ? nullptr : reg<u32>(w, op.arg[2]);
  const u32 ignored = op.arg[3] == kNoOperand ? 0 : predicate(w, op.arg[3]);
  for_each_lane(mask, [&](u32 lane) {
    copy.target[lane] = w.address[lane];
    copy.source[lane] = source[lane] + op.imm[3];
    copy.source_bytes[lane] = ignored >> lane & 1 ? 0 : size ? size[lane] : copy.bytes;
    copy.group[lane] = w.copies_committed[lane] + 1;
    issue_lane(w, copy, lane);
  });
  if (w.grid->options.count) {
    count_shared(w, op.instruction, mask, copy.bytes, w.address);
    count_global(w, op.instruction, mask, copy.source.data(), copy.source_bytes.data());
  }
  w.copies.push_back(copy);
}

void commit(Warp& w, const Op&, u32 mask) {
  for_each_lane(mask, [&](u32 lane) { ++w.copies_committed[lane]; });
}

void land_lane(Warp& w, CopyAsync& copy, u32 lane) {
  u8* p = shared_bytes(w, copy.instruction, lane, copy.target[lane], copy.bytes, "cp.async");
  const u32 source_bytes = copy.source_bytes[lane];
  if (source_bytes) memcpy(p, reinterpret_cast<const void*>(copy.source[lane]), source_bytes);
  memset(p + source_bytes, 0, copy.bytes - source_bytes);
  if (w.grid->options.check_races) {
    shared_copy_land(w, lane, copy.target[lane] - kSharedBase, copy.bytes, copy.instruction);
  }
  copy.mask &= ~(1u << lane);
}

// imm[0]: groups that may stay in flight; -1: none, committed or not.
void wait(Warp& w, const Op& op, u32 mask) {
  const s64 pending = op.imm[0];
  for (CopyAsync& copy : w.copies) {
    for_each_lane(copy.mask & mask, [&](u32 lane) {
      const bool done =
          pending < 0 || copy.group[lane] <= static_cast<s64>(w.copies_committed[lane]) - pending;
      if (done) land_lane(w, copy, lane);
    });
  }
  const auto landed = [](const CopyAsync& copy) { return copy.mask == 0; };
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), landed), w.copies.end());
}

const bool registered = [] {
  add_op("cp.async", issue);
  add_op("cp.async.commit_group", commit);
  add_op("cp.async.wait_group", wait);
  return true;
}();

}  // namespace
}  // namespace ptx
