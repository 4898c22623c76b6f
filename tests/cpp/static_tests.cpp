// What the compiler can prove: this file compiles, or a statement below is false. It is never run.
// It is C++17 without torch, as kernels are, and so shows that the headers they share are too.
#include "gemm_problem.h"
#include "host_device.h"
#include "philox.h"

namespace rasa {

constexpr bool rounding_holds(int64_t limit) {
  for (int64_t b = 1; b <= limit; ++b) {
    for (int64_t a = 0; a <= limit; ++a) {
      const int64_t up = round_up(a, b);
      if (up % b != 0 || up < a || up - a >= b || ceil_div(a, b) * b != up) return false;
    }
  }
  return true;
}
static_assert(rounding_holds(64), "round_up is the smallest multiple that is not smaller");

static_assert(element_size(DType::kF64) == sizeof(double), "element sizes are those of the types");
static_assert(element_size(DType::kF32) == sizeof(float), "element sizes are those of the types");
static_assert(element_size(DType::kBF16) == 2 && element_size(DType::kF16) == 2,
              "both half types take two bytes");

static_assert(kDrawRange == 1u << 15, "a draw is 15 bits: p is rounded to a multiple of 2^-15");

}  // namespace rasa
