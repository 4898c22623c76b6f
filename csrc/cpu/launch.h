// The CPU backend's launcher, and what may stand in for it in a test.
#pragma once

#include <string>
#include <vector>

#include "../cuda/split.h"
#include "../gemm_problem.h"

namespace rasa::cpu {

void launch(const Program& program);

// Which launcher `launch` is, process-wide, for tests:
//   tiles        the CPU backend
//   library      torch's own ops, which the CUDA backend has for float64 and float32 without TF32
//   verified     tiles, checked at first use as the CUDA kernels are
//   truncating   checked at first use too, but wrong: every reduction lacks its last product
//   truncating_tf32   the same, and float32 is checked as TF32
void set_launcher(const std::string& name);

// Until stop_recording(), programs run on the CPU backend, and the CUDA kernels that each would
// launch on a device, with TF32 allowed, are kept by name, in order, with ", split" where a launch
// stores partials. Process-wide, for tests.
void start_recording(const cuda::DeviceInfo& device);
std::vector<std::vector<std::string>> stop_recording();

}  // namespace rasa::cpu
