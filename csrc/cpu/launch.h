// The CPU backend's launcher, and what may stand in for it in a test.
#pragma once

#include <string>

#include "../gemm_problem.h"

namespace rasa::cpu {

void launch(const Program& program);

// Which launcher `launch` is, process-wide, for tests:
//   tiles        the CPU backend
//   library      torch's own ops, which the CUDA backend has for float64 and where TF32 is not
//   allowed verified     tiles, checked at first use as the CUDA kernels are truncating   checked
//   at first use too, but wrong: every reduction lacks its last product truncating_tf32   the same,
//   with float32 checked as TF32
void set_launcher(const std::string& name);

}  // namespace rasa::cpu
