// setp, set, selp, slct and logic on predicates.
#include "elementwise.h"

namespace ptx {
namespace {

// clang-format off
struct Eq { template <class T> bool operator()(T a, T b) const { return a == b; } };
struct Ne { template <class T> bool operator()(T a, T b) const { return a < b || a > b; } };
struct Lt { template <class T> bool operator()(T a, T b) const { return a < b; } };
struct Le { template <class T> bool operator()(T a, T b) const { return a <= b; } };
struct Gt { template <class T> bool operator()(T a, T b) const { return a > b; } };
struct Ge { template <class T> bool operator()(T a, T b) const { return a >= b; } };
// The unordered forms hold when an operand is NaN.
struct Equ { template <class T> bool operator()(T a, T b) const { return !(a < b || a > b); } };
struct Neu { template <class T> bool operator()(T a, T b) const { return a != b; } };
struct Ltu { template <class T> bool operator()(T a, T b) const { return !(a >= b); } };
struct Leu { template <class T> bool operator()(T a, T b) const { return !(a > b); } };
struct Gtu { template <class T> bool operator()(T a, T b) const { return !(a <= b); } };
struct Geu { template <class T> bool operator()(T a, T b) const { return !(a < b); } };
struct Num { template <class T> bool operator()(T a, T b) const { return a == a && b == b; } };
struct Nan { template <class T> bool operator()(T a, T b) const { return a != a || b != b; } };
// clang-format on

enum class Combine : s64 { kNone, kAnd, kOr, kXor };

u32 combine(u32 lanes, Combine how, u32 with) {
  switch (how) {
    case Combine::kAnd:
      return lanes & with;
    case Combine::kOr:
      return lanes | with;
    case Combine::kXor:
      return lanes ^ with;
    case Combine::kNone:
      return lanes;
  }
  return lanes;
}

template <class T, class F>
u32 compare_lanes(Warp& w, const Op& op, u32 a_arg, u32 half) {
  using E = typename Type<T>::Element;
  constexpr u32 kPerLane = Type<T>::kPerLane;
  const E *a = reg<E>(w, op.arg[a_arg]), *b = reg<E>(w, op.arg[a_arg + 1]);
  u32 lanes = 0;
  for (u32 lane = 0; lane < kWarpSize; ++lane) {
    const u32 i = lane * kPerLane + half;
    lanes |= static_cast<u32>(F()(Type<T>::widen(a[i]), Type<T>::widen(b[i]))) << lane;
  }
  return lanes;
}

// arg: p, q, a, b, c. Scalar: p = cmp, q = !cmp. Packed: p from the low halves, q from the high
// ones. imm[0]: Combine.
template <class T, class F>
void set_predicates(Warp& w, const Op& op, u32 mask) {
  const Combine how = static_cast<Combine>(op.imm[0]);
  const u32 with = how == Combine::kNone ? 0 : predicate(w, op.arg[4]);
  const u32 first = compare_lanes<T, F>(w, op, 2, 0);
  const u32 second = Type<T>::kPerLane == 2 ? compare_lanes<T, F>(w, op, 2, 1) : ~first;
  set_predicate(w, op.arg[0], combine(first, how, with), mask);
  set_predicate(w, op.arg[1], combine(second, how, with), mask);
}

// set: arg d, a, b. imm[0]: the bits of true, for one element of d. False is 0.
template <class T, class F, class D>
void set_value(Warp& w, const Op& op, u32 mask) {
  using E = typename Type<T>::Element;
  const E *a = reg<E>(w, op.arg[1]), *b = reg<E>(w, op.arg[2]);
  const D truth = static_cast<D>(op.imm[0]);
  for_elements<Type<T>::kPerLane>(reg<D>(w, op.arg[0]), mask, [=](u32 i) {
    return F()(Type<T>::widen(a[i]), Type<T>::widen(b[i])) ? truth : D(0);
  });
}

template <class F, class... T>
void add_comparison(const std::string& name, Types<T...>) {
  (add_op("setp." + name + "." + kTypeName<T>, set_predicates<T, F>), ...);
}

template <class F, class... T>
void add_set(const std::string& name, Types<T...>) {
  (add_op("set." + name + ".b32." + kTypeName<T>, set_value<T, F, u32>), ...);
}

template <class F, class... T>
void add_half_set(const std::string& name, Types<T...>) {
  (add_op("set." + name + ".b16." + kTypeName<T>, set_value<T, F, u16>), ...);
}

template <class F>
void add_ordered(const std::string& name) {
  add_comparison<F>(name, IntegerTypes());
  add_comparison<F>(name, Types<float, double, F16, BF16, F16x2, BF16x2>());
  add_set<F>(name, Types<u32, s32, float, F16, BF16>());
  add_half_set<F>(name, HalfTypes());
}

template <class F>
void add_unordered(const std::string& name) {
  add_comparison<F>(name, Types<float, double, F16, BF16, F16x2, BF16x2>());
  add_set<F>(name, Types<float, F16, BF16>());
  add_half_set<F>(name, HalfTypes());
}

template <class T>
void select_by_predicate(Warp& w, const Op& op, u32 mask) {
  const T *a = reg<T>(w, op.arg[1]), *b = reg<T>(w, op.arg[2]);
  const u32 p = predicate(w, op.arg[3]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) { return p >> i & 1 ? a[i] : b[i]; });
}

template <class T, class C>
void select_by_sign(Warp& w, const Op& op, u32 mask) {
  const T *a = reg<T>(w, op.arg[1]), *b = reg<T>(w, op.arg[2]);
  const C* c = reg<C>(w, op.arg[3]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) { return c[i] >= 0 ? a[i] : b[i]; });
}

