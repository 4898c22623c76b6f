// The CPU launcher of gemm_problem.h.
#pragma once

#include "../gemm_problem.h"

namespace rasa::cpu {

void grouped_gemm(const Program& program);

}  // namespace rasa::cpu
