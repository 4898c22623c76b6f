// A CUDA runtime without a GPU: what PyTorch and rasa_ext call of it, preloaded before libcudart.
//
// Device memory and kernels are the executor's (tests/ptx), which simulated_gpu.py connects. Work
// is done when it is enqueued, so nothing runs at the same time as anything else; what a stream, a
// device or a capture does not allow is an error as on a GPU. Every call that matters is in the
// log.
#include "runtime.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace {

constexpr int kNumDevices = 2;
constexpr int kNumSms = 3;
constexpr size_t kMemoryBytes = size_t{8} << 30;
constexpr size_t kDefaultSmemBytes = 48 * 1024;
constexpr size_t kMostSmemBytes = 163 * 1024;  // of sm_80

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

State& state() {
  static State* instance = new State;  // outlives every static destructor that frees memory
  return *instance;
}

using Lock = std::lock_guard<std::recursive_mutex>;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool is_default(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

Stream* find(cudaStream_t stream) {
  if (is_default(stream)) return &state().default_streams[current_device];
  return reinterpret_cast<Stream*>(stream);
}

void note(const std::string& what, cudaStream_t stream) {
  const Lock lock(state().mutex);
  const Stream* s = find(stream);
  const unsigned long long id = is_default(stream) ? 0 : reinterpret_cast<uintptr_t>(stream);
  state().log += what + " device=" + std::to_string(s->device) + " stream=" + std::to_string(id) +
                 " captured=" + (s->capture ? "1" : "0") + "\n";
}

void note(const std::string& what) {
  const Lock lock(state().mutex);
  state().log += what + " device=" + std::to_string(current_device) + "\n";
}

// What a thread may not do while any stream is captured; it ends the captures.
cudaError_t forbidden_in_capture(const char* what) {
  note(what);
  const Lock lock(state().mutex);
  if (state().num_captures == 0 || capture_mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  for (Stream* s : state().streams) s->is_invalid = s->capture != nullptr;
  return failed(cudaErrorStreamCaptureUnsupported);
}

}  // namespace

namespace simulated {

cudaError_t enqueue(cudaStream_t stream, const std::string& what,
                    std::function<cudaError_t()> work) {
  Stream* s = find(stream);
  note(what, stream);
  if (s->device != current_device) return failed(cudaErrorInvalidResourceHandle);
  if (s->capture) {
    s->capture->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  if (is_default(stream) && state().num_captures > 0) return failed(cudaErrorStreamCaptureImplicit);
  return failed(work());
}

}  // namespace simulated

using simulated::enqueue;

extern "C" {

// --- what simulated_gpu.py calls
// ------------------------------------------------------------------

void simulated_connect(const Executor* executor) { state().executor = *executor; }

// The log since the last call; the text is good until the next one.
const char* simulated_log() {
  static std::string text;
  const Lock lock(state().mutex);
  text.swap(state().log);
  state().log.clear();
  return text.c_str();
}

void simulated_fail_next_launch(int error) {
  state().next_launch = static_cast<cudaError_t>(error);
}

// --- devices
// --------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kNumDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kNumDevices) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  *out = {};
  std::strcpy(out->name, "simulated sm_80");
  out->major = 8;
  out->warpSize = 32;
  out->totalGlobalMem = kMemoryBytes;
  out->multiProcessorCount = kNumSms;
  out->sharedMemPerBlock = kDefaultSmemBytes;
  out->sharedMemPerBlockOptin = kMostSmemBytes;
  out->sharedMemPerMultiprocessor = 164 * 1024;
  out->regsPerBlock = out->regsPerMultiprocessor = 64 * 1024;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsPerMultiProcessor = 2048;
  for (int i = 0; i < 3; ++i) out->maxGridSize[i] = i == 0 ? 0x7fffffff : 0xffff;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kNumSms;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMostSmemBytes;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return forbidden_in_capture("cudaDeviceSynchronize"); }

// Of the driver: torch asks it which devices are in use, and for a context before products.
int cuCtxGetCurrent(void** context) {
  *context = &state();
  return 0;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// --- memory
// ---------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** out, size_t bytes) {
  const cudaError_t error = forbidden_in_capture("cudaMalloc");
  if (error != cudaSuccess) return error;
  if (state().executor.allocate == nullptr) return failed(cudaErrorInitializationError);
  const uintptr_t address = state().executor.allocate(bytes);
  if (address == 0) return failed(cudaErrorMemoryAllocation);
  std::memset(reinterpret_cast<void*>(address), 0xff, bytes);  // NaN of every type
  const Lock lock(state().mutex);
  state().memory[address] = {bytes, current_device};
  *out = reinterpret_cast<void*>(address);
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  if (address == nullptr) return cudaSuccess;
  const cudaError_t error = forbidden_in_capture("cudaFree");
  if (error != cudaSuccess) return error;
  const Lock lock(state().mutex);
  if (state().memory.erase(reinterpret_cast<uintptr_t>(address)) == 0) {
    return failed(cudaErrorInvalidValue);
  }
  state().executor.release(reinterpret_cast<uintptr_t>(address));
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  *left = *total = kMemoryBytes;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  *out = {};
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Lock lock(state().mutex);
  auto above = state().memory.upper_bound(address);
  if (above == state().memory.begin()) return cudaSuccess;
  const auto& [start, block] = *--above;
  if (address >= start + block.first) return cudaSuccess;
  out->type = cudaMemoryTypeDevice;
  out->device = block.second;
  out->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const char* names[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default"};
  return enqueue(stream, std::string("cudaMemcpyAsync ") + names[kind], [=] {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const cudaError_t error = forbidden_in_capture("cudaMemcpy");
  if (error == cudaSuccess) std::memcpy(to, from, bytes);
  return error;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream, "cudaMemsetAsync", [=] {
    std::memset(to, value, bytes);
    return cudaSuccess;
  });
}

// --- streams and events
// ---------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
  const Lock lock(state().mutex);
  auto* stream = new Stream{current_device, nullptr};
  state().streams.insert(stream);
  *out = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(state().mutex);
  state().streams.erase(find(stream));
  delete find(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  note("cudaStreamSynchronize", stream);
  return find(stream)->capture ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = reinterpret_cast<cudaEvent_t>(new int(current_device));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<int*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return forbidden_in_capture("cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return forbidden_in_capture("cudaEventSynchronize");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

// --- capture and graphs
// ---------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
  const Stream* s = find(stream);
  *out = !s->capture     ? cudaStreamCaptureStatusNone
         : s->is_invalid ? cudaStreamCaptureStatusInvalidated
                         : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  if (id != nullptr) *id = state().capture_id;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(find(stream)->capture.get());
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (num_dependencies != nullptr) *num_dependencies = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(state().mutex);
  if (is_default(stream)) return failed(cudaErrorStreamCaptureUnsupported);
  find(stream)->capture = std::make_shared<Graph>();
  find(stream)->is_invalid = false;
  ++state().num_captures;
  ++state().capture_id;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  const Lock lock(state().mutex);
  Stream* s = find(stream);
  *out = nullptr;
  --state().num_captures;
  const std::shared_ptr<Graph> graph = std::exchange(s->capture, nullptr);
  if (s->is_invalid) return failed(cudaErrorStreamCaptureInvalidated);
  *out = reinterpret_cast<cudaGraph_t>(new Graph(*graph));
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                          unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  const auto* nodes = &reinterpret_cast<Graph*>(graph)->nodes;
  return enqueue(stream, "cudaGraphLaunch", [=] {
    for (const auto& work : *nodes) {
      const cudaError_t error = work();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

// --- kernels
// --------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* nothing;
  return &nothing;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  const Lock lock(state().mutex);
  state().kernels[host] = name;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMostSmemBytes) {
    return failed(cudaErrorInvalidValue);
  }
  const Lock lock(state().mutex);
  state().smem_bytes[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t smem, cudaStream_t stream) {
  State& s = state();
  if (s.next_launch != cudaSuccess) return failed(std::exchange(s.next_launch, cudaSuccess));
  const auto name = s.kernels.find(kernel);
  if (name == s.kernels.end()) return failed(cudaErrorInvalidDeviceFunction);
  const auto allowed = s.smem_bytes.find(kernel);
  const size_t most = allowed == s.smem_bytes.end() ? 0 : allowed->second;
  if (smem > kDefaultSmemBytes && smem > most) return failed(cudaErrorInvalidValue);
  const uint32_t shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  // The arguments are copied now: a graph is launched when they are gone.
  const int launch = s.executor.prepare_launch(name->second.c_str(), shape, smem, arguments);
  const std::string what = launch < 0 ? "foreign kernel " : "kernel ";
  return enqueue(stream, what + name->second, [launch] {
    if (launch < 0) return cudaSuccess;
    return state().executor.run_launch(launch) == 0 ? cudaSuccess : cudaErrorLaunchFailure;
  });
}
// What nvcc 13 makes of <<< >>>.
cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* host) {
  *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t smem, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, smem, stream);
}

}  // extern "C"
