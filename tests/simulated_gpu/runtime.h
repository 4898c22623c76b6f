// What the parts of the simulated CUDA runtime share.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>

namespace simulated {

// Does `work` now, or, on a stream that is being captured, when its graph is launched; notes it in
// the log. The stream must be one of the current device.
cudaError_t enqueue(cudaStream_t stream, const std::string& what,
                    std::function<cudaError_t()> work);

}  // namespace simulated
