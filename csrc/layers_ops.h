// The ops that work on many layers at once: the updates of all weights, all layers' forward and
// backward, all pools' gradients. Each is one program, so a backend needs nothing new for them.
#pragma once

#include <tuple>
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

// Dropout of a list of layers: rates, and the seeds of those above 0.
struct DropoutLists {
  at::ArrayRef<double> p;
  std::vector<OptionalTensor> seeds;
};

// What a list of layers computes its updates from, and adds them to: of each layer either the
// weight, whose product with x is then computed here, or the base layer's output.
struct LayerInputs {
  at::TensorList xs;
  std::vector<OptionalTensor> weights, biases, bases;
};

// Of a list of layers and their pools, in this order: which are asked for, and what is returned.
struct GroupedGradients {
  std::vector<Tensor> dx, dA, dBt, dd, g;     // one for each layer
  std::vector<Tensor> dA_shared, dBt_shared;  // one for each pool
};
constexpr size_t num_gradients(size_t num_layers, size_t num_pools) {
  return 5 * num_layers + 2 * num_pools;
}

std::vector<Tensor> rasa_delta_weights_body(LaunchFn launch, const LayerTensors& layers);
void rasa_merge_body(LaunchFn launch, at::TensorList weights, const LayerTensors& layers);

// Returns y and s of each layer.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> rasa_grouped_linear_body(
    LaunchFn launch, const LayerInputs& inputs, const LayerTensors& layers,
    const DropoutLists& dropout);
GroupedGradients rasa_grouped_backward_body(LaunchFn launch, const std::vector<OptionalTensor>& dys,
                                            const LayerInputs& inputs, const LayerTensors& layers,
                                            at::TensorList s, const DropoutLists& dropout,
                                            const std::vector<bool>& wanted);

// What layers contribute to the gradients of their pools.
struct PoolContributions {
  at::TensorList xs, dys, g, s, d;
  at::IntArrayRef pools;
};
// dA_shared += Σ d ∘rows gᵀ·x̃ and dBt_shared += Σ d ∘rows sᵀ·dy over the layers of each pool. A
// gradient without rows is not wanted.
void rasa_pool_gradients_body(LaunchFn launch, at::TensorList dA_shared, at::TensorList dBt_shared,
                              const PoolContributions& layers, const DropoutLists& dropout);

}  // namespace rasa
