// The CPU backend's launcher, and what may stand in for it in a test.
#include "launch.h"

#include <atomic>
#include <mutex>
#include <utility>

#include "../cuda/kernel_names.h"
#include "../first_use.h"
#include "../library_gemm.h"
#include "dropout_mask.h"
#include "grouped_gemm.h"

namespace rasa::cpu {
namespace {

void run_library(const Program& program) { library_gemm(program, at::kCPU, draw_mask); }

void run_truncating(const Program& program) {
  Program shorter = program;
  for (Segment& segment : shorter.segments) segment.K = segment.K > 0 ? segment.K - 1 : 0;
  run_library(shorter);
}

template <LaunchFn run, bool allows_tf32>
void run_checked(const Program& program) {
  static FirstUse first_use(run, [](const Program&) { return std::string("a CPU launcher"); });
  first_use.check(products_of(program, allows_tf32), at::kCPU);
  run(program);
}

struct Recording {
  std::mutex mutex;
  cuda::DeviceInfo device = {};
  std::vector<std::vector<std::string>> programs;
};

Recording& recording() {
  static Recording instance;
  return instance;
}

void run_recorded(const Program& program) {
  {
    Recording& r = recording();
    const std::lock_guard<std::mutex> guard(r.mutex);
    r.programs.push_back(cuda::kernel_names(program, r.device, /*marks_splits=*/true));
  }
  grouped_gemm(program);
}

std::atomic<LaunchFn> launcher = grouped_gemm;

}  // namespace

void launch(const Program& program) { launcher.load(std::memory_order_relaxed)(program); }

void set_launcher(const std::string& name) {
  if (name == "tiles") {
    launcher = grouped_gemm;
  } else if (name == "library") {
    launcher = run_library;
  } else if (name == "verified") {
    launcher = run_checked<grouped_gemm, false>;
  } else if (name == "truncating_tf32") {
    launcher = run_checked<run_truncating, true>;
  } else {
    TORCH_CHECK(name == "truncating",
                "launcher must be tiles, library, verified, truncating or truncating_tf32, got ",
                name);
    launcher = run_checked<run_truncating, false>;
  }
}

void start_recording(const cuda::DeviceInfo& device) {
  Recording& r = recording();
  const std::lock_guard<std::mutex> guard(r.mutex);
  r.device = device;
  r.programs.clear();
  launcher = run_recorded;
}

std::vector<std::vector<std::string>> stop_recording() {
  Recording& r = recording();
  const std::lock_guard<std::mutex> guard(r.mutex);
  launcher = grouped_gemm;
  return std::exchange(r.programs, {});
}

}  // namespace rasa::cpu
