// Kernels by name, for messages and tests. Pure C++, no torch and no CUDA.
#pragma once

#include <string>

#include "plan.h"

namespace rasa::cuda {

// "NT 128x40x64 bf16 dropout": layout, tile and element say which kernel it is.
inline std::string kernel_name(ConfigId config, DType element, bool has_dropout) {
  if (config == ConfigId::kReduce) {
    return std::string("sum of partials") + (element == DType::kF32    ? " fp32"
                                             : element == DType::kBF16 ? " bf16"
                                                                       : " fp16");
  }
  const TileConfig tile = tile_config(config);
  const char* type = tile.splits_operands      ? " 3xtf32"
                     : element == DType::kF32  ? " tf32"
                     : element == DType::kBF16 ? " bf16"
                                               : " fp16";
  const char* layout = tile.layout == Layout::kNT ? "NT" : tile.layout == Layout::kNN ? "NN" : "TN";
  std::string name = std::string(layout) + " " + std::to_string(tile.block_m) + "x" +
                     std::to_string(tile.block_n) + "x" + std::to_string(tile.block_k);
  if (tile.scales_segments) name += " scaled";
  if (tile.walks) name += " walk";
  return name + type + (has_dropout ? " dropout" : "");
}

inline bool stores_partials(const Launch& launch) {
  for (int i = 0; launch.config != ConfigId::kReduce && i < launch.args->num_problems; ++i) {
    if (launch.args->problem(i).partials_at >= 0) return true;
  }
  return false;
}

// The kernels of a program, one for each launch. marks_splits: with ", split" after the name where
// it stores partials.
inline std::vector<std::string> kernel_names(const Program& program, const DeviceInfo& device,
                                             bool marks_splits = false) {
  std::vector<std::string> names;
  for (const Group& group : program.groups) {
    for (const Launch& l : plan(program, group, device).launches) {
      names.push_back(kernel_name(l.config, l.element, l.has_dropout));
      if (marks_splits && stores_partials(l)) names.back() += ", split";
    }
  }
  return names;
}

// Every kernel there is for an element on a device.
inline std::vector<std::string> all_kernel_names(DType element, const DeviceInfo& device) {
  std::vector<std::string> names = {kernel_name(ConfigId::kReduce, element, false)};
  for (int i = 0; i < kNumConfigs; ++i) {
    const ConfigId config = static_cast<ConfigId>(i);
    if (!is_for(config, device.smem_bytes)) continue;
    if (tile_config(config).element_bytes != element_size(element)) continue;
    if (has_plain_kernel(config)) names.push_back(kernel_name(config, element, false));
    if (has_dropout_kernel(config)) names.push_back(kernel_name(config, element, true));
  }
  return names;
}

}  // namespace rasa::cuda
