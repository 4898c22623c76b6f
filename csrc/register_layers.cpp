// The schemas of the ops on many layers, and their Meta and Autocast kernels.
#include "register_layers.h"

#include <ATen/Functions.h>

namespace rasa {

TORCH_LIBRARY_FRAGMENT(rasa_ext, m) {
  m.def(
      "rasa_delta_weights(Tensor[] A, Tensor[] Bt, Tensor[] d, Tensor[] A_shared, "
      "Tensor[] Bt_shared, int[] pools) -> Tensor[]");
  m.def(
      "rasa_merge_(Tensor(a!)[] weights, Tensor[] A, Tensor[] Bt, Tensor[] d, Tensor[] A_shared, "
      "Tensor[] Bt_shared, int[] pools) -> ()");
}

namespace {

std::vector<Tensor> delta_weights_meta(at::TensorList A, at::TensorList Bt, at::TensorList d,
                                       at::TensorList A_shared, at::TensorList Bt_shared,
                                       at::IntArrayRef pools) {
  check_lists("rasa_delta_weights", {A, Bt, d, A_shared, Bt_shared, pools});
  std::vector<Tensor> deltas;
  for (size_t i = 0; i < A.size(); ++i) {
    deltas.push_back(at::empty_symint({Bt[i].sym_size(1), A[i].sym_size(1)},
                                      A[i].options().dtype(delta_dtype(A[i].scalar_type()))));
  }
  return deltas;
}

void merge_meta(at::TensorList, at::TensorList A, at::TensorList Bt, at::TensorList d,
                at::TensorList A_shared, at::TensorList Bt_shared, at::IntArrayRef pools) {
  check_lists("rasa_merge_", {A, Bt, d, A_shared, Bt_shared, pools});
}

}  // namespace

TORCH_LIBRARY_IMPL(rasa_ext, Meta, m) {
  m.impl("rasa_delta_weights", &delta_weights_meta);
  m.impl("rasa_merge_", &merge_meta);
}

}  // namespace rasa
