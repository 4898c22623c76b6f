// Refuses a launcher that computes wrong numbers on this machine, at its first use.
//
// A GPU is where this package cannot be tested by those who build it, so it tests itself there: the
// first program of each kind of products on a device is preceded by small programs of every form,
// whose results are compared with the same programs in float64 on the CPU. It costs some tenths of
// a second once per process, device and kind. A launcher that fails stays refused for the life of
// the process: without another way to compute it, that is an error.
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

// What is multiplied: a program's dtype (so the first values are DType's), or float32 in one of two
// ways.
enum class Products : int8_t { kF64, kF32, kBF16, kF16, kTF32, kFullPrecision };
constexpr size_t kNumProducts = 6;
static_assert(static_cast<DType>(Products::kF64) == DType::kF64 &&
                  static_cast<DType>(Products::kF32) == DType::kF32 &&
                  static_cast<DType>(Products::kBF16) == DType::kBF16 &&
                  static_cast<DType>(Products::kF16) == DType::kF16,
              "a dtype's products have its value");

// Of a program on a launcher that multiplies float32 in TF32 where it may.
inline Products products_of(const Program& program, bool allows_tf32) {
  if (program.dtype != DType::kF32) return static_cast<Products>(program.dtype);
  if (program.is_full_precision) return Products::kFullPrecision;
  return allows_tf32 ? Products::kTF32 : Products::kF32;
}

// Names what runs a program, for the message.
using NameKernelsFn = std::function<std::string(const Program&)>;

class FirstUse {
 public:
  FirstUse(LaunchFn launch, NameKernelsFn name_kernels)
      : launch_(launch), name_kernels_(std::move(name_kernels)) {}

  bool is_checked(Products products, at::Device device) const {
    return passed_[slot(products, device)].load(std::memory_order_acquire);
  }

  // What is wrong; "" if every program comes out right. Waits for the device, and allocates: not
  // for a stream that is being captured.
  std::string failure(Products products, at::Device device);

  // Throws it.
  void check(Products products, at::Device device);

 private:
  static size_t slot(Products products, at::Device device) {
    return static_cast<size_t>(device.has_index() ? device.index() : 0) * kNumProducts +
           static_cast<size_t>(products);
  }

  const LaunchFn launch_;
  const NameKernelsFn name_kernels_;
  // A device index is below 128.
  std::array<std::atomic<bool>, 128 * kNumProducts> passed_ = {};
  std::mutex mutex_;
  std::map<size_t, std::string> failures_;
};

// The programs of the check, on the CPU, one after the other: a test plans them.
void for_each_first_use_program(Products products,
                                const std::function<void(const Program&)>& visit);

}  // namespace rasa
