// The op bodies: check, allocate, describe as a Program, launch. Written once and given a launcher,
// so that a backend is one more launcher and checks and allocation cannot differ between backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "dropout_mask.h"
#include "gemm_problem.h"

namespace rasa {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Columns of s and g: R rounded up, so that a row of 7, 14 or 28 ranks starts at a 16-byte
// boundary.
template <class Int>
Int padded_rank(Int R) {
  return (R + 7) / 8 * 8;
}

// The gradients of a call are one list: dx, then these of each layer.
enum Grad { kDA, kDAShared, kDBt, kDBtShared, kDd, kNumGrads };
constexpr size_t gradient(size_t layer, size_t which) { return 1 + layer * kNumGrads + which; }
constexpr size_t num_gradients(size_t num_layers) { return gradient(num_layers, 0); }

// The adapters of the layers of one op call: entry i of each list is of layer i.
struct Adapters {
  at::TensorList A, A_shared, Bt, Bt_shared, d;
};

// Layers that are fed the same x: it is read once, and one mask serves all.
std::tuple<std::vector<Tensor>, Tensor> rasa_linears_body(LaunchFn launch, const Tensor& x,
                                                          at::TensorList weight,
                                                          const std::vector<OptionalTensor>& bias,
                                                          const Adapters& adapters, double p,
                                                          const OptionalTensor& seed);
std::tuple<Tensor, Tensor> rasa_add_body(LaunchFn launch, const Tensor& x, const Tensor& base,
                                         const Adapters& adapter, double p,
                                         const OptionalTensor& seed);
// Of layers without weight (rasa_add) dx has the adapter's share only; layers without dy have none.
std::vector<Tensor> rasa_backward_body(LaunchFn launch, const std::vector<OptionalTensor>& dy,
                                       const Tensor& x, const std::vector<OptionalTensor>& weight,
                                       const Adapters& adapters, const Tensor& s, double p,
                                       const OptionalTensor& seed, const std::vector<bool>& wanted);
// What Autograd and Meta must check too: they index the lists.
void check_linears_lists(size_t num_layers, size_t num_biases, const Adapters& adapters);
void check_backward_lists(size_t num_layers, const Adapters& adapters, size_t num_wanted);
void check_group(std::string_view layout, at::TensorList A, at::TensorList B,
                 at::IntArrayRef segments);
std::vector<Tensor> grouped_gemm_body(LaunchFn launch, std::string_view layout, at::TensorList A,
                                      at::TensorList B, at::IntArrayRef segments,
                                      const std::vector<OptionalTensor>& C_in,
                                      const std::vector<OptionalTensor>& scale_m,
                                      const std::vector<OptionalTensor>& scale_k,
                                      std::optional<at::ScalarType> out_dtype);
Tensor dropout_mask_body(DrawMaskFn draw_mask, const Tensor& seed, int64_t M, int64_t K, double p);

}  // namespace rasa
