// The ops' schemas, their CPU, Meta and Autocast kernels, and the _C module.
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "autocast.h"
#include "cpu/dropout_mask.h"
#include "cpu/launch.h"
#include "cpu/micro_kernel.h"
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
      "rasa_backward(Tensor dy, Tensor x, Tensor? weight, Tensor A, Tensor A_shared, Tensor Bt, "
      "Tensor Bt_shared, Tensor d, Tensor s, float p, Tensor? seed, bool[6] output_mask) -> "
      "(Tensor dx, Tensor dA, Tensor dA_shared, Tensor dBt, Tensor dBt_shared, Tensor dd)");
  m.def(
      "grouped_gemm(str layout, Tensor[] A, Tensor[] B, int[] segments, Tensor?[] C_in, "
      "Tensor?[] scale_m, Tensor?[] scale_k, ScalarType? out_dtype) -> Tensor[]");
  m.def("dropout_mask(Tensor seed, SymInt M, SymInt K, float p) -> Tensor");
}

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Meta: shapes and dtypes only
// ---------------------------------------------------------------------------------------------------------------------

Tensor empty_s(const Tensor& x, const Tensor& d) {
  return at::empty_symint({x.sym_size(0), padded_rank(d.sym_size(0))}, x.options());
}

std::tuple<Tensor, Tensor> rasa_linear_meta(const Tensor& x, const Tensor& weight,
                                            const OptionalTensor&, const Tensor&, const Tensor&,
                                            const Tensor&, const Tensor&, const Tensor& d, double,
                                            const OptionalTensor&) {
  return {at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options()), empty_s(x, d)};
}

std::tuple<Tensor, Tensor> rasa_add_meta(const Tensor& x, const Tensor& base, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor& d, double, const OptionalTensor&) {
  return {at::empty_symint(base.sym_sizes(), x.options()), empty_s(x, d)};
}

Gradients rasa_backward_meta(const Tensor&, const Tensor& x, const OptionalTensor&, const Tensor& A,
                             const Tensor& A_shared, const Tensor& Bt, const Tensor& Bt_shared,
                             const Tensor& d, const Tensor&, double, const OptionalTensor&,
                             WantedMask wanted) {
  const auto grad_of = [&](Wanted which, const Tensor& t) {
    return wanted[which] ? at::empty_symint(t.sym_sizes(), t.options())
                         : at::empty({0}, x.options());
  };
  return {grad_of(kDx, x),
          grad_of(kDA, A),
          grad_of(kDAShared, A_shared),
          grad_of(kDBt, Bt),
          grad_of(kDBtShared, Bt_shared),
          grad_of(kDd, d)};
}

std::vector<Tensor> grouped_gemm_meta(std::string_view layout, at::TensorList A, at::TensorList B,
                                      at::IntArrayRef segments, const OptionalTensorList&,
                                      const OptionalTensorList&, const OptionalTensorList&,
                                      std::optional<at::ScalarType> out_dtype) {
  check_group(layout, A, B, segments);
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

// ---------------------------------------------------------------------------------------------------------------------
// Autocast: activations and base weight in the autocast dtype; the adapter keeps its own
// ---------------------------------------------------------------------------------------------------------------------

template <c10::DispatchKey autocast_key, c10::DeviceType device>
struct Autocast : AutocastTo<device> {
  using AutocastTo<device>::cast, AutocastTo<device>::cast_adapter;

  static std::tuple<Tensor, Tensor> rasa_linear(const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& bias, const Tensor& A,
                                                const Tensor& A_shared, const Tensor& Bt,
                                                const Tensor& Bt_shared, const Tensor& d, double p,
                                                const OptionalTensor& seed) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rasa_ext::rasa_linear", "")
                               .typed<decltype(rasa_linear)>();
    const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key);
    return op.call(cast(x), cast(weight), bias ? OptionalTensor(cast(*bias)) : std::nullopt,
                   cast_adapter(A), cast_adapter(A_shared), cast_adapter(Bt),
                   cast_adapter(Bt_shared), cast_adapter(d), p, seed);
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
    m.impl("rasa_linear", &rasa_linear);
    m.impl("rasa_add", &rasa_add);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, CPU, m) { register_backend<cpu::launch, cpu::draw_mask>(m); }

TORCH_LIBRARY_IMPL(rasa_ext, Meta, m) {
  m.impl("rasa_linear", &rasa_linear_meta);
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

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", &rasa::cpu::cpu_capability);
  m.def("micro_kernel_dtypes", &rasa::cpu::micro_kernel_dtypes);
  m.def("set_portable", &rasa::cpu::set_portable, pybind11::arg("portable"));
  m.def("set_cpu_launcher", &rasa::cpu::set_launcher, pybind11::arg("name"));
}
