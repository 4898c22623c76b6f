// cvt, and moves between state spaces of addresses.

#include "elementwise.h"

namespace ptx {
namespace {

// Sign- or zero-extends the low `bits` of x to 64.
inline u64 extend(u64 x, u32 bits, bool is_signed) {
  const u32 up = 64 - bits;
  return is_signed ? static_cast<u64>(static_cast<s64>(x << up) >> up) : x << up >> up;
}

// imm: source bits, source signed, destination bits, destination signed. A register may be wider
// than its type.
template <class D, class S>
void integer_to_integer(Warp& w, const Op& op, u32 mask) {
  const S* a = reg<S>(w, op.arg[1]);
  const u32 source_bits = op.imm[0], target_bits = op.imm[2];
  const bool source_signed = op.imm[1], target_signed = op.imm[3];
  for_elements<1>(reg<D>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<D>(
        extend(extend(a[i], source_bits, source_signed), target_bits, target_signed));
  });
}

// imm: source bits, source signed.
template <class F, class S>
void integer_to_float(Warp& w, const Op& op, u32 mask) {
  using E = typename Type<F>::Element;
  const S* a = reg<S>(w, op.arg[1]);
  const u32 bits = op.imm[0];
  const bool is_signed = op.imm[1];
  using Wide = typename Type<F>::Wide;
  for_elements<1>(reg<E>(w, op.arg[0]), mask, [=](u32 i) {
    const u64 x = extend(a[i], bits, is_signed);
    return Type<F>::from(is_signed ? static_cast<Wide>(static_cast<s64>(x)) : static_cast<Wide>(x));
  });
}

enum class ToInteger : s64 { kNearest, kZero, kDown, kUp };

inline double round_to_integer(double x, ToInteger how) {
  switch (how) {
    case ToInteger::kNearest:
      return rint(x);
    case ToInteger::kZero:
      return trunc(x);
    case ToInteger::kDown:
      return floor(x);
    case ToInteger::kUp:
      return ceil(x);
  }
  return x;
}

// Clamps to the destination's range; NaN gives 0. imm: rounding, destination bits, destination
// signed.
template <class D, class F>
void float_to_integer(Warp& w, const Op& op, u32 mask) {
  using E = typename Type<F>::Element;
  const E* a = reg<E>(w, op.arg[1]);
  D* d = reg<D>(w, op.arg[0]);
  const ToInteger how = static_cast<ToInteger>(op.imm[0]);
  const u32 bits = op.imm[1];
  const bool is_signed = op.imm[2];
  const double low = is_signed ? -ldexp(1.0, bits - 1) : 0,
               above = ldexp(1.0, is_signed ? bits - 1 : bits);
  const u64 top = ~0ull >> (64 - bits + is_signed);
  for_each_lane(mask, [&](u32 lane) {
    const double x = round_to_integer(Type<F>::widen(a[lane]), how);
    if (x != x)
      d[lane] = 0;
    else if (x >= above)
      d[lane] = static_cast<D>(top);
    else if (x <= low)
      d[lane] = static_cast<D>(is_signed ? ~top : 0);
    else
      d[lane] =
          static_cast<D>(is_signed ? static_cast<u64>(static_cast<s64>(x)) : static_cast<u64>(x));
  });
}

template <class F>  // imm[0]: ToInteger
void round_float(Warp& w, const Op& op, u32 mask) {
  const F* a = reg<F>(w, op.arg[1]);
  const ToInteger how = static_cast<ToInteger>(op.imm[0]);
  for_elements<1>(reg<F>(w, op.arg[0]), mask,
                  [=](u32 i) { return static_cast<F>(round_to_integer(a[i], how)); });
}

template <class D, class S>
void float_to_float(Warp& w, const Op& op, u32 mask) {
  using DE = typename Type<D>::Element;
  using SE = typename Type<S>::Element;
  const SE* a = reg<SE>(w, op.arg[1]);
  for_elements<1>(reg<DE>(w, op.arg[0]), mask,
                  [=](u32 i) { return Type<D>::from(Type<S>::widen(a[i])); });
}

template <class H>
void float_to_half_relu(Warp& w, const Op& op, u32 mask) {
  const float* a = reg<float>(w, op.arg[1]);
  for_elements<1>(reg<H>(w, op.arg[0]), mask,
                  [=](u32 i) { return narrow<H>(a[i] < 0 ? 0.f : a[i]); });
}

// d = {high: arg[1], low: arg[2]}; imm[0]: relu
template <class H>
void floats_to_packed(Warp& w, const Op& op, u32 mask) {
  const float *high = reg<float>(w, op.arg[1]), *low = reg<float>(w, op.arg[2]);
  const bool relu = op.imm[0];
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32 i) {
    const float h = relu && high[i] < 0 ? 0.f : high[i], l = relu && low[i] < 0 ? 0.f : low[i];
    return static_cast<u32>(narrow<H>(h).bits) << 16 | narrow<H>(l).bits;
  });
}

