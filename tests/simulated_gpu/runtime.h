// What the parts of the simulated CUDA runtime share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace simulated {

constexpr int kNumDevices = 2;

struct Graph {
  std::vector<std::function<cudaError_t()>> nodes;
};

struct Stream {
  int device;
  std::shared_ptr<Graph> capture;  // while it is captured
  bool is_invalid = false;         // the capture
};

// Functions of simulated_gpu.py. prepare_launch returns a number for run_launch, or -1 for a kernel
// that the executor does not have.
struct Executor {
  uint64_t (*allocate)(uint64_t bytes);
  void (*release)(uint64_t address);
  int (*prepare_launch)(const char* kernel, const uint32_t* grid_and_block, uint64_t smem_bytes,
                        void** arguments);
  int (*run_launch)(int launch);
};

struct State {
  std::recursive_mutex mutex;
  Executor executor = {};
  std::map<uintptr_t, std::pair<size_t, int>> memory;  // by address: bytes, device
  std::map<const void*, std::string> kernels;          // by the host's function
  std::map<const void*, size_t> smem_bytes;            // that they were allowed
  std::set<Stream*> streams;
  Stream default_streams[kNumDevices] = {{0, nullptr}, {1, nullptr}};
  int num_captures = 0;
  unsigned long long capture_id = 0;
  cudaError_t next_launch = cudaSuccess;
  std::string log;
};

State& state();
using Lock = std::lock_guard<std::recursive_mutex>;

extern thread_local int current_device;
extern thread_local cudaStreamCaptureMode capture_mode;

// Keeps an error for cudaGetLastError.
cudaError_t failed(cudaError_t error);

bool is_default(cudaStream_t stream);
Stream* find(cudaStream_t stream);

void note(const std::string& what);
void note(const std::string& what, cudaStream_t stream);

// Notes what a thread may not do while any stream is captured: that ends the captures.
cudaError_t forbidden_in_capture(const char* what);

// Does `work` now, or, on a stream that is being captured, when its graph is launched; notes it in
// the log. The stream must be one of the current device.
cudaError_t enqueue(cudaStream_t stream, const std::string& what,
                    std::function<cudaError_t()> work);

}  // namespace simulated
