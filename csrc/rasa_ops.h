// The op bodies: check, allocate, describe as a Program, launch. Written once and given a launcher,
// so that a backend is one more launcher and checks and allocation cannot differ between backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "dropout_mask.h"
#include "gemm_problem.h"

namespace rasa {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Columns of s and g: R rounded up, so that a row of 7, 14 or 28 ranks starts at a 16-byte
// boundary.
template <class Int>
Int padded_rank(Int R) {
  return (R + 7) / 8 * 8;
}

// Which gradients a backward op is asked for, in the order in which it returns them.
enum Wanted { kDx, kDA, kDAShared, kDBt, kDBtShared, kDd, kNumWanted };
using WantedMask = std::array<bool, kNumWanted>;

// The adapter of one layer, as it travels through every op.
struct Adapter {
  const Tensor &A, &A_shared, &Bt, &Bt_shared, &d;
};

std::tuple<Tensor, Tensor> rasa_linear_body(LaunchFn launch, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, const Adapter& adapter,
                                            double p, const OptionalTensor& seed);
std::tuple<Tensor, Tensor> rasa_add_body(LaunchFn launch, const Tensor& x, const Tensor& base,
                                         const Adapter& adapter, double p,
                                         const OptionalTensor& seed);
Gradients rasa_backward_body(LaunchFn launch, const Tensor& dy, const Tensor& x,
                             const OptionalTensor& weight, const Adapter& adapter, const Tensor& s,
                             double p, const OptionalTensor& seed, WantedMask wanted);
// What Meta must check too: it indexes the lists.
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
