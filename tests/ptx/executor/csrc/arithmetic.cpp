// Integer and floating-point arithmetic, rounded to nearest even. Directed rounding is in
// rounding.cpp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "elementwise.h"

namespace ptx {
namespace {

// clang-format off
struct Add { template <class T> T operator()(T a, T b) const { return a + b; } };
struct Sub { template <class T> T operator()(T a, T b) const { return a - b; } };
struct Mul { template <class T> T operator()(T a, T b) const { return a * b; } };
struct MulAdd { template <class T> T operator()(T a, T b, T c) const { return a * b + c; } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
struct Not { template <class T> T operator()(T a) const { return ~a; } };
struct Negate { template <class T> T operator()(T a) const { return -a; } };
struct Absolute { template <class T> T operator()(T a) const { return a < 0 ? -a : a; } };
struct FloatAbsolute { template <class T> T operator()(T a) const { return std::abs(a); } };
struct Min { template <class T> T operator()(T a, T b) const { return a < b ? a : b; } };
struct Max { template <class T> T operator()(T a, T b) const { return a > b ? a : b; } };
struct Copy { template <class T> T operator()(T a) const { return a; } };
struct FloatDivide { template <class T> T operator()(T a, T b) const { return a / b; } };
// clang-format on

// min and max of floats: the operand that is a number, and -0 below +0.
struct FloatMin {
  template <class T>
  T operator()(T a, T b) const {
    return b != b || a < b || (a == b && std::signbit(a)) ? a : b;
  }
};
struct FloatMax {
  template <class T>
  T operator()(T a, T b) const {
    return b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
  }
};
struct NanMin {
  template <class T>
  T operator()(T a, T b) const {
    return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : FloatMin()(a, b);
  }
};
struct NanMax {
  template <class T>
  T operator()(T a, T b) const {
    return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : FloatMax()(a, b);
  }
};

template <class T>
bool is_minus_one(T b) {
  return std::is_signed<T>::value && b == static_cast<T>(-1);
}

// Division by zero gives all ones, its remainder the dividend, as in the hardware's emulation.
// Division by -1 is a negation, which wraps where the quotient would overflow.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T(0));
    if (is_minus_one(b)) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    return a / b;
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    return is_minus_one(b) ? 0 : a % b;
  }
};

struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return __builtin_fmaf(a, b, c); }
  double operator()(double a, double b, double c) const { return __builtin_fma(a, b, c); }
};
// The product of two 16-bit floats is exact in double.
struct HalfMultiplyAdd {
  double operator()(float a, float b, float c) const { return static_cast<double>(a) * b + c; }
};
struct HalfMultiplyAddRelu {
  double operator()(float a, float b, float c) const {
    const double x = static_cast<double>(a) * b + c;
    return x < 0 ? 0 : x;
  }
};

// High half of the product.
template <class T, class Wide>
void multiply_high(Warp& w, const Op& op, u32 mask) {
  const T *a = reg<T>(w, op.arg[1]), *b = reg<T>(w, op.arg[2]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<T>(static_cast<Wide>(a[i]) * static_cast<Wide>(b[i]) >> 8 * sizeof(T));
  });
}

template <class T, class Wide>
void multiply_add_high(Warp& w, const Op& op, u32 mask) {
  const T *a = reg<T>(w, op.arg[1]), *b = reg<T>(w, op.arg[2]), *c = reg<T>(w, op.arg[3]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<T>((static_cast<Wide>(a[i]) * static_cast<Wide>(b[i]) >> 8 * sizeof(T)) +
                          c[i]);
  });
}

template <class T, class Wide>
void multiply_wide(Warp& w, const Op& op, u32 mask) {
  const T *a = reg<T>(w, op.arg[1]), *b = reg<T>(w, op.arg[2]);
  for_elements<1>(reg<Wide>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<Wide>(static_cast<Wide>(a[i]) * static_cast<Wide>(b[i]));
  });
}

template <class T, class Wide>
void multiply_add_wide(Warp& w, const Op& op, u32 mask) {
  using Unsigned = std::make_unsigned_t<Wide>;
  const T *a = reg<T>(w, op.arg[1]), *b = reg<T>(w, op.arg[2]);
  const Unsigned* c = reg<Unsigned>(w, op.arg[3]);
  for_elements<1>(reg<Unsigned>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<Unsigned>(
        static_cast<Unsigned>(static_cast<Wide>(a[i]) * static_cast<Wide>(b[i])) + c[i]);
  });
}

template <class T, class Wide>
void add_products() {
  add_op(std::string("mul.hi.") + kTypeName<T>, multiply_high<T, Wide>);
  add_op(std::string("mad.hi.") + kTypeName<T>, multiply_add_high<T, Wide>);
  if constexpr (sizeof(T) < 8) {
    add_op(std::string("mul.wide.") + kTypeName<T>, multiply_wide<T, Wide>);
    add_op(std::string("mad.wide.") + kTypeName<T>, multiply_add_wide<T, Wide>);
  }
}

