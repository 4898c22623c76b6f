// The kernels that exist, in a table, and their launch. One file: a kernel that is a template can
// be named only where it is instantiated.
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
struct KernelTable {
  ConfigKernels configs[kNumKernels];
};

template <class Args>
Kernel address(void (*kernel)(Args)) {
  return reinterpret_cast<Kernel>(kernel);
}

template <class Element, ConfigId kId>
ConfigKernels config_kernels() {
  ConfigKernels kernels = {};
  if constexpr (kId == ConfigId::kReduce) {
    kernels.plain = address(reduce_partials<Element>);
  } else if constexpr (tile_config(kId).element_bytes == sizeof(Element)) {
    if constexpr (has_plain_kernel(kId)) {
      kernels.plain = address(grouped_gemm_sm80<kId, Element, false>);
    }
    if constexpr (has_dropout_kernel(kId)) {
      kernels.with_dropout = address(grouped_gemm_sm80<kId, Element, true>);
    }
  }
  return kernels;
}

template <class Element, int... kIds>
KernelTable kernel_table(std::integer_sequence<int, kIds...>) {
  return {{config_kernels<Element, static_cast<ConfigId>(kIds)>()...}};
}

constexpr auto kAllConfigs = std::make_integer_sequence<int, kNumKernels>();
const KernelTable kBFloat16Kernels = kernel_table<__nv_bfloat16>(kAllConfigs);
const KernelTable kHalfKernels = kernel_table<__half>(kAllConfigs);
const KernelTable kFloat32Kernels = kernel_table<float>(kAllConfigs);

}  // namespace

const void* find_kernel(const Launch& launch) {
  const KernelTable& table = launch.element == DType::kF32    ? kFloat32Kernels
                             : launch.element == DType::kBF16 ? kBFloat16Kernels
                                                              : kHalfKernels;
  const ConfigKernels& kernels = table.configs[static_cast<int>(launch.config)];
  return launch.has_dropout ? kernels.with_dropout : kernels.plain;
}

}  // namespace rasa::cuda