void and_predicate(Warp& w, const Op& op, u32 mask) {
  set_predicate(w, op.arg[0], predicate(w, op.arg[1]) & predicate(w, op.arg[2]), mask);
}
void or_predicate(Warp& w, const Op& op, u32 mask) {
  set_predicate(w, op.arg[0], predicate(w, op.arg[1]) | predicate(w, op.arg[2]), mask);
}
void xor_predicate(Warp& w, const Op& op, u32 mask) {
  set_predicate(w, op.arg[0], predicate(w, op.arg[1]) ^ predicate(w, op.arg[2]), mask);
}
void not_predicate(Warp& w, const Op& op, u32 mask) {
  set_predicate(w, op.arg[0], ~predicate(w, op.arg[1]), mask);
}
void move_predicate(Warp& w, const Op& op, u32 mask) {
  set_predicate(w, op.arg[0], predicate(w, op.arg[1]), mask);
}

const bool registered = [] {
  add_ordered<Eq>("eq");
  add_ordered<Ne>("ne");
  add_ordered<Lt>("lt");
  add_ordered<Le>("le");
  add_ordered<Gt>("gt");
  add_ordered<Ge>("ge");
  add_unordered<Equ>("equ");
  add_unordered<Neu>("neu");
  add_unordered<Ltu>("ltu");
  add_unordered<Leu>("leu");
  add_unordered<Gtu>("gtu");
  add_unordered<Geu>("geu");
  add_unordered<Num>("num");
  add_unordered<Nan>("nan");
  add_op("selp.u16", select_by_predicate<u16>);
  add_op("selp.u32", select_by_predicate<u32>);
  add_op("selp.u64", select_by_predicate<u64>);
  add_op("slct.u32.s32", select_by_sign<u32, s32>);
  add_op("slct.u64.s32", select_by_sign<u64, s32>);
  add_op("slct.u32.f32", select_by_sign<u32, float>);
  add_op("slct.u64.f32", select_by_sign<u64, float>);
  add_op("and.pred", and_predicate);
  add_op("or.pred", or_predicate);
  add_op("xor.pred", xor_predicate);
  add_op("not.pred", not_predicate);
  add_op("mov.pred", move_predicate);
  return true;
}();

}  // namespace
}  // namespace ptx
