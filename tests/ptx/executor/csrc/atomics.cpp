// atom and red on shared and global memory.
#include <algorithm>

#include "half.h"
#include "memory_access.h"

namespace ptx {
namespace {

// Mirrored by memory.py.
enum class Action : s64 {
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kExchange,
  kCompareAndSwap,
  kIncrement,
  kDecrement
};

template <class T>
T apply_integer(Action action, T old, T b, T c) {
  using U = std::make_unsigned_t<T>;
  switch (action) {
    case Action::kAdd:
      return static_cast<T>(static_cast<U>(old) + static_cast<U>(b));
    case Action::kMin:
      return std::min(old, b);
    case Action::kMax:
      return std::max(old, b);
    case Action::kAnd:
      return old & b;
    case Action::kOr:
      return old | b;
    case Action::kXor:
      return old ^ b;
    case Action::kExchange:
      return b;
    case Action::kCompareAndSwap:
      return old == b ? c : old;
    case Action::kIncrement:
      return old >= b ? 0 : old + 1;
    case Action::kDecrement:
      return old == 0 || old > b ? b : old - 1;
  }
  return old;
}

template <class F>
F apply_float(Action action, F old, F b) {
  return action == Action::kAdd   ? old + b
         : action == Action::kMin ? std::min(old, b)
                                  : std::max(old, b);
}

template <class T>
void integer_atomic(u8* p, Action action, const u8* b, const u8* c, u8* result) {
  T old, operand, other = 0;
  memcpy(&old, p, sizeof old);
  memcpy(&operand, b, sizeof operand);
  if (c) memcpy(&other, c, sizeof other);
  const T value = apply_integer(action, old, operand, other);
  memcpy(p, &value, sizeof value);
  memcpy(result, &old, sizeof old);
}

template <class F>
void float_atomic(u8* p, Action action, const u8* b, const u8*, u8* result) {
  F old, operand;
  memcpy(&old, p, sizeof old);
  memcpy(&operand, b, sizeof operand);
  const F value = apply_float(action, old, operand);
  memcpy(p, &value, sizeof value);
  memcpy(result, &old, sizeof old);
}

template <class H, u32 kElements>
void half_atomic(u8* p, Action action, const u8* b, const u8*, u8* result) {
  for (u32 i = 0; i < kElements; ++i) {
    H old, operand;
    memcpy(&old, p + 2 * i, 2);
    memcpy(&operand, b + 2 * i, 2);
    const H value = narrow<H>(apply_float(action, to_float(old), to_float(operand)));
    memcpy(p + 2 * i, &value, 2);
    memcpy(result + 2 * i, &old, 2);
  }
}

using AtomicFn = void (*)(u8* p, Action action, const u8* b, const u8* c, u8* result);

void check_atomic(Warp& w, u32 lane, const Place& place, u32 bytes, u32 instruction, Order order,
                  bool gpu_scope, bool returns) {
  if (place.space == Space::kShared) {
    shared_atomic(w, lane, place.address - kSharedBase, bytes, instruction);
  } else if (place.buffer) {
    const bool acquire = order == Order::kAcquire || order == Order::kAcquireRelease;
    const bool release = order == Order::kRelease || order == Order::kAcquireRelease;
    if (gpu_scope && (returns || acquire)) acquire_at(w, lane, place.address, acquire);
    global_write(w, lane, *place.buffer, place.address, bytes, instruction, gpu_scope);
    if (gpu_scope) release_at(w, lane, place.address, release, true);
  }
}

// imm: space, action, elements, returns, order, gpu scope, address offset, base bytes.
// arg: address base, third operand (cas), then sources, then destinations (if it returns).
template <AtomicFn kApply, u32 kBytes>
void atomic(Warp& w, const Op& op, u32 mask) {
  const Space space = static_cast<Space>(op.imm[0]);
  const Action action = static_cast<Action>(op.imm[1]);
  const u32 num_elements = op.imm[2], bytes = kBytes * num_elements;
  const bool returns = op.imm[3], gpu_scope = op.imm[5];
  const Order order = static_cast<Order>(op.imm[4]);
  resolve_addresses(w, op, 0, 6);
  ++w.block->progress;
  for_each_lane(mask, [&](u32 lane) {
    const Place place = resolve(w, op.instruction, space, lane, bytes, "atomic");
    if (w.grid->options.check_races) {
      check_atomic(w, lane, place, bytes, op.instruction, order, gpu_scope, returns);
    }
    for (u32 v = 0; v < num_elements; ++v) {
      u8 old[8];
      const u8* c = op.arg[1] == kNoOperand ? nullptr : reg<u8>(w, op.arg[1]) + lane * kBytes;
      kApply(place.bytes + v * kBytes, action, reg<u8>(w, op.arg[2 + v]) + lane * kBytes, c, old);
      const u32 target = returns ? op.arg[2 + num_elements + v] : kNoOperand;
      if (target != kNoOperand) memcpy(reg<u8>(w, target) + lane * kBytes, old, kBytes);
    }
  });
  count_access(w, op.instruction, space, mask, bytes);
}

const bool registered = [] {
  add_op("atom.u16", atomic<integer_atomic<u16>, 2>);
  add_op("atom.u32", atomic<integer_atomic<u32>, 4>);
  add_op("atom.s32", atomic<integer_atomic<s32>, 4>);
  add_op("atom.u64", atomic<integer_atomic<u64>, 8>);
  add_op("atom.s64", atomic<integer_atomic<s64>, 8>);
  add_op("atom.f32", atomic<float_atomic<float>, 4>);
  add_op("atom.f64", atomic<float_atomic<double>, 8>);
  add_op("atom.f16", atomic<half_atomic<F16, 1>, 2>);
  add_op("atom.bf16", atomic<half_atomic<BF16, 1>, 2>);
  add_op("atom.f16x2", atomic<half_atomic<F16, 2>, 4>);
  add_op("atom.bf16x2", atomic<half_atomic<BF16, 2>, 4>);
  return true;
}();

}  // namespace
}  // namespace ptx
