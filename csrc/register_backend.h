// One template that registers every op of a backend, given its two functions. An op is added here
// once, and every backend has it.
#pragma once

#include <torch/library.h>

#include "rasa_ops.h"
#include "register_layers.h"

namespace rasa {

template <LaunchFn launch, DrawMaskFn draw_mask>
struct BackendOps {
  static std::tuple<std::vector<Tensor>, Tensor> rasa_linears(
      const Tensor& x, at::TensorList weight, const OptionalTensorList& bias, at::TensorList A,
      at::TensorList A_shared, at::TensorList Bt, at::TensorList Bt_shared, at::TensorList d,
      double p, const OptionalTensor& seed) {
    return rasa_linears_body(launch, x, weight, to_vector(bias), {A, A_shared, Bt, Bt_shared, d}, p,
                             seed);
  }

  static std::tuple<Tensor, Tensor> rasa_add(const Tensor& x, const Tensor& base, const Tensor& A,
                                             const Tensor& A_shared, const Tensor& Bt,
                                             const Tensor& Bt_shared, const Tensor& d, double p,
                                             const OptionalTensor& seed) {
    return rasa_add_body(launch, x, base, {A, A_shared, Bt, Bt_shared, d}, p, seed);
  }

  static std::vector<Tensor> rasa_backward(const OptionalTensorList& dy, const Tensor& x,
                                           const OptionalTensorList& weight, at::TensorList A,
                                           at::TensorList A_shared, at::TensorList Bt,
                                           at::TensorList Bt_shared, at::TensorList d,
                                           const Tensor& s, double p, const OptionalTensor& seed,
                                           const c10::List<bool>& wanted) {
    return rasa_backward_body(launch, to_vector(dy), x, to_vector(weight),
                              {A, A_shared, Bt, Bt_shared, d}, s, p, seed,
                              {wanted.begin(), wanted.end()});
  }

  static std::vector<Tensor> grouped_gemm(std::string_view layout, at::TensorList A,
                                          at::TensorList B, at::IntArrayRef segments,
                                          const OptionalTensorList& C_in,
                                          const OptionalTensorList& scale_m,
                                          const OptionalTensorList& scale_k,
                                          std::optional<at::ScalarType> out_dtype) {
    return grouped_gemm_body(launch, layout, A, B, segments, to_vector(C_in), to_vector(scale_m),
                             to_vector(scale_k), out_dtype);
  }

  static Tensor dropout_mask(const Tensor& seed, int64_t M, int64_t K, double p) {
    return dropout_mask_body(draw_mask, seed, M, K, p);
  }
};

template <LaunchFn launch, DrawMaskFn draw_mask>
void register_backend(torch::Library& m) {
  using Ops = BackendOps<launch, draw_mask>;
  m.impl("rasa_linears", &Ops::rasa_linears);
  m.impl("rasa_add", &Ops::rasa_add);
  m.impl("rasa_backward", &Ops::rasa_backward);
  m.impl("grouped_gemm", &Ops::grouped_gemm);
  m.impl("dropout_mask", &Ops::dropout_mask);
  register_layer_ops<launch>(m);
}

}  // namespace rasa
