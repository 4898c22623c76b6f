// Any program of gemm_problem.h in torch's own ops, on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include "dropout_mask.h"
#include "gemm_problem.h"

namespace rasa {

// The program's memory is on `device`, where draw_mask draws too. Sums are kept in float32, in
// float64 for F64. A result of that dtype that has no scale_m or dropout of its own is
// summed where it lies; others pass through a temporary of their size. Dropout costs a mask and a
// masked copy.
void library_gemm(const Program& program, at::Device device, DrawMaskFn draw_mask);

}  // namespace rasa
