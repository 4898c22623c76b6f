// Warp-wide instructions on registers: shuffles, votes, matches, reductions. The scheduler has
// gathered their lanes.
#include <algorithm>

#include "grid.h"

namespace ptx {
namespace {

enum class Shuffle : s64 { kUp, kDown, kButterfly, kIndex };

// The lane that `lane` reads, or -1 where it lies outside its segment. c: clamp in bits 0-4,
// segment mask in bits 8-12.
s32 source_lane(Shuffle mode, s32 lane, s32 b, u32 c) {
  const s32 clamp = c & 31, segment = c >> 8 & 31;
  const s32 last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  s32 source = lane;
  switch (mode) {
    case Shuffle::kUp:
      source = lane - b;
      return source >= last ? source : -1;
    case Shuffle::kDown:
      source = lane + b;
      break;
    case Shuffle::kButterfly:
      source = lane ^ b;
      break;
    case Shuffle::kIndex:
      source = first | (b & ~segment);
      break;
  }
  return source <= last ? source : -1;
}

void require_member(Warp& w, const Op& op, u32 mask, const u32* members, const char* what) {
  for_each_lane(mask, [&](u32 lane) {
    if (members[lane] >> lane & 1) return;
    fail(w, Kind::kMisuse, op.instruction, lane, 0,
         "%s by a lane that its member mask %08x leaves out", what, members[lane]);
  });
}

// arg: d, p, a, b, c, members. imm[0]: Shuffle.
void shuffle(Warp& w, const Op& op, u32 mask) {
  const u32 *a = reg<u32>(w, op.arg[2]), *b = reg<u32>(w, op.arg[3]), *c = reg<u32>(w, op.arg[4]);
  require_member(w, op, mask, reg<u32>(w, op.arg[5]), "shfl.sync");
  u32 result[kWarpSize], in_range = 0;
  for_each_lane(mask, [&](u32 lane) {
    s32 source = source_lane(static_cast<Shuffle>(op.imm[0]), lane, b[lane] & 31, c[lane]);
    if (source >= 0) in_range |= 1u << lane;
    if (source < 0) source = lane;
    if (!(mask >> source & 1)) {
      report(w, Kind::kMisuse, op.instruction, lane, 0, -1, thread_of(w, source), kNobody,
             "shfl.sync reads a lane that takes no part");
    }
    result[lane] = a[source];
  });
  for_each_lane(mask, [&](u32 lane) { reg<u32>(w, op.arg[0])[lane] = result[lane]; });
  set_predicate(w, op.arg[1], in_range, mask);
}

enum class Vote : s64 { kAll, kAny, kUniform, kBallot };

// arg: d, predicate, members. imm[0]: Vote.
void vote(Warp& w, const Op& op, u32 mask) {
  const u32 yes = predicate(w, op.arg[1]) & mask;
  require_member(w, op, mask, reg<u32>(w, op.arg[2]), "vote.sync");
  switch (static_cast<Vote>(op.imm[0])) {
    case Vote::kAll:
      return set_predicate(w, op.arg[0], yes == mask ? ~0u : 0, mask);
    case Vote::kAny:
      return set_predicate(w, op.arg[0], yes ? ~0u : 0, mask);
    case Vote::kUniform:
      return set_predicate(w, op.arg[0], !yes || yes == mask ? ~0u : 0, mask);
    case Vote::kBallot:
      for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32) { return yes; });
  }
}

enum class Reduction : s64 { kAdd, kMinU, kMaxU, kMinS, kMaxS, kAnd, kOr, kXor };

u32 reduce(Reduction how, u32 a, u32 b) {
  const s32 x = a, y = b;
  switch (how) {
    case Reduction::kAdd:
      return a + b;
    case Reduction::kMinU:
      return std::min(a, b);
    case Reduction::kMaxU:
      return std::max(a, b);
    case Reduction::kMinS:
      return std::min(x, y);
    case Reduction::kMaxS:
      return std::max(x, y);
    case Reduction::kAnd:
      return a & b;
    case Reduction::kOr:
      return a | b;
    case Reduction::kXor:
      return a ^ b;
  }
  return a;
}

// arg: d, a, members. imm[0]: Reduction.
void reduce_lanes(Warp& w, const Op& op, u32 mask) {
  const u32* a = reg<u32>(w, op.arg[1]);
  require_member(w, op, mask, reg<u32>(w, op.arg[2]), "redux.sync");
  u32 result = a[lowest_lane(mask)];
  for_each_lane(mask & (mask - 1), [&](u32 lane) {
    result = reduce(static_cast<Reduction>(op.imm[0]), result, a[lane]);
  });
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32) { return result; });
}

// arg: d, a, members.
template <class T>
void match_any(Warp& w, const Op& op, u32 mask) {
  const T* a = reg<T>(w, op.arg[1]);
  require_member(w, op, mask, reg<u32>(w, op.arg[2]), "match.sync");
  u32 result[kWarpSize] = {};
  for_each_lane(mask, [&](u32 lane) {
    for_each_lane(
        mask, [&](u32 other) { result[lane] |= static_cast<u32>(a[other] == a[lane]) << other; });
  });
  for_each_lane(mask, [&](u32 lane) { reg<u32>(w, op.arg[0])[lane] = result[lane]; });
}

// arg: d, p.
void elect(Warp& w, const Op& op, u32 mask) {
  const u32 leader = lowest_lane(mask);
  if (op.arg[0] != kNoOperand)
    for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32) { return leader; });
  set_predicate(w, op.arg[1], 1u << leader, mask);
}

void active_mask(Warp& w, const Op& op, u32 mask) {
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32) { return mask; });
}

void synchronise_warp(Warp& w, const Op&, u32) { ++w.epoch; }

void trap(Warp& w, const Op& op, u32 mask) {
  fail(w, Kind::kMisuse, op.instruction, lowest_lane(mask), 0,
       "trap (a failed assertion or __trap)");
}

const bool registered = [] {
  add_op("shfl", shuffle);
  add_op("vote", vote);
  add_op("redux", reduce_lanes);
  add_op("match.any.u32", match_any<u32>);
  add_op("match.any.u64", match_any<u64>);
  add_op("elect", elect);
  add_op("activemask", active_mask);
  add_op("bar.warp", synchronise_warp);
  add_op("trap", trap);
  return true;
}();

}  // namespace
}  // namespace ptx
