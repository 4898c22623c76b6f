// Choice of vector loops and micro-kernels by what the CPU was seen to do, not by what it is
// called.
#include "micro_kernel.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <exception>

namespace rasa::cpu {
namespace {

enum class MicroKernels { kNone, kLibrary, kOwn };
std::atomic<MicroKernels> allowed{MicroKernels::kOwn};
bool use_portable() { return allowed == MicroKernels::kNone; }

enum class Capability { kBaseline, kAvx2, kAvx512 };

Capability detect_capability() {
#if defined(RASA_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2")) {
    return Capability::kAvx512;
  }
#endif
#if defined(RASA_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kBaseline;
}

Capability capability() {
  static const Capability detected = detect_capability();
  return use_portable() ? Capability::kBaseline : detected;
}

template <class T>
void library_gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t ldA, const T* B, int64_t ldB,
                  float* C, int64_t ldC, bool add_C) {
  at::native::cpublas::brgemm(M, N, K, ldA, ldB, ldC, add_C, A, B, C, /*is_vnni=*/sizeof(T) == 2);
}

// Small whole numbers multiply exactly in every type, so a right micro-kernel gives exactly this
// product.
template <class T>
bool multiplies_right() {
  constexpr int64_t M = 4, N = 32, K = 32;
  std::array<T, M * K> A;
  std::array<T, K * N> B;
  std::array<float, M * N> C;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) A[m * K + k] = static_cast<T>(float(m + k % 3 - 1));
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < N; ++n) {
      B[k / 2 * 2 * N + 2 * n + k % 2] = static_cast<T>(float(n % 5 - k % 7));
    }
  }
  try {
    library_gemm<T>(M, N, K, A.data(), K, B.data(), N, C.data(), N, false);
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {
    return false;  // the library says that this CPU has no such kernel
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float expected = 0;
      for (int64_t k = 0; k < K; ++k) expected += float(m + k % 3 - 1) * float(n % 5 - k % 7);
      if (C[m * N + n] != expected) return false;
    }
  }
  return true;
}

// The library's 16-bit kernels are oneDNN's, which a user may switch off and on again.
template <class T>
bool has_micro_kernel() {
  if (use_portable() || !at::globalContext().userEnabledMkldnn()) return false;
  static const bool right = multiplies_right<T>();
  return right;
}

}  // namespace

const TileOpsTable& tile_ops() {
  switch (capability()) {
#if defined(RASA_HAS_AVX512)
    case Capability::kAvx512:
      return tile_ops_avx512();
#endif
#if defined(RASA_HAS_AVX2)
    case Capability::kAvx2:
      return tile_ops_avx2();
#endif
    default:
      return tile_ops_baseline();
  }
}

std::string cpu_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return own_bf16_gemm() != nullptr ? "avx512_bf16" : "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::string micro_kernel_dtypes() {
  if (use_portable()) return "";
  const auto multiplies = [](DType dtype) { return compute_dtype(dtype) == dtype; };
  return std::string("float32") + (multiplies(DType::kBF16) ? ",bfloat16" : "") +
         (multiplies(DType::kF16) ? ",float16" : "");
}

void set_micro_kernels(const std::string& which) {
  if (which == "own") {
    allowed = MicroKernels::kOwn;
  } else if (which == "library") {
    allowed = MicroKernels::kLibrary;
  } else {
    TORCH_CHECK(which == "none", "micro-kernels must be own, library or none, got ", which);
    allowed = MicroKernels::kNone;
  }
}

const Bf16Gemm* own_bf16_gemm() {
#if defined(RASA_HAS_AVX512_BF16)
  static const bool serves =
      detect_capability() == Capability::kAvx512 && __builtin_cpu_supports("avx512bf16");
  static const bool has_matrix_unit = __builtin_cpu_supports("amx-bf16");  // the library uses it
  if (serves && allowed == MicroKernels::kOwn &&
      !(has_matrix_unit && has_micro_kernel<at::BFloat16>())) {
    return &bf16_gemm();
  }
#endif
  return nullptr;
}

DType compute_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return own_bf16_gemm() != nullptr || has_micro_kernel<at::BFloat16>() ? dtype : DType::kF32;
    case DType::kF16:
      return has_micro_kernel<at::Half>() ? dtype : DType::kF32;
    default:
      return dtype;
  }
}

void tile_gemm(DType compute, int64_t M, int64_t N, int64_t K, const void* A, int64_t ldA,
               const void* B, int64_t ldB, void* C, int64_t ldC, bool add_C) {
  if (compute == DType::kF64 || (compute == DType::kF32 && use_portable())) {
    tile_ops().plain_gemm(compute, M, N, K, A, ldA, B, ldB, C, ldC, add_C);
    return;
  }
  float* out = static_cast<float*>(C);
  if (compute == DType::kF32) {
    library_gemm(M, N, K, static_cast<const float*>(A), ldA, static_cast<const float*>(B), ldB, out,
                 ldC, add_C);
  } else if (compute == DType::kBF16) {
    library_gemm(M, N, K, static_cast<const at::BFloat16*>(A), ldA,
                 static_cast<const at::BFloat16*>(B), ldB, out, ldC, add_C);
  } else {
    library_gemm(M, N, K, static_cast<const at::Half*>(A), ldA, static_cast<const at::Half*>(B),
                 ldB, out, ldC, add_C);
  }
}

int64_t vector_columns(DType compute) {
  return compute == DType::kF32 && capability() == Capability::kAvx512 ? 16 : 1;
}

void release_micro_kernel(DType compute) {
  if (pairs_rows_of_B(compute)) at::native::cpublas::brgemm_release();
}

}  // namespace rasa::cpu
