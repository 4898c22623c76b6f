// Reporting: one finding per kind and pair of instructions, with the first occurrence's thread and
// address.
#include <stdio.h>

#include "grid.h"

namespace ptx {

u32 thread_of(const Warp& w, u32 lane) { return w.index * kWarpSize + lane; }

static Finding make_finding(const Warp& w, Kind kind, s32 instruction, u32 lane, u64 address) {
  Finding f{};
  f.kind = static_cast<s32>(kind);
  f.instruction = instruction;
  f.other_instruction = -1;
  f.block = w.block->linear;
  f.thread = thread_of(w, lane);
  f.other_thread = f.other_block = kNobody;
  f.address = address;
  f.count = 1;
  return f;
}

void report(Warp& w, Kind kind, u32 instruction, u32 lane, u64 address, s32 other_instruction,
            u32 other_thread, u32 other_block, const char* message) {
  Grid& g = *w.grid;
  u32 same_kind = 0;
  for (Finding& f : g.findings) {
    same_kind += f.kind == static_cast<s32>(kind);
    if (f.kind == static_cast<s32>(kind) && f.instruction == static_cast<s32>(instruction) &&
        f.other_instruction == other_instruction) {
      ++f.count;
      return;
    }
  }
  if (same_kind >= g.options.max_findings) return;
  Finding f = make_finding(w, kind, instruction, lane, address);
  f.other_instruction = other_instruction;
  f.other_thread = other_thread;
  f.other_block = other_block;
  snprintf(f.message, sizeof f.message, "%s", message);
  g.findings.push_back(f);
}

void fail(Warp& w, Kind kind, s32 instruction, u32 lane, u64 address, const char* format, ...) {
  Fatal fatal{make_finding(w, kind, instruction, lane, address)};
  va_list args;
  va_start(args, format);
  vsnprintf(fatal.finding.message, sizeof fatal.finding.message, format, args);
  va_end(args);
  throw fatal;
}

void require_full_warp(Warp& w, const Op& op, u32 mask, const char* what) {
  if (mask == kFullMask) return;
  fail(w, Kind::kDivergent, op.instruction, lowest_lane(~mask), 0,
       "%s executed without all 32 lanes (mask %08x)", what, mask);
}

}  // namespace ptx
