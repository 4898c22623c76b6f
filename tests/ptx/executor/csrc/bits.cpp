// Shifts, bit fields, byte permutation, packing and unpacking of registers.
#include <algorithm>

#include "elementwise.h"

namespace ptx {
namespace {

template <class T>
void shift_left(Warp& w, const Op& op, u32 mask) {
  const T* a = reg<T>(w, op.arg[1]);
  const u32* by = reg<u32>(w, op.arg[2]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<T>(by[i] >= 8 * sizeof(T) ? 0 : a[i] << by[i]);
  });
}

template <class T>
void shift_right(Warp& w, const Op& op, u32 mask) {
  const T* a = reg<T>(w, op.arg[1]);
  const u32* by = reg<u32>(w, op.arg[2]);
  constexpr u32 kBits = 8 * sizeof(T);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) {
    if (by[i] >= kBits) return static_cast<T>(a[i] < 0 ? -1 : 0);
    return static_cast<T>(a[i] >> by[i]);
  });
}

// imm[0]: left; imm[1]: clamp the shift to 32 instead of wrapping it.
void funnel_shift(Warp& w, const Op& op, u32 mask) {
  const u32 *low = reg<u32>(w, op.arg[1]), *high = reg<u32>(w, op.arg[2]),
            *by = reg<u32>(w, op.arg[3]);
  const bool left = op.imm[0], clamp = op.imm[1];
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32 i) {
    const u32 n = clamp ? std::min(by[i], 32u) : by[i] & 31;
    const u64 both = static_cast<u64>(high[i]) << 32 | low[i];
    return static_cast<u32>(left ? both << n >> 32 : both >> n);
  });
}

// imm[0]: truth table, bit (4a + 2b + c).
void logic3(Warp& w, const Op& op, u32 mask) {
  const u32 *a = reg<u32>(w, op.arg[1]), *b = reg<u32>(w, op.arg[2]), *c = reg<u32>(w, op.arg[3]);
  const u32 table = op.imm[0];
  u32 row[8];
  for (u32 i = 0; i < 8; ++i) row[i] = table >> i & 1 ? ~0u : 0;
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32 i) {
    const u32 x = a[i], y = b[i], z = c[i];
    return (row[0] & ~x & ~y & ~z) | (row[1] & ~x & ~y & z) | (row[2] & ~x & y & ~z) |
           (row[3] & ~x & y & z) | (row[4] & x & ~y & ~z) | (row[5] & x & ~y & z) |
           (row[6] & x & y & ~z) | (row[7] & x & y & z);
  });
}

// Selector nibble: byte 0-3 of a, 4-7 of b; bit 3 replicates the byte's sign.
void permute_bytes(Warp& w, const Op& op, u32 mask) {
  const u32 *a = reg<u32>(w, op.arg[1]), *b = reg<u32>(w, op.arg[2]),
            *selector = reg<u32>(w, op.arg[3]);
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32 i) {
    const u64 both = static_cast<u64>(b[i]) << 32 | a[i];
    u32 result = 0;
    for (u32 k = 0; k < 4; ++k) {
      const u32 s = selector[i] >> 4 * k & 15;
      u32 byte = both >> 8 * (s & 7) & 255;
      if (s & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * k;
    }
    return result;
  });
}

template <class T>
void extract_field(Warp& w, const Op& op, u32 mask) {
  using U = std::make_unsigned_t<T>;
  constexpr u32 kBits = 8 * sizeof(T);
  const T* a = reg<T>(w, op.arg[1]);
  const u32 *position = reg<u32>(w, op.arg[2]), *length = reg<u32>(w, op.arg[3]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) -> T {
    const u32 p = position[i] & 255, n = length[i] & 255;
    if (n == 0) return 0;
    const U field = p >= kBits ? (a[i] < 0 ? ~U(0) : U(0)) : static_cast<U>(a[i] >> p);
    if (n >= kBits) return field;
    const U low = (U(1) << n) - 1;
    const bool sign =
        std::is_signed<T>::value && static_cast<U>(a[i]) >> std::min(p + n - 1, kBits - 1) & 1;
    return sign ? field | ~low : field & low;
  });
}

template <class T>
void insert_field(Warp& w, const Op& op, u32 mask) {
  constexpr u32 kBits = 8 * sizeof(T);
  const T *field = reg<T>(w, op.arg[1]), *into = reg<T>(w, op.arg[2]);
  const u32 *position = reg<u32>(w, op.arg[3]), *length = reg<u32>(w, op.arg[4]);
  for_elements<1>(reg<T>(w, op.arg[0]), mask, [=](u32 i) -> T {
    const u32 p = position[i] & 255, n = length[i] & 255;
    if (p >= kBits || n == 0) return into[i];
    const T low = n >= kBits ? ~T(0) : (T(1) << n) - 1;
    return (into[i] & ~(low << p)) | ((field[i] & low) << p);
  });
}

