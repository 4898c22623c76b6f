// Arguments by value, calls that are not inlined, constant and local memory.
#include <stdint.h>

struct Problem {
  const float* x;
  float* y;
  int32_t n, step;
  float factor[4];
};
struct Arguments {
  Problem problems[818];
  int32_t num_problems, unused[9];
};
static_assert(sizeof(Problem) == 40 && sizeof(Arguments) == 32760, "what one launch can take");

// One block per problem; the problem's fields are indexed dynamically in parameter space.
extern "C" __global__ void scale_problems(const __grid_constant__ Arguments arguments) {
  const Problem& p = arguments.problems[blockIdx.x];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.y[i * p.step] = p.x[i] * p.factor[i & 3];
}

extern "C" __global__ void read_past_arguments(const __grid_constant__ Arguments arguments) {
  arguments.problems[0].y[0] = arguments.problems[arguments.num_problems].factor[0];
}

__device__ __noinline__ float horner(float x, int degree, const float* coefficients) {
  float sum = 0;
  for (int i = degree; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}
__device__ __noinline__ float twice(float x, const float* coefficients) {
  return horner(x, 2, coefficients) + horner(-x, 2, coefficients);
}

extern "C" __global__ void call_functions(const float* x, const float* coefficients, float* y) {
  const int i = threadIdx.x;
  y[i] = x[i] > 0 ? twice(x[i], coefficients) : horner(x[i], 1, coefficients);
}

extern "C" __global__ void check_assertion(const int* x) {
  if (x[threadIdx.x] < 0) __trap();
}

__constant__ float table[8] = {1, 2, 3, 4, 5, 6, 7, 8};
__device__ int launches = 3;

extern "C" __global__ void look_up(const uint32_t* x, float* y, int* count) {
  uint32_t local[8];
  const uint32_t v = x[threadIdx.x];
  for (int k = 0; k < 8; ++k) local[k] = __funnelshift_l(v, v, k);
  y[threadIdx.x] = table[v & 7] + local[v >> 5 & 7];
  if (threadIdx.x == 0) *count = atomicAdd(&launches, 1);
}