// imm[0]: 1 rounds ties away from zero (rna), 0 to even (rn).
void float_to_tf32(Warp& w, const Op& op, u32 mask) {
  const u32* a = reg<u32>(w, op.arg[1]);
  const bool away = op.imm[0];
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32 i) {
    if ((a[i] & 0x7f800000) == 0x7f800000) return a[i];
    return (a[i] + (away ? 0x1000 : 0xfff + (a[i] >> 13 & 1))) & 0xffffe000;
  });
}

// cvta: imm[0]: window to add; imm[1]: 1 takes the window off instead.
void convert_address(Warp& w, const Op& op, u32 mask) {
  const u64* a = reg<u64>(w, op.arg[1]);
  const u64 window = op.imm[0];
  const bool to_space = op.imm[1];
  for_elements<1>(reg<u64>(w, op.arg[0]), mask, [=](u32 i) {
    return !window ? a[i] : to_space ? a[i] & ~kWindowMask : a[i] | window;
  });
}

template <class S>
void add_from_integer(const std::string& suffix) {
  add_op("cvt.int.b16." + suffix, integer_to_integer<u16, S>);
  add_op("cvt.int.b32." + suffix, integer_to_integer<u32, S>);
  add_op("cvt.int.b64." + suffix, integer_to_integer<u64, S>);
  add_op("cvt.f32." + suffix, integer_to_float<float, S>);
  add_op("cvt.f64." + suffix, integer_to_float<double, S>);
  add_op("cvt.f16." + suffix, integer_to_float<F16, S>);
  add_op("cvt.bf16." + suffix, integer_to_float<BF16, S>);
}

template <class F>
void add_from_float() {
  const std::string suffix = kTypeName<F>;
  add_op("cvt.int.b16." + suffix, float_to_integer<u16, F>);
  add_op("cvt.int.b32." + suffix, float_to_integer<u32, F>);
  add_op("cvt.int.b64." + suffix, float_to_integer<u64, F>);
}

template <class D, class S>
void add_float_to_float() {
  add_op(std::string("cvt.") + kTypeName<D> + "." + kTypeName<S>, float_to_float<D, S>);
}

const bool registered = [] {
  add_from_integer<u16>("b16");
  add_from_integer<u32>("b32");
  add_from_integer<u64>("b64");
  add_from_float<float>();
  add_from_float<double>();
  add_from_float<F16>();
  add_from_float<BF16>();
  add_float_to_float<float, double>();
  add_float_to_float<double, float>();
  add_float_to_float<float, F16>();
  add_float_to_float<float, BF16>();
  add_float_to_float<F16, float>();
  add_float_to_float<BF16, float>();
  add_float_to_float<F16, double>();
  add_float_to_float<BF16, double>();
  add_op("cvt.relu.f16.f32", float_to_half_relu<F16>);
  add_op("cvt.relu.bf16.f32", float_to_half_relu<BF16>);
  add_op("cvt.f16x2.f32", floats_to_packed<F16>);
  add_op("cvt.bf16x2.f32", floats_to_packed<BF16>);
  add_op("cvt.round.f32", round_float<float>);
  add_op("cvt.round.f64", round_float<double>);
  add_op("cvt.tf32.f32", float_to_tf32);
  add_op("cvta", convert_address);
  return true;
}();

}  // namespace
}  // namespace ptx