// Transcendental functions: computed in double and rounded once, where the hardware's .approx is
// off by a few ulps.
// clang-format off
struct Exp2 { double operator()(double x) const { return exp2(x); } };
struct Log2 { double operator()(double x) const { return log2(x); } };
struct Sine { double operator()(double x) const { return sin(x); } };
struct Cosine { double operator()(double x) const { return cos(x); } };
struct HyperbolicTangent { double operator()(double x) const { return tanh(x); } };
struct Reciprocal { double operator()(double x) const { return 1 / x; } };
struct SquareRoot { double operator()(double x) const { return sqrt(x); } };
struct ReciprocalRoot { double operator()(double x) const { return 1 / sqrt(x); } };
// clang-format on

// Keeps the sign of a subnormal element.
template <class T>
void flush_subnormals(Warp& w, const Op& op, u32 mask) {
  using Bits = std::conditional_t<sizeof(typename Type<T>::Element) == 4, u32, u16>;
  constexpr Bits kExponent = std::is_same<T, float>::value                         ? 0x7f800000
                             : std::is_same<typename Type<T>::Element, F16>::value ? 0x7c00
                                                                                   : 0x7f80;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits* a = reg<Bits>(w, op.arg[1]);
  for_elements<Type<T>::kPerLane>(reg<Bits>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<Bits>(a[i] & kExponent ? a[i] : a[i] & kSign);
  });
}

template <class... T>
void add_flush(Types<T...>) {
  (add_op(std::string("flush_subnormals.") + kTypeName<T>, flush_subnormals<T>), ...);
}

void saturate(Warp& w, const Op& op, u32 mask) {  // NaN gives +0
  const float* a = reg<float>(w, op.arg[1]);
  for_elements<1>(reg<float>(w, op.arg[0]), mask,
                  [=](u32 i) { return a[i] > 0.f ? std::min(a[i], 1.f) : 0.f; });
}

const bool registered = [] {
  using UnsignedAndFloat = Types<u16, u32, u64, float, double, F16, BF16, F16x2, BF16x2>;
  add_binary<Add>("add", UnsignedAndFloat());
  add_binary<Sub>("sub", UnsignedAndFloat());
  add_binary<Mul>("mul", UnsignedAndFloat());
  add_ternary<MulAdd>("mad", UnsignedTypes());
  add_ternary<FusedMultiplyAdd>("fma", FloatTypes());
  add_ternary<HalfMultiplyAdd>("fma", HalfTypes());
  add_ternary<HalfMultiplyAddRelu>("fma.relu", HalfTypes());
  add_binary<Divide>("div", IntegerTypes());
  add_binary<Remainder>("rem", IntegerTypes());
  add_binary<FloatDivide>("div", FloatTypes());
  add_binary<Min>("min", IntegerTypes());
  add_binary<Max>("max", IntegerTypes());
  add_binary<And>("and", UnsignedTypes());
  add_binary<Or>("or", UnsignedTypes());
  add_binary<Xor>("xor", UnsignedTypes());
  add_unary<Not>("not", UnsignedTypes());
  add_unary<Absolute>("abs", Types<s16, s32, s64>());
  add_unary<Copy>("mov", UnsignedTypes());
  using AllFloats = Types<float, double, F16, BF16, F16x2, BF16x2>;
  add_binary<FloatMin>("min", AllFloats());
  add_binary<FloatMax>("max", AllFloats());
  add_binary<NanMin>("min.NaN", AllFloats());
  add_binary<NanMax>("max.NaN", AllFloats());
  add_unary<Negate>("neg", Types<u16, u32, u64, float, double, F16, BF16, F16x2, BF16x2>());
  add_unary<FloatAbsolute>("abs", AllFloats());
  add_unary<Exp2>("ex2", Types<float, F16, BF16, F16x2, BF16x2>());
  add_unary<HyperbolicTangent>("tanh", Types<float, F16, BF16, F16x2, BF16x2>());
  add_unary<Log2>("lg2", Types<float>());
  add_unary<Sine>("sin", Types<float>());
  add_unary<Cosine>("cos", Types<float>());
  add_unary<Reciprocal>("rcp", FloatTypes());
  add_unary<SquareRoot>("sqrt", FloatTypes());
  add_unary<ReciprocalRoot>("rsqrt", FloatTypes());
  add_flush(Types<float, F16, BF16, F16x2, BF16x2>());
  add_op("saturate", saturate);
  add_products<u16, u32>();
  add_products<s16, s32>();
  add_products<u32, u64>();
  add_products<s32, s64>();
  add_products<u64, unsigned __int128>();
  add_products<s64, __int128>();
  return true;
}();

}  // namespace
}  // namespace ptx
