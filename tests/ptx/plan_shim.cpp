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
               const rasa::Block* blocks, int num_blocks, int num_sms, double reduce_launch) {
  rasa::Program program = {static_cast<rasa::DType>(dtype),
                           static_cast<rasa::DType>(scale_dtype),
                           {{static_cast<rasa::Layout>(layout), 0, num_problems}},
                           {problems, problems + num_problems},
                           {segments, segments + num_segments},
                           {blocks, blocks + num_blocks}};
  try {
    group_plan = rasa::cuda::plan(program, program.groups[0], {num_sms, reduce_launch});
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

int args_size(int i) { return static_cast<int>(group_plan.launches[i].args.num_bytes()); }
const void* launch_args(int i) { return group_plan.launches[i].args.operator->(); }

}  // extern "C"
