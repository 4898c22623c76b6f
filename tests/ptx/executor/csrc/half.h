// 16-bit floating-point elements: conversion to and from float, rounded to nearest even.
#pragma once
#include <math.h>

#include "machine.h"

namespace ptx {

struct F16 {
  u16 bits;
};
struct BF16 {
  u16 bits;
};

inline float to_float(BF16 x) {
  const u32 bits = static_cast<u32>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(F16 x) {
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
}

template <class H>
inline H narrow(float x);

template <>
inline BF16 narrow<BF16>(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  const u16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {(bits & 0x7fffffff) > 0x7f800000 ? u16{0x7fff} : rounded};  // the canonical NaN of cvt
}

template <>
inline F16 narrow<F16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  F16 r;
  memcpy(&r.bits, &h, 2);
  if (x != x) r.bits = 0x7fff;
  return r;
}

// Rounds to odd on the way, so that the second rounding sees that the first was inexact.
template <class H>
inline H narrow(double x) {
  float f = static_cast<float>(x);
  u32 bits;
  memcpy(&bits, &f, 4);
  if (x == x && fabs(x) < 3.0e38 && static_cast<double>(f) != x) {
    if (fabs(static_cast<double>(f)) > fabs(x)) --bits;
    bits |= 1;
    memcpy(&f, &bits, 4);
  }
  return narrow<H>(f);
}

}  // namespace ptx
