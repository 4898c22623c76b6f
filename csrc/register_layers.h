// One template that registers the ops on many layers for a backend, given its launcher.
#pragma once

#include <torch/library.h>

#include "layers_ops.h"

namespace rasa {

using OptionalTensorList = c10::List<OptionalTensor>;

// None may also come as an undefined tensor.
inline std::vector<OptionalTensor> to_vector(const OptionalTensorList& list) {
  std::vector<OptionalTensor> result;
  for (const OptionalTensor t : list) {
    result.push_back(t && t->defined() ? t : std::nullopt);
  }
  return result;
}

using GradientLists =
    std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
               std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

inline GradientLists to_lists(GroupedGradients g) {
  return {g.dx, g.dA, g.dBt, g.dd, g.g, g.dA_shared, g.dBt_shared};
}

template <LaunchFn launch>
struct LayerOps {
  static std::vector<Tensor> delta_weights(at::TensorList A, at::TensorList Bt, at::TensorList d,
                                           at::TensorList A_shared, at::TensorList Bt_shared,
                                           at::IntArrayRef pools) {
    return rasa_delta_weights_body(launch, {A, Bt, d, A_shared, Bt_shared, pools});
  }

  static void merge(at::TensorList weights, at::TensorList A, at::TensorList Bt, at::TensorList d,
                    at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools) {
    rasa_merge_body(launch, weights, {A, Bt, d, A_shared, Bt_shared, pools});
  }

  static std::tuple<std::vector<Tensor>, std::vector<Tensor>> grouped_linear(
      at::TensorList xs, const OptionalTensorList& weights, const OptionalTensorList& biases,
      const OptionalTensorList& bases, at::TensorList A, at::TensorList Bt, at::TensorList d,
      at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools,
      at::ArrayRef<double> p, const OptionalTensorList& seeds) {
    return rasa_grouped_linear_body(launch,
                                    {xs, to_vector(weights), to_vector(biases), to_vector(bases)},
                                    {A, Bt, d, A_shared, Bt_shared, pools}, {p, to_vector(seeds)});
  }

  static GradientLists grouped_backward(const OptionalTensorList& dys, at::TensorList xs,
                                        const OptionalTensorList& weights, at::TensorList A,
                                        at::TensorList Bt, at::TensorList d,
                                        at::TensorList A_shared, at::TensorList Bt_shared,
                                        at::IntArrayRef pools, at::TensorList s,
                                        at::ArrayRef<double> p, const OptionalTensorList& seeds,
                                        const c10::List<bool>& output_mask) {
    return to_lists(
        rasa_grouped_backward_body(launch, to_vector(dys), {xs, to_vector(weights), {}, {}},
                                   {A, Bt, d, A_shared, Bt_shared, pools}, s, {p, to_vector(seeds)},
                                   {output_mask.begin(), output_mask.end()}));
  }

  static void pool_gradients(at::TensorList dA_shared, at::TensorList dBt_shared, at::TensorList xs,
                             at::TensorList dys, at::TensorList g, at::TensorList s,
                             at::TensorList d, at::IntArrayRef pools, at::ArrayRef<double> p,
                             const OptionalTensorList& seeds) {
    rasa_pool_gradients_body(launch, dA_shared, dBt_shared, {xs, dys, g, s, d, pools},
                             {p, to_vector(seeds)});
  }
};

template <LaunchFn launch>
void register_layer_ops(torch::Library& m) {
  using Ops = LayerOps<launch>;
  m.impl("rasa_delta_weights", &Ops::delta_weights);
  m.impl("rasa_merge_", &Ops::merge);
  m.impl("rasa_grouped_linear", &Ops::grouped_linear);
  m.impl("rasa_grouped_backward", &Ops::grouped_backward);
  m.impl("rasa_pool_gradients_", &Ops::pool_gradients);
}

}  // namespace rasa
