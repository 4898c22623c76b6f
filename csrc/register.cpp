// The ops' schemas, their CPU, Meta and Autocast kernels, and the _C module.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "autocast.h"
#include "checks.h"
#include "cpu/dropout_mask.h"
#include "cpu/launch.h"
#include "cpu/micro_kernel.h"
#include "cuda/kernel_names.h"
#include "first_use.h"
#include "rasa_ops.h"
#include "register_backend.h"

namespace rasa {

TORCH_LIBRARY(rasa_ext, m) {
  m.def(
      "rasa_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor A_shared, Tensor Bt, "
      "Tensor Bt_shared, Tensor d, float p, Tensor? seed) -> (Tensor y, Tensor s)");
  m.def(
      "rasa_add(Tensor x, Tensor base, Tensor A, Tensor A_shared, Tensor Bt, Tensor Bt_shared, "
      "Tensor d, float p, Tensor? seed) -> (Tensor y, Tensor s)");
  m.def(
      "rasa_linears(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] A, Tensor[] A_shared, "
      "Tensor[] Bt, Tensor[] Bt_shared, Tensor[] d, float p, Tensor? seed) -> "
      "(Tensor[] y, Tensor s)");
  // The gradients and their mask: dx, then dA, dA_shared, dBt, dBt_shared and dd of each layer.
  m.def(
      "rasa_backward(Tensor?[] dy, Tensor x, Tensor?[] weight, Tensor[] A, Tensor[] A_shared, "
      "Tensor[] Bt, Tensor[] Bt_shared, Tensor[] d, Tensor s, float p, Tensor? seed, "
      "bool[] output_mask) -> Tensor[]");
  m.def(
      "grouped_gemm(str layout, Tensor[] A, Tensor[] B, int[] segments, Tensor?[] C_in, "
      "Tensor?[] scale_m, Tensor?[] scale_k, ScalarType? out_dtype) -> Tensor[]");
  m.def("dropout_mask(Tensor seed, SymInt M, SymInt K, float p) -> Tensor");
}

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Meta: shapes and dtypes only
// ---------------------------------------------------------------------------------------------------------------------

Tensor empty_s(const Tensor& x, at::TensorList d) {
  c10::SymInt columns = 0;
  for (const Tensor& t : d) columns += padded_rank(t.sym_size(0));
  return at::empty_symint({x.sym_size(0), columns}, x.options());
}

void check_seed_device(const char* op, double p, const OptionalTensor& seed, const Tensor& x) {
  if (p > 0 && seed) check_device(op, *seed, "seed", x);
}

std::tuple<std::vector<Tensor>, Tensor> rasa_linears_meta(
    const Tensor& x, at::TensorList weight, const OptionalTensorList& bias, at::TensorList A,
    at::TensorList A_shared, at::TensorList Bt, at::TensorList Bt_shared, at::TensorList d,
    double p, const OptionalTensor& seed) {
  check_linears_lists(weight.size(), bias.size(), {A, A_shared, Bt, Bt_shared, d});
  const char* op = weight.size() == 1 ? "rasa_linear" : "rasa_linears";
  check_devices(op, weight, "weight", x);
  check_devices(op, bias, "bias", x);
  check_devices(op, A, "A", x);
  check_devices(op, A_shared, "A_shared", x);
  check_devices(op, Bt, "Bt", x);
  check_devices(op, Bt_shared, "Bt_shared", x);
  check_devices(op, d, "d", x);
  check_seed_device(op, p, seed, x);
  std::vector<Tensor> y;
  for (const Tensor& w : weight) {
    y.push_back(at::empty_symint({x.sym_size(0), w.sym_size(0)}, x.options()));
  }
  return {std::move(y), empty_s(x, d)};
}

std::tuple<Tensor, Tensor> rasa_add_meta(const Tensor& x, const Tensor& base, const Tensor& A,
                                         const Tensor& A_shared, const Tensor& Bt,
                                         const Tensor& Bt_shared, const Tensor& d, double p,
                                         const OptionalTensor& seed) {
  constexpr const char* op = "rasa_add";
  check_device(op, base, "base", x);
  check_device(op, A, "A", x);
  check_device(op, A_shared, "A_shared", x);
  check_device(op, Bt, "Bt", x);
  check_device(op, Bt_shared, "Bt_shared", x);
  check_device(op, d, "d", x);
  check_seed_device(op, p, seed, x);
  return {at::empty_symint(base.sym_sizes(), x.options()), empty_s(x, d)};
}

std::vector<Tensor> rasa_backward_meta(const OptionalTensorList& dy, const Tensor& x,
                                       const OptionalTensorList&, at::TensorList A,
                                       at::TensorList A_shared, at::TensorList Bt,
                                       at::TensorList Bt_shared, at::TensorList d, const Tensor&,
                                       double, const OptionalTensor&,
                                       const c10::List<bool>& wanted) {
  check_backward_lists(dy.size(), {A, A_shared, Bt, Bt_shared, d}, wanted.size());
  std::vector<Tensor> grads;
  const auto add_grad_of = [&](const Tensor& t) {
    grads.push_back(wanted[grads.size()] ? at::empty_symint(t.sym_sizes(), t.options())
                                         : at::empty({0}, x.options()));
  };
  add_grad_of(x);
  for (size_t i = 0; i < dy.size(); ++i) {
    for (const at::TensorList& list : {A, A_shared, Bt, Bt_shared, d}) add_grad_of(list[i]);
  }
  return grads;
}

std::vector<Tensor> grouped_gemm_meta(std::string_view layout, at::TensorList A, at::TensorList B,
                                      at::IntArrayRef segments, const OptionalTensorList& C_in,
                                      const OptionalTensorList& scale_m,
                                      const OptionalTensorList& scale_k,
                                      std::optional<at::ScalarType> out_dtype) {
  constexpr const char* op = "grouped_gemm";
  check_group(layout, A, B, segments);
  if (A.empty()) return {};
  check_devices(op, A, "A", A[0], "the first A");
  check_devices(op, B, "B", A[0], "the first A");
  check_devices(op, C_in, "C_in", A[0], "the first A");
  check_devices(op, scale_m, "scale_m", A[0], "the first A");
  check_devices(op, scale_k, "scale_k", A[0], "the first A");
  std::vector<Tensor> results;
  size_t first = 0;
  for (const int64_t num_segments : segments) {
    const Tensor& a = A[first];
    results.push_back(at::empty_symint(
        {a.sym_size(layout == "TN" ? 1 : 0), B[first].sym_size(layout == "NT" ? 0 : 1)},
        a.options().dtype(out_dtype.value_or(a.scalar_type()))));
    first += num_segments;
  }
  return results;
}

Tensor dropout_mask_meta(const Tensor& seed, c10::SymInt M, c10::SymInt K, double) {
  return at::empty_symint({std::move(M), std::move(K)}, seed.options().dtype(at::kBool));
}

std::tuple<Tensor, Tensor> rasa_linear(const Tensor& x, const Tensor& weight,
                                       const OptionalTensor& bias, const Tensor& A,
                                       const Tensor& A_shared, const Tensor& Bt,
                                       const Tensor& Bt_shared, const Tensor& d, double p,
                                       const OptionalTensor& seed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rasa_ext::rasa_linears", "")
                             .typed<decltype(rasa_linears_meta)>();
  auto [y, s] =
      op.call(x, weight, OptionalTensorList({bias}), A, A_shared, Bt, Bt_shared, d, p, seed);
  return {std::move(y[0]), std::move(s)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Autocast: activations and base weight in the autocast dtype; the adapter keeps its own
// ---------------------------------------------------------------------------------------------------------------------

template <c10::DispatchKey autocast_key, c10::DeviceType device>
struct Autocast : AutocastTo<device> {
  using AutocastTo<device>::cast, AutocastTo<device>::cast_adapter;

  static std::vector<Tensor> cast_adapters(at::TensorList tensors) {
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) result.push_back(cast_adapter(t));
    return result;
  }

  static std::tuple<std::vector<Tensor>, Tensor> rasa_linears(
      const Tensor& x, at::TensorList weight, const OptionalTensorList& bias, at::TensorList A,
      at::TensorList A_shared, at::TensorList Bt, at::TensorList Bt_shared, at::TensorList d,
      double p, const OptionalTensor& seed) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rasa_ext::rasa_linears", "")
                               .typed<decltype(rasa_linears)>();
    const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
    std::vector<Tensor> cast_weight;
    for (const Tensor& w : weight) cast_weight.push_back(cast(w));
    OptionalTensorList cast_bias;
    for (const OptionalTensor b : bias) {
      cast_bias.push_back(b && b->defined() ? OptionalTensor(cast(*b)) : std::nullopt);
    }
    return op.call(cast(x), cast_weight, cast_bias, cast_adapters(A), cast_adapters(A_shared),
                   cast_adapters(Bt), cast_adapters(Bt_shared), cast_adapters(d), p, seed);
  }

  static std::tuple<Tensor, Tensor> rasa_add(const Tensor& x, const Tensor& base, const Tensor& A,
                                             const Tensor& A_shared, const Tensor& Bt,
                                             const Tensor& Bt_shared, const Tensor& d, double p,
                                             const OptionalTensor& seed) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rasa_ext::rasa_add", "")
                               .typed<decltype(rasa_add)>();
    const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
    return op.call(cast(x), cast(base), cast_adapter(A), cast_adapter(A_shared), cast_adapter(Bt),
                   cast_adapter(Bt_shared), cast_adapter(d), p, seed);
  }

