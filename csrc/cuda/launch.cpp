// One launch of a plan: shared memory, argument block, stream. Host code without torch.
#include "launch.h"

#include <atomic>

namespace rasa::cuda {
namespace {

// Lets the kernel have its dynamic shared memory, once per device. Two threads may both do it.
cudaError_t allow_shared_memory(const void* kernel, const Launch& launch, int device) {
  constexpr int kMaxDevices = 128;  // torch's limit
  constexpr int kElements = 4;      // values of DType
  static std::atomic<int32_t> allowed[kMaxDevices][kElements][kNumKernels][2];
  std::atomic<int32_t>& bytes = allowed[device][static_cast<int>(launch.element)]
                                       [static_cast<int>(launch.config)][launch.has_dropout];
  if (bytes.load(std::memory_order_relaxed) >= launch.smem_bytes) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.smem_bytes);
  if (error == cudaSuccess) bytes.store(launch.smem_bytes, std::memory_order_relaxed);
  return error;
}

}  // namespace

cudaError_t launch(const Launch& launch, int device, cudaStream_t stream) {
  const void* kernel = find_kernel(launch);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  cudaError_t error = allow_shared_memory(kernel, launch, device);
  if (error == cudaSuccess) {
    const KernelArgs* block = launch.args.operator->();
    void* arguments[] = {const_cast<KernelArgs*>(block)};
    error = cudaLaunchKernel(kernel, dim3(launch.grid), dim3(launch.threads), arguments,
                             launch.smem_bytes, stream);
  }
  const cudaError_t last = cudaGetLastError();  // and clears it: it is reported here
  return error == cudaSuccess ? last : error;
}

}  // namespace rasa::cuda
