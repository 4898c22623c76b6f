// csrc/cuda/launch.cpp on a CUDA runtime of four functions that note what they are called with.
#include "cuda/launch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

constexpr size_t kNotedBytes = 256;
std::vector<unsigned char> noted_args;
dim3 noted_grid, noted_block;
size_t noted_smem;
cudaStream_t noted_stream;
const void* noted_kernel;
int num_attributes = 0, num_launches = 0;
cudaError_t next_error = cudaSuccess, last_error = cudaSuccess;
const char kKernel = 0;

}  // namespace

extern "C" {

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int) {
  check(kernel == &kKernel, "the attribute is of the kernel");
  check(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize, "it is of shared memory");
  ++num_attributes;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t smem,
                             cudaStream_t stream) {
  const auto* bytes = static_cast<const unsigned char*>(args[0]);
  noted_args.assign(bytes, bytes + kNotedBytes);
  noted_kernel = kernel;
  noted_grid = grid;
  noted_block = block;
  noted_smem = smem;
  noted_stream = stream;
  ++num_launches;
  last_error = next_error;
  return next_error;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

}  // extern "C"

namespace rasa::cuda {
const void* find_kernel(const Launch& launch) {
  return launch.config == ConfigId::kReduce ? nullptr : &kKernel;
}
}  // namespace rasa::cuda

int main() {
  using namespace rasa;
  using namespace rasa::cuda;
  static float memory[64 * 64];
  Program program = {};
  program.dtype = program.scale_dtype = DType::kBF16;
  program.groups = {{Layout::kNN, 0, 1}};
  program.blocks.assign(3, Block{memory, 64, 64});
  Problem problem;
  problem.M = problem.N = 64;
  problem.num_segments = 1;
  problem.C = {2, 1, DType::kBF16};
  program.problems = {problem};
  Segment segment;
  segment.A = {0, 1, DType::kBF16};
  segment.B = {1, 1, DType::kBF16};
  segment.K = 64;
  program.segments = {segment};

  DeviceInfo device = {};
  device.num_sms = 108;
  device.smem_bytes = 163 * 1024;
  GroupPlan planned = plan(program, program.groups[0], device);
  check(planned.launches.size() == 1, "one problem is one launch");
  Launch& l = planned.launches[0];
  l.args->workspace = memory;
  const auto stream = reinterpret_cast<cudaStream_t>(memory + 1);

  check(launch(l, 0, stream) == cudaSuccess, "a launch succeeds");
  check(noted_kernel == &kKernel && noted_stream == stream, "it is of its kernel, on its stream");
  check(noted_grid.x == static_cast<unsigned>(l.grid), "it has the plan's grid");
  check(noted_block.x == static_cast<unsigned>(l.threads), "it has the plan's threads");
  check(noted_smem == static_cast<size_t>(l.smem_bytes), "it has the plan's shared memory");
  check(l.args.num_bytes() >= kNotedBytes &&
            std::memcmp(noted_args.data(), l.args.operator->(), kNotedBytes) == 0,
        "the argument is the plan's block");

  check(launch(l, 0, stream) == cudaSuccess && launch(l, 1, stream) == cudaSuccess, "again");
  check(num_launches == 3 && num_attributes == 2, "shared memory is allowed once per device");

  next_error = cudaErrorInvalidConfiguration;
  check(launch(l, 0, stream) == cudaErrorInvalidConfiguration, "an error is returned");
  check(last_error == cudaSuccess, "and is not left behind");
  l.config = ConfigId::kReduce;
  check(launch(l, 0, stream) == cudaErrorInvalidDeviceFunction, "no kernel is an error");
  std::puts("launches: passed");
}
