// The bodies of the ops on the updates of many layers: as matrices, and added to the weights.
#include "layers_ops.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "adapter_list.h"

namespace rasa {
namespace {

// C (N,K) += [Bt_shared ; Bt]ᵀ · diag(d) · [A_shared ; A]; C_in, where there is one, is C.
void add_update(ProgramBuilder& builder, const Adapter& adapter, const Tensor& C, bool has_C_in) {
  Problem& update = builder.add_problem(C.size(0), C.size(1));
  update.C = builder.matrix(C);
  if (has_C_in) update.C_in = update.C;
  builder
      .add_segment(builder.stack({&adapter.Bt_shared, &adapter.Bt}),
                   builder.stack({&adapter.A_shared, &adapter.A}), adapter.d.size(0))
      .scale_k = data(adapter.d);
}

// Where a matrix lies: `rows` runs of `width` bytes, each `stride` bytes after the one before. They
// are the matrix's rows or its columns, whichever are further apart.
struct Extent {
  const char* begin;
  int64_t rows, width, stride;
  bool is_dense;  // no element of a row lies on another
  const char* end() const { return begin + (rows - 1) * stride + width; }

  explicit Extent(const Tensor& t) {
    const int64_t outer = t.size(1) == 1 || (t.size(0) > 1 && t.stride(0) >= t.stride(1)) ? 0 : 1;
    const int64_t element = t.element_size(), inner = t.size(1 - outer);
    begin = static_cast<const char*>(t.const_data_ptr());
    rows = t.size(outer);
    width = ((inner - 1) * t.stride(1 - outer) + 1) * element;
    stride = rows == 1 ? width : t.stride(outer) * element;
    is_dense = inner == 1 || t.stride(1 - outer) > 0;
  }

  bool overlaps_itself() const { return !is_dense || stride < width; }

  // Of a matrix that begins no earlier. Exact for two of one stride, as the columns of one matrix
  // have; of any others, that one begins before the other ends.
  bool overlaps(const Extent& other) const {
    if (other.begin >= end()) return false;
    const int64_t column = (other.begin - begin) % stride;
    const bool is_of_one_stride = stride == other.stride || other.rows == 1;
    return !is_of_one_stride || column < width || column + other.width > stride;
  }
};

// Weights are written while others are read, on any number of threads.
void check_apart(const char* op, const std::vector<Tensor>& weights) {
  std::vector<Extent> extents;
  for (const Tensor& weight : weights) extents.emplace_back(weight);
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < extents.size(); ++i) {
    TORCH_CHECK(!extents[i].overlaps_itself(), op,
                ": weights must not overlap themselves: an element would get two updates. Call "
                ".contiguous()");
    for (size_t j = i + 1; j < extents.size() && extents[j].begin < extents[i].end(); ++j) {
      TORCH_CHECK(!extents[i].overlaps(extents[j]), op,
                  ": weights must not share memory: a tied weight would get two updates. Untie "
                  "them");
    }
  }
}

}  // namespace

void check_lists(const char* op, const LayerTensors& layers) {
  check_length(op, layers.Bt, "Bt", layers.num_layers());
  check_length(op, layers.d, "d", layers.num_layers());
  check_length(op, layers.pools, "pools", layers.num_layers());
  TORCH_CHECK(layers.Bt_shared.size() == layers.num_pools(), op,
              ": Bt_shared must have one entry for each pool = ", layers.num_pools(), ", got ",
              layers.Bt_shared.size());
  for (const int64_t pool : layers.pools) {
    TORCH_CHECK(pool >= -1 && pool < static_cast<int64_t>(layers.num_pools()), op,
                ": pools must be -1 (no pool) or the index of one of ", layers.num_pools(),
                " pools, got ", pool);
  }
}

std::vector<Tensor> rasa_delta_weights_body(LaunchFn launch, const LayerTensors& layers) {
  constexpr const char* op = "rasa_delta_weights";
  const AdapterList adapters(op, layers);
  if (layers.num_layers() == 0) return {};
  const Tensor& first = layers.A[0];
  const c10::DeviceGuard guard(first.device());
  TORCH_CHECK(is_supported(first.scalar_type()), op,
              ": A must be float32, float64, bfloat16 or float16, got ",
              at::toString(first.scalar_type()));
  const at::ScalarType dtype = delta_dtype(first.scalar_type());

  std::vector<Tensor> deltas;
  ProgramBuilder builder(op, dtype, first.scalar_type());
  builder.require_full_precision();  // once for a model's life, and all errors stay
  builder.begin_group(Layout::kTN);
  for (size_t i = 0; i < layers.num_layers(); ++i) {
    const Adapter adapter = adapters[i];
    const std::string layer = of_layer(op, i);
    check_dim(layer.c_str(), adapter.A, "A", "(Rp, K)", 2);
    check_dim(layer.c_str(), adapter.Bt, "Bt", "(Rp, N)", 2);
    check_like_first(layer.c_str(), adapter.A, "A", first);
    const Sizes z = check_adapter(layer.c_str(), adapter.A, adapter.Bt.size(1), adapter, "A");
    deltas.push_back(at::empty({z.N, z.K}, first.options().dtype(dtype)));
    add_update(builder, adapter, deltas.back(), /*has_C_in=*/false);
  }
  launch(builder.program());
  return deltas;
}

void rasa_merge_body(LaunchFn launch, at::TensorList weights, const LayerTensors& layers) {
  constexpr const char* op = "rasa_merge_";
  const AdapterList adapters(op, layers);
  check_length(op, weights, "weights", layers.num_layers());
  if (weights.empty()) return;
  const Tensor& first = layers.A[0];
  const c10::DeviceGuard guard(first.device());

  std::vector<std::pair<Tensor, Tensor>> merged;  // each weight, and itself or a row-major copy
  std::vector<Tensor> written;
  ProgramBuilder builder(op, delta_dtype(first.scalar_type()), first.scalar_type());
  builder.require_full_precision();  // once for a model's life, and all errors stay
  builder.begin_group(Layout::kTN);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Adapter adapter = adapters[i];
    const Tensor& weight = weights[i];
    const std::string layer = of_layer(op, i);
    check_dim(layer.c_str(), weight, "weight", "(N, K)", 2);
    TORCH_CHECK(is_supported(weight.scalar_type()), layer,
                ": weight must be float32, float64, bfloat16 or float16, got ",
                at::toString(weight.scalar_type()));
    check_like_first(layer.c_str(), adapter.A, "A", first);
    const Sizes z = check_adapter(layer.c_str(), weight, weight.size(0), adapter, "weight");
    if (z.R() == 0 || weight.numel() == 0) continue;
    weight.mutable_data_ptr();  // of its own, should it share memory lazily
    written.push_back(weight);
    merged.emplace_back(weight, row_major(weight));
    add_update(builder, adapter, merged.back().second, /*has_C_in=*/true);
  }
  check_apart(op, written);
  launch(builder.program());
  for (const auto& [weight, rows] : merged) {
    if (!rows.is_same(weight)) weight.copy_(rows);
  }
}

}  // namespace rasa
