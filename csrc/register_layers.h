// One template that registers the ops on many layers for a backend, given its launcher.
#pragma once

#include <torch/library.h>

#include "layers_ops.h"

namespace rasa {

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
};

template <LaunchFn launch>
void register_layer_ops(torch::Library& m) {
  using Ops = LayerOps<launch>;
  m.impl("rasa_delta_weights", &Ops::delta_weights);
  m.impl("rasa_merge_", &Ops::merge);
}

}  // namespace rasa
