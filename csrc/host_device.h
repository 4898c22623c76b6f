// What host and device code share at the bottom: the function annotation and integer arithmetic.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RASA_HD __host__ __device__ __forceinline__
#else
#define RASA_HD inline
#endif

namespace rasa {

RASA_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RASA_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace rasa
