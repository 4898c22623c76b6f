// csrc/cuda/plan.h behind a C ABI, for ctypes.
#include <cstdio>

#include "cuda/plan.h"

namespace {
rasa::cuda::GroupPlan group_plan;
char message[256];
}  // namespace

extern "C" {

// The number of launches of the program's only group, -1 on an error.
int plan_group(int layout, int dtype, int scale_dtype, const rasa::Problem* problems,
               int num_problems, const rasa::Segment* segments, int num_segments,
               const rasa::Block* blocks, int num_blocks, int num_sms, int smem_bytes,
               double reduce_launch, int is_full_precision) {
  rasa::Program program = {static_cast<rasa::DType>(dtype),
                           static_cast<rasa::DType>(scale_dtype),
                           {{static_cast<rasa::Layout>(layout), 0, num_problems}},
                           {problems, problems + num_problems},
                           {segments, segments + num_segments},
                           {blocks, blocks + num_blocks},
                           is_full_precision != 0};
  try {
    group_plan = rasa::cuda::plan(program, program.groups[0], {num_sms, smem_bytes, reduce_launch});
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return -1;
  }
  return static_cast<int>(group_plan.launches.size());
}

const char* plan_error() { return message; }

// out: config, has_dropout, grid, threads, smem_bytes, num_problems
void launch_shape(int i, int* out) {
  const rasa::cuda::Launch& launch = group_plan.launches[i];
  const int values[] = {static_cast<int>(launch.config),
                        launch.has_dropout,
                        launch.grid,
                        launch.threads,
                        launch.smem_bytes,
                        launch.args->num_problems};
  for (int k = 0; k < 6; ++k) out[k] = values[k];
}

int64_t workspace_bytes() { return group_plan.workspace_bytes; }

int num_configs() { return rasa::cuda::kNumConfigs; }

// out: layout, block_m, block_n, block_k, warps_m, warps_n, stages, walks, scales_segments,
// smem_bytes, has_plain_kernel, has_dropout_kernel, element_bytes, splits_operands
void config_shape(int id, int* out) {
  const auto config = static_cast<rasa::cuda::ConfigId>(id);
  const rasa::cuda::TileConfig c = rasa::cuda::tile_config(config);
  const int values[] = {static_cast<int>(c.layout),
                        c.block_m,
                        c.block_n,
                        c.block_k,
                        c.warps_m,
                        c.warps_n,
                        c.stages,
                        c.walks,
                        c.scales_segments,
                        c.smem_bytes(),
                        rasa::cuda::has_plain_kernel(config),
                        rasa::cuda::has_dropout_kernel(config),
                        c.element_bytes,
                        c.splits_operands};
  for (int k = 0; k < 14; ++k) out[k] = values[k];
}

int args_size(int i) { return static_cast<int>(group_plan.launches[i].args.num_bytes()); }
const void* launch_args(int i) { return group_plan.launches[i].args.operator->(); }

}  // extern "C"
