// The ops that work on many layers at once: the updates of all weights, all layers' forward and
// backward, all pools' gradients. Each is one program, so a backend needs nothing new for them.
#pragma once

#include <vector>

#include "rasa_ops.h"

namespace rasa {

// The adapters of a list of layers. Pools are given once; pools[i] is the index of layer i's pool
// in A_shared and Bt_shared, or -1 where it has none.
struct LayerTensors {
  at::TensorList A, Bt, d;
  at::TensorList A_shared, Bt_shared;
  at::IntArrayRef pools;

  size_t num_layers() const { return A.size(); }
  size_t num_pools() const { return A_shared.size(); }
};

// What Meta must check too: it indexes the lists.
void check_lists(const char* op, const LayerTensors& layers);

// The dtype in which updates are summed and returned.
inline at::ScalarType delta_dtype(at::ScalarType adapter_dtype) {
  return adapter_dtype == at::kDouble ? at::kDouble : at::kFloat;
}

std::vector<Tensor> rasa_delta_weights_body(LaunchFn launch, const LayerTensors& layers);
void rasa_merge_body(LaunchFn launch, at::TensorList weights, const LayerTensors& layers);

}  // namespace rasa
