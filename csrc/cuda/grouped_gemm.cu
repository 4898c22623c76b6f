// The kernels that exist, in a table, and their launch. One file: a kernel that is a template can
// be named only where it is instantiated.
#include <atomic>
#include <utility>

#include "gemm_kernel_sm80.cuh"
#include "launch.h"
#include "reduce_kernel.cuh"

namespace rasa::cuda {
namespace {

using Kernel = const void*;  // kernels declare argument blocks of different sizes

struct ConfigKernels {
  Kernel plain, with_dropout;  // nullptr: there is none
};
constexpr int kNumEntries = kNumConfigs + 1;  // the tile shapes and kReduce
struct KernelTable {
  ConfigKernels configs[kNumEntries];
};

template <class Args>
Kernel address(void (*kernel)(Args)) {
  return reinterpret_cast<Kernel>(kernel);
}

template <class Element, ConfigId kId>
ConfigKernels config_kernels() {
  if constexpr (kId == ConfigId::kReduce) {
    return {address(reduce_partials<Element>), nullptr};
  } else if constexpr (has_dropout_kernel(kId)) {
    return {address(grouped_gemm_sm80<kId, Element, false>),
            address(grouped_gemm_sm80<kId, Element, true>)};
  } else {
    return {address(grouped_gemm_sm80<kId, Element, false>), nullptr};
  }
}

template <class Element, int... kIds>
KernelTable kernel_table(std::integer_sequence<int, kIds...>) {
  return {{config_kernels<Element, static_cast<ConfigId>(kIds)>()...}};
}

constexpr auto kAllConfigs = std::make_integer_sequence<int, kNumEntries>();
const KernelTable kBFloat16Kernels = kernel_table<__nv_bfloat16>(kAllConfigs);
const KernelTable kHalfKernels = kernel_table<__half>(kAllConfigs);

// Lets the kernel have its dynamic shared memory, once per device. Two threads may both do it.
cudaError_t allow_shared_memory(Kernel kernel, const Launch& launch, int device) {
  constexpr int kMaxDevices = 128;  // torch's limit
  static std::atomic<int32_t> allowed[kMaxDevices][2][kNumEntries][2];
  std::atomic<int32_t>& bytes = allowed[device][launch.element == DType::kBF16]
                                       [static_cast<int>(launch.config)][launch.has_dropout];
  if (bytes.load(std::memory_order_relaxed) >= launch.smem_bytes) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.smem_bytes);
  if (error == cudaSuccess) bytes.store(launch.smem_bytes, std::memory_order_relaxed);
  return error;
}

}  // namespace

cudaError_t launch(const Launch& launch, int device, cudaStream_t stream) {
  const KernelTable& table = launch.element == DType::kBF16 ? kBFloat16Kernels : kHalfKernels;
  const ConfigKernels& kernels = table.configs[static_cast<int>(launch.config)];
  const Kernel kernel = launch.has_dropout ? kernels.with_dropout : kernels.plain;
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  cudaError_t error = allow_shared_memory(kernel, launch, device);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<KernelArgs*>(launch.args.operator->())};
    error = cudaLaunchKernel(kernel, dim3(launch.grid), dim3(launch.threads), arguments,
                             launch.smem_bytes, stream);
  }
  const cudaError_t last = cudaGetLastError();  // and clears it: it is reported here
  return error == cudaSuccess ? last : error;
}

}  // namespace rasa::cuda
