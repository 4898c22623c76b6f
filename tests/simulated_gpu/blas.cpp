// The products that PyTorch asks cuBLAS for, in plain loops: those of base layers.
//
// Declared by hand, since the toolkit's headers of cuBLAS are a package of their own. Matrices are
// stored by columns.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <library_types.h>

#include "runtime.h"

namespace {

constexpr int kSuccess = 0, kNotSupported = 15;
constexpr int kNoTranspose = 0;
constexpr int kHostPointers = 0;

struct Handle {
  cudaStream_t stream = nullptr;
  int math_mode = 0;
};

double load(const void* data, cudaDataType type, int64_t i) {
  switch (type) {
    case CUDA_R_64F:
      return static_cast<const double*>(data)[i];
    case CUDA_R_16BF:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case CUDA_R_16F:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

void store(void* data, cudaDataType type, int64_t i, double value) {
  switch (type) {
    case CUDA_R_64F:
      static_cast<double*>(data)[i] = value;
      break;
    case CUDA_R_16BF:
      static_cast<__nv_bfloat16*>(data)[i] = __double2bfloat16(value);
      break;
    case CUDA_R_16F:
      static_cast<__half*>(data)[i] = __double2half(value);
      break;
    default:
      static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** out) {
  *out = new Handle;
  return kSuccess;
}
int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return kSuccess;
}
int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return kSuccess;
}
int cublasGetStream_v2(Handle* handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return kSuccess;
}
int cublasSetWorkspace_v2(Handle*, void*, size_t) { return kSuccess; }
int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return kSuccess;
}
int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return kSuccess;
}
int cublasSetPointerMode_v2(Handle*, int mode) {
  return mode == kHostPointers ? kSuccess : kNotSupported;
}
int cublasGetPointerMode_v2(Handle*, int* mode) {
  *mode = kHostPointers;
  return kSuccess;
}

// C (m,n) = alpha · op(A) (m,k) · op(B) (k,n) + beta · C; alpha and beta in fp32, as torch has them
// for these types.
int cublasGemmEx(Handle* handle, int op_A, int op_B, int m, int n, int k, const void* alpha,
                 const void* A, cudaDataType type_A, int ld_A, const void* B, cudaDataType type_B,
                 int ld_B, const void* beta, void* C, cudaDataType type_C, int ld_C, int, int) {
  const double a = *static_cast<const float*>(alpha), b = *static_cast<const float*>(beta);
  const cudaError_t error = simulated::enqueue(handle->stream, "cublasGemmEx", [=] {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t q = 0; q < k; ++q) {
          sum += load(A, type_A, op_A == kNoTranspose ? q * ld_A + i : i * ld_A + q) *
                 load(B, type_B, op_B == kNoTranspose ? j * ld_B + q : q * ld_B + j);
        }
        const int64_t at = j * ld_C + i;
        store(C, type_C, at, a * sum + (b == 0 ? 0 : b * load(C, type_C, at)));
      }
    }
    return cudaSuccess;
  });
  return error == cudaSuccess ? kSuccess : kNotSupported;
}
int cublasSgemm_v2(Handle* handle, int op_A, int op_B, int m, int n, int k, const float* alpha,
                   const float* A, int ld_A, const float* B, int ld_B, const float* beta, float* C,
                   int ld_C) {
  return cublasGemmEx(handle, op_A, op_B, m, n, k, alpha, A, CUDA_R_32F, ld_A, B, CUDA_R_32F, ld_B,
                      beta, C, CUDA_R_32F, ld_C, 0, 0);
}

}  // extern "C"
