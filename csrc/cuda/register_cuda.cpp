// The CUDA backend: programs of 16-bit dtypes run on the kernels; so do those of float32 where
// torch allows TF32, and those that ask for full precision; others on the library. The only file
// that sees torch and CUDA.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/version.h>

#include <array>
#include <atomic>

#include "../first_use.h"
#include "../library_gemm.h"
#include "../register_backend.h"
#include "f32_kernels.h"
#include "kernel_names.h"
#include "launch.h"

namespace rasa::cuda {
namespace {

constexpr int kMaxDevices = 128;  // torch's limit

at::Device current_device() { return {at::kCUDA, c10::cuda::current_device()}; }

using KnownValues = std::array<std::atomic<int32_t>, kMaxDevices>;

int attribute(cudaDeviceAttr name, KnownValues& known, at::Device device) {
  int value = known[device.index()].load(std::memory_order_relaxed);
  if (value == 0) {
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device.index()));
    known[device.index()].store(value, std::memory_order_relaxed);
  }
  return value;
}

DeviceInfo device_info(at::Device device) {
  static KnownValues num_sms = {}, smem_bytes = {};
  return {attribute(cudaDevAttrMultiProcessorCount, num_sms, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, smem_bytes, device)};
}

void check_launch(cudaError_t error, const std::string& what, at::Device device) {
  TORCH_CHECK(error == cudaSuccess, "rasa_ext: ", what, " could not be launched on ", device, ": ",
              cudaGetErrorString(error),
              error == cudaErrorNoKernelImageForDevice
                  ? ". rasa_ext.build_info() lists the architectures that were built: set "
                    "TORCH_CUDA_ARCH_LIST to this device's and install rasa_ext again"
                  : "");
}

void draw_mask_on_current_stream(const MaskArgs& args) {
  check_launch(draw_mask(args, c10::cuda::getCurrentCUDAStream()), "dropout_mask",
               current_device());
}

GroupPlan plan_group(const Program& program, const Group& group, at::Device device) {
  try {
    return plan(program, group, device_info(device));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK(false, "rasa_ext on CUDA: ", error.what());
  }
}

void run_kernels(const Program& program) {
  const at::Device device = current_device();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  for (const Group& group : program.groups) {
    GroupPlan group_plan = plan_group(program, group, device);
    // Freed to the stream's pool on return, for whoever comes next on this stream.
    at::Tensor workspace;  // aligned to 512 bytes by the allocator
    if (group_plan.workspace_bytes > 0) {
      workspace =
          at::empty({group_plan.workspace_bytes}, at::TensorOptions(device).dtype(at::kByte));
    }
    for (Launch& l : group_plan.launches) {
      l.args->workspace = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
      check_launch(launch(l, device.index(), stream),
                   "kernel " + kernel_name(l.config, l.element, l.has_dropout), device);
    }
  }
}

std::string name_kernels(const Program& program) {
  std::string names = "kernel";
  for (const std::string& name : kernel_names(program, device_info(current_device()))) {
    names += " " + name + ";";
  }
  names.pop_back();
  return names;
}

// As torch decides for its own products.
bool allows_tf32() {
  if (at::NoTF32Guard::should_disable_tf32()) return false;
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
#else
  return at::globalContext().float32Precision("cuda", "matmul") == "tf32";
#endif
}

// What the check of these products at their first use found wrong.
std::string first_use_failure(Products products, at::Device device) {
  static FirstUse first_use(run_kernels, name_kernels);
  if (first_use.is_checked(products, device)) return "";
  cudaStreamCaptureStatus capture;
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(), &capture));
  TORCH_CHECK(capture == cudaStreamCaptureStatusNone,
              "rasa_ext: the kernels are checked at their first use on a device, which cannot be "
              "captured in a CUDA graph: run the ops once, in the dtype of the graph, before the "
              "capture");
  return first_use.failure(products, device);
}

// Whether the kernels compute it. Wrong ones are an error in 16 bits, where there is nothing else,
// and a warning in float32, which the library computes too.
bool uses_kernels(const Program& program, at::Device device) {
  const bool is_f32 = program.dtype == DType::kF32;
  if (program.dtype == DType::kF64 || (is_f32 && !has_f32_kernels(program, allows_tf32()))) {
    return false;
  }
  const std::string failure = first_use_failure(products_of(program, is_f32), device);
  TORCH_CHECK(is_f32 || failure.empty(), failure);
  if (failure.empty()) return true;
  TORCH_WARN_ONCE(failure);
  return false;
}

void launch_on_current_stream(const Program& program) {
  const at::Device device = current_device();
  if (uses_kernels(program, device)) {
    run_kernels(program);
  } else {
    library_gemm(program, device, draw_mask_on_current_stream);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, CUDA, m) {
  register_backend<launch_on_current_stream, draw_mask_on_current_stream>(m);
}

}  // namespace rasa::cuda