  static void impl(torch::Library& m) {
    m.impl("rasa_linears", &rasa_linears);
    m.impl("rasa_add", &rasa_add);
  }
};

}  // namespace

// One layer of rasa_linears.
TORCH_LIBRARY_IMPL(rasa_ext, CompositeImplicitAutograd, m) { m.impl("rasa_linear", &rasa_linear); }

TORCH_LIBRARY_IMPL(rasa_ext, CPU, m) { register_backend<cpu::launch, cpu::draw_mask>(m); }

TORCH_LIBRARY_IMPL(rasa_ext, Meta, m) {
  m.impl("rasa_linears", &rasa_linears_meta);
  m.impl("rasa_add", &rasa_add_meta);
  m.impl("rasa_backward", &rasa_backward_meta);
  m.impl("grouped_gemm", &grouped_gemm_meta);
  m.impl("dropout_mask", &dropout_mask_meta);
}

TORCH_LIBRARY_IMPL(rasa_ext, AutocastCPU, m) {
  Autocast<c10::DispatchKey::AutocastCPU, at::kCPU>::impl(m);
}

TORCH_LIBRARY_IMPL(rasa_ext, AutocastCUDA, m) {
  Autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>::impl(m);
}

}  // namespace rasa

namespace rasa {
namespace {

// (kernels that the check at first use runs, kernels there are), with CUDA or without.
std::pair<std::vector<std::string>, std::vector<std::string>> first_use_kernels(
    const std::string& name, int32_t num_sms, int32_t smem_bytes) {
  TORCH_CHECK(name == "float32" || name == "bfloat16" || name == "float16",
              "dtype must be float32, bfloat16 or float16, got ", name);
  const cuda::DeviceInfo device = {num_sms, smem_bytes};
  const DType dtype = name == "float32"    ? DType::kF32
                      : name == "bfloat16" ? DType::kBF16
                                           : DType::kF16;
  std::vector<std::string> used;
  const auto use = [&](Products products) {
    for_each_first_use_program(products, [&](const Program& program) {
      for (std::string& name : cuda::kernel_names(program, device)) used.push_back(name);
    });
  };
  use(dtype == DType::kF32 ? Products::kTF32 : static_cast<Products>(dtype));
  if (dtype == DType::kF32) use(Products::kFullPrecision);
  return {used, cuda::all_kernel_names(dtype, device)};
}

}  // namespace
}  // namespace rasa

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", &rasa::cpu::cpu_capability);
  m.def("micro_kernel_dtypes", &rasa::cpu::micro_kernel_dtypes);
  m.def("set_micro_kernels", &rasa::cpu::set_micro_kernels, pybind11::arg("which"));
  m.def("set_cpu_launcher", &rasa::cpu::set_launcher, pybind11::arg("name"));
  m.def(
      "start_recording",
      [](int32_t num_sms, int32_t smem_bytes) {
        rasa::cpu::start_recording({num_sms, smem_bytes});
      },
      pybind11::arg("num_sms"), pybind11::arg("smem_bytes"));
  m.def("stop_recording", &rasa::cpu::stop_recording);
  m.def("first_use_kernels", &rasa::first_use_kernels, pybind11::arg("dtype"),
        pybind11::arg("num_sms"), pybind11::arg("smem_bytes"));
}
