// A CUDA runtime without a GPU: what PyTorch and rasa_ext call of it, preloaded before libcudart.
//
// Device memory and kernels are the executor's (tests/ptx), which simulated_gpu.py connects. Work
// is done when it is enqueued, so nothing runs at the same time as anything else; what a stream, a
// device or a capture does not allow is an error as on a GPU. Every call that matters is in the
// log.
#include "runtime.h"

#include <cstring>

namespace simulated {
namespace {

constexpr int kNumSms = 3;
constexpr size_t kMemoryBytes = size_t{8} << 30;
constexpr size_t kDefaultSmemBytes = 48 * 1024;
constexpr size_t kMostSmemBytes = 163 * 1024;  // of sm_80

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

State& state() {
  static State* instance = new State;  // outlives every static destructor that frees memory
  return *instance;
}

thread_local int current_device = 0;
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

cudaError_t forbidden_in_capture(const char* what) {
  note(what);
  const Lock lock(state().mutex);
  if (state().num_captures == 0 || capture_mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  for (Stream* s : state().streams) s->is_invalid = s->capture != nullptr;
  return failed(cudaErrorStreamCaptureUnsupported);
}

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

using namespace simulated;

extern "C" {

// --- what simulated_gpu.py calls ---

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

// --- devices ---

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

// --- memory ---

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

// --- kernels ---

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