// Results are 32-bit whatever the operand's width.
template <class T, class F>
void bits_to_u32(Warp& w, const Op& op, u32 mask) {
  const T* a = reg<T>(w, op.arg[1]);
  for_elements<1>(reg<u32>(w, op.arg[0]), mask, [=](u32 i) { return F()(a[i]); });
}

// clang-format off
struct CountOnes { template <class T> u32 operator()(T x) const { return __builtin_popcountll(x); } };
struct LeadingZeros { template <class T> u32 operator()(T x) const { return x ? __builtin_clzll(x) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); } };
struct HighestBit { template <class T> u32 operator()(T x) const { return x ? 63 - __builtin_clzll(x) : ~0u; } };
struct HighestSignedBit { u32 operator()(s32 x) const { return HighestBit()(static_cast<u32>(x < 0 ? ~x : x)); } };
// clang-format on

struct ReverseBits {
  template <class T>
  T operator()(T x) const {
    T r = 0;
    for (u32 i = 0; i < 8 * sizeof(T); ++i) r |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
    return r;
  }
};

template <class Wide, class Part>
void pack(Warp& w, const Op& op, u32 mask) {
  const Part *low = reg<Part>(w, op.arg[1]), *high = reg<Part>(w, op.arg[2]);
  for_elements<1>(reg<Wide>(w, op.arg[0]), mask, [=](u32 i) {
    return static_cast<Wide>(low[i]) | static_cast<Wide>(high[i]) << 8 * sizeof(Part);
  });
}

template <class Wide, class Part>  // imm[0]: shift in bits
void unpack(Warp& w, const Op& op, u32 mask) {
  const Wide* a = reg<Wide>(w, op.arg[1]);
  const u32 shift = op.imm[0];
  for_elements<1>(reg<Part>(w, op.arg[0]), mask,
                  [=](u32 i) { return static_cast<Part>(a[i] >> shift); });
}

void pack4(Warp& w, const Op& op, u32 mask) {
  const u16* part[4];
  for (u32 k = 0; k < 4; ++k) part[k] = reg<u16>(w, op.arg[1 + k]);
  for_elements<1>(reg<u64>(w, op.arg[0]), mask, [=](u32 i) {
    u64 value = 0;
    for (u32 k = 0; k < 4; ++k) value |= static_cast<u64>(part[k][i]) << 16 * k;
    return value;
  });
}

template <class... T>
void add_shifts_and_fields(Types<T...>) {
  (add_op(std::string("shl.") + kTypeName<T>, shift_left<T>), ...);
  (add_op(std::string("shr.") + kTypeName<T>, shift_right<T>), ...);
}

const bool registered = [] {
  add_shifts_and_fields(IntegerTypes());
  add_op("shf", funnel_shift);
  add_op("lop3", logic3);
  add_op("prmt", permute_bytes);
  add_op("bfe.u32", extract_field<u32>);
  add_op("bfe.s32", extract_field<s32>);
  add_op("bfe.u64", extract_field<u64>);
  add_op("bfe.s64", extract_field<s64>);
  add_op("bfi.u32", insert_field<u32>);
  add_op("bfi.u64", insert_field<u64>);
  add_op("popc.u32", bits_to_u32<u32, CountOnes>);
  add_op("popc.u64", bits_to_u32<u64, CountOnes>);
  add_op("clz.u32", bits_to_u32<u32, LeadingZeros>);
  add_op("clz.u64", bits_to_u32<u64, LeadingZeros>);
  add_op("bfind.u32", bits_to_u32<u32, HighestBit>);
  add_op("bfind.u64", bits_to_u32<u64, HighestBit>);
  add_op("bfind.s32", bits_to_u32<s32, HighestSignedBit>);
  add_unary<ReverseBits>("brev", Types<u32, u64>());
  add_op("pack.u32.u16", pack<u32, u16>);
  add_op("pack.u64.u32", pack<u64, u32>);
  add_op("pack.u64.u16", pack4);
  add_op("unpack.u32.u16", unpack<u32, u16>);
  add_op("unpack.u64.u32", unpack<u64, u32>);
  add_op("unpack.u64.u16", unpack<u64, u16>);
  return true;
}();

}  // namespace
}  // namespace ptx
