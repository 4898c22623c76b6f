// Instructions that work lane by lane: one template per arity, registered once per type.
#pragma once
#include <type_traits>

#include "half.h"

namespace ptx {

// A packed 16-bit type is its element type with two elements per lane.
struct F16x2 {
  using Element = F16;
};
struct BF16x2 {
  using Element = BF16;
};

// Element: as stored. Wide: what the operation computes in.
template <class T>
struct Type {
  using Element = T;
  using Wide = T;
  static constexpr u32 kPerLane = 1;
  static Wide widen(Element x) { return x; }
  template <class R>
  static Element from(R x) {
    return static_cast<Element>(x);
  }
};

template <class H, u32 kElements>
struct HalfType {
  using Element = H;
  using Wide = float;
  static constexpr u32 kPerLane = kElements;
  static float widen(H x) { return to_float(x); }
  static H from(float x) { return narrow<H>(x); }
  static H from(double x) { return narrow<H>(x); }
};

template <>
struct Type<F16> : HalfType<F16, 1> {};
template <>
struct Type<BF16> : HalfType<BF16, 1> {};
template <>
struct Type<F16x2> : HalfType<F16, 2> {};
template <>
struct Type<BF16x2> : HalfType<BF16, 2> {};

// clang-format off
template <class T> constexpr const char* kTypeName = nullptr;
template <> inline constexpr const char* kTypeName<u16> = "u16";
template <> inline constexpr const char* kTypeName<s16> = "s16";
template <> inline constexpr const char* kTypeName<u32> = "u32";
template <> inline constexpr const char* kTypeName<s32> = "s32";
template <> inline constexpr const char* kTypeName<u64> = "u64";
template <> inline constexpr const char* kTypeName<s64> = "s64";
template <> inline constexpr const char* kTypeName<float> = "f32";
template <> inline constexpr const char* kTypeName<double> = "f64";
template <> inline constexpr const char* kTypeName<F16> = "f16";
template <> inline constexpr const char* kTypeName<BF16> = "bf16";
template <> inline constexpr const char* kTypeName<F16x2> = "f16x2";
template <> inline constexpr const char* kTypeName<BF16x2> = "bf16x2";
// clang-format on

template <class... T>
struct Types {};
using UnsignedTypes = Types<u16, u32, u64>;
using IntegerTypes = Types<u16, s16, u32, s32, u64, s64>;
using FloatTypes = Types<float, double>;
using HalfTypes = Types<F16, BF16, F16x2, BF16x2>;

template <class T, class F>
void unary(Warp& w, const Op& op, u32 mask) {
  using E = typename Type<T>::Element;
  const E* a = reg<E>(w, op.arg[1]);
  for_elements<Type<T>::kPerLane>(reg<E>(w, op.arg[0]), mask,
                                  [=](u32 i) { return Type<T>::from(F()(Type<T>::widen(a[i]))); });
}

template <class T, class F>
void binary(Warp& w, const Op& op, u32 mask) {
  using E = typename Type<T>::Element;
  const E *a = reg<E>(w, op.arg[1]), *b = reg<E>(w, op.arg[2]);
  for_elements<Type<T>::kPerLane>(reg<E>(w, op.arg[0]), mask, [=](u32 i) {
    return Type<T>::from(F()(Type<T>::widen(a[i]), Type<T>::widen(b[i])));
  });
}

template <class T, class F>
void ternary(Warp& w, const Op& op, u32 mask) {
  using E = typename Type<T>::Element;
  const E *a = reg<E>(w, op.arg[1]), *b = reg<E>(w, op.arg[2]), *c = reg<E>(w, op.arg[3]);
  for_elements<Type<T>::kPerLane>(reg<E>(w, op.arg[0]), mask, [=](u32 i) {
    return Type<T>::from(F()(Type<T>::widen(a[i]), Type<T>::widen(b[i]), Type<T>::widen(c[i])));
  });
}

template <class F, class... T>
void add_unary(const std::string& name, Types<T...>) {
  (add_op(name + "." + kTypeName<T>, unary<T, F>), ...);
}
template <class F, class... T>
void add_binary(const std::string& name, Types<T...>) {
  (add_op(name + "." + kTypeName<T>, binary<T, F>), ...);
}
template <class F, class... T>
void add_ternary(const std::string& name, Types<T...>) {
  (add_op(name + "." + kTypeName<T>, ternary<T, F>), ...);
}

}  // namespace ptx
