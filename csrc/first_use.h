// Refuses a launcher that computes wrong numbers on this machine, at its first use.
//
// A GPU is where this package cannot be tested by those who build it, so it tests itself there: the
// first program of a dtype on a device is preceded by small programs of every form, whose results
// are compared with the same programs in float64 on the CPU. It costs some tenths of a second once
// per process, device and dtype. A launcher that fails stays refused for the life of the process.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "gemm_problem.h"

namespace rasa {

// Names what runs a program, for the message.
using NameKernelsFn = std::function<std::string(const Program&)>;

class FirstUse {
 public:
  FirstUse(LaunchFn launch, NameKernelsFn name_kernels)
      : launch_(launch), name_kernels_(std::move(name_kernels)) {}

  bool is_checked(DType dtype, at::Device device) const {
    return passed_[slot(dtype, device)].load(std::memory_order_acquire);
  }

  // Throws unless every program comes out right. Waits for the device, and allocates: not for a
  // stream that is being captured.
  void check(DType dtype, at::Device device);

 private:
  static size_t slot(DType dtype, at::Device device) {
    return static_cast<size_t>(device.has_index() ? device.index() : 0) * 4 +
           static_cast<size_t>(dtype);
  }

  const LaunchFn launch_;
  const NameKernelsFn name_kernels_;
  std::array<std::atomic<bool>, 128 * 4> passed_ = {};  // a device index is below 128
  std::mutex mutex_;
  std::map<size_t, std::string> failures_;
};

// The programs of the check, on the CPU, one after the other: a test plans them.
void for_each_first_use_program(DType dtype, const std::function<void(const Program&)>& visit);

}  // namespace rasa
