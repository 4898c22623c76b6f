// What the .cu files offer to register_cuda.cpp: launches that do not know torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../dropout_mask.h"
#include "plan.h"

namespace rasa::cuda {

constexpr int kNumKernels = kNumConfigs + 1;  // for each element: the tile shapes and kReduce

// nullptr: there is none.
const void* find_kernel(const Launch& launch);

// On the current device, which is `device`; the error, if any, is the caller's to report. Neither
// allocates nor waits, so both may be captured in a CUDA graph.
cudaError_t launch(const Launch& launch, int device, cudaStream_t stream);
cudaError_t draw_mask(const MaskArgs& args, cudaStream_t stream);

}  // namespace rasa::cuda
