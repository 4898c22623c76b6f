// Floating-point arithmetic in a stated rounding direction. Compiled with -frounding-math.
#include <fenv.h>

#include "elementwise.h"

namespace ptx {
namespace {

class RoundingScope {
 public:
  explicit RoundingScope(int direction) { fesetround(direction); }
  ~RoundingScope() { fesetround(FE_TONEAREST); }
};

// clang-format off
struct Add { template <class T> static T apply(T a, T b, T) { return a + b; } };
struct Sub { template <class T> static T apply(T a, T b, T) { return a - b; } };
struct Mul { template <class T> static T apply(T a, T b, T) { return a * b; } };
struct Div { template <class T> static T apply(T a, T b, T) { return a / b; } };
struct Fma {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct Sqrt { template <class T> static T apply(T a, T, T) { return sqrt(a); } };
struct Rcp { template <class T> static T apply(T a, T, T) { return T(1) / a; } };
// clang-format on

template <class T, class F, int kDirection, int kArity>
void rounded(Warp& w, const Op& op, u32 mask) {
  const T* a = reg<T>(w, op.arg[1]);
  const T* b = reg<T>(w, op.arg[kArity > 1 ? 2 : 1]);
  const T* c = reg<T>(w, op.arg[kArity > 2 ? 3 : 1]);
  T* d = reg<T>(w, op.arg[0]);
  const RoundingScope scope(kDirection);
  for_each_lane(mask, [&](u32 lane) {
    const volatile T result = F::apply(a[lane], b[lane], c[lane]);
    d[lane] = result;
  });
}

template <class F, int kArity>
void add_directions(const std::string& name) {
  add_op(name + ".rz.f32", rounded<float, F, FE_TOWARDZERO, kArity>);
  add_op(name + ".rm.f32", rounded<float, F, FE_DOWNWARD, kArity>);
  add_op(name + ".rp.f32", rounded<float, F, FE_UPWARD, kArity>);
  add_op(name + ".rz.f64", rounded<double, F, FE_TOWARDZERO, kArity>);
  add_op(name + ".rm.f64", rounded<double, F, FE_DOWNWARD, kArity>);
  add_op(name + ".rp.f64", rounded<double, F, FE_UPWARD, kArity>);
}

template <class Wide, int kDirection>
void integer_to_float(Warp& w, const Op& op, u32 mask) {
  const Wide* a = reg<Wide>(w, op.arg[1]);
  float* d = reg<float>(w, op.arg[0]);
  const RoundingScope scope(kDirection);
  for_each_lane(mask, [&](u32 lane) {
    const volatile float result = static_cast<float>(a[lane]);
    d[lane] = result;
  });
}

const bool registered = [] {
  add_directions<Add, 2>("add");
  add_directions<Sub, 2>("sub");
  add_directions<Mul, 2>("mul");
  add_directions<Div, 2>("div");
  add_directions<Fma, 3>("fma");
  add_directions<Sqrt, 1>("sqrt");
  add_directions<Rcp, 1>("rcp");
  add_op("cvt.rz.f32.u32", integer_to_float<u32, FE_TOWARDZERO>);
  add_op("cvt.rz.f32.s32", integer_to_float<s32, FE_TOWARDZERO>);
  add_op("cvt.rm.f32.u32", integer_to_float<u32, FE_DOWNWARD>);
  add_op("cvt.rm.f32.s32", integer_to_float<s32, FE_DOWNWARD>);
  add_op("cvt.rp.f32.u32", integer_to_float<u32, FE_UPWARD>);
  add_op("cvt.rp.f32.s32", integer_to_float<s32, FE_UPWARD>);
  return true;
}();

}  // namespace
}  // namespace ptx
