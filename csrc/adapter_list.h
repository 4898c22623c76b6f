// The inputs of the ops on many layers, checked: lists of equal length, each layer's adapter.
#pragma once

#include <ATen/Functions.h>

#include <string>
#include <vector>

#include "layers_ops.h"
#include "op_inputs.h"

namespace rasa {

template <class List>
void check_length(const char* op, const List& list, const char* name, size_t num_layers) {
  check_entries(op, name, list.size(), num_layers);
}

// The adapters one by one, with an empty pool for layers without one.
class AdapterList {
 public:
  AdapterList(const char* op, const LayerTensors& layers) : layers_(layers) {
    check_lists(op, layers);
    for (size_t i = 0; i < layers.num_layers(); ++i) {
      const bool has_pool = layers.pools[i] >= 0;
      if (!has_pool) {
        check_dim(op, layers.A[i], "A", "(Rp, K)", 2);
        check_dim(op, layers.Bt[i], "Bt", "(Rp, N)", 2);
      }
      const auto none = [&](const Tensor& t) {
        return has_pool ? Tensor() : at::empty({0, t.size(1)}, t.options());
      };
      no_A_shared_.push_back(none(layers.A[i]));
      no_Bt_shared_.push_back(none(layers.Bt[i]));
    }
  }

  Adapter operator[](size_t i) const {
    const int64_t pool = layers_.pools[i];
    return {layers_.A[i], pool < 0 ? no_A_shared_[i] : layers_.A_shared[pool], layers_.Bt[i],
            pool < 0 ? no_Bt_shared_[i] : layers_.Bt_shared[pool], layers_.d[i]};
  }

 private:
  LayerTensors layers_;
  std::vector<Tensor> no_A_shared_, no_Bt_shared_;
};

// "rasa_merge_: layer 3", so that a message says which entry of the lists is wrong.
inline std::string of_layer(const char* op, size_t i) {
  return std::string(op) + ": layer " + std::to_string(i);
}

inline void check_like_first(const char* op, const Tensor& t, const char* name,
                             const Tensor& first) {
  check_dtype(op, t, name, first.scalar_type(), "the first layer's");
  TORCH_CHECK(t.device() == first.device(), op, ": ", name, " must be on the first layer's device ",
              first.device(), ", got ", t.device());
}

}  // namespace rasa
