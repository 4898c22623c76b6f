// A program as torch ops: blocks become views of their memory, every pair of blocks that meet in a
// product is one addmm_, and nothing is concatenated.
#include "library_gemm.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <vector>

namespace rasa {
namespace {

using at::Tensor;

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return at::kDouble;
    case DType::kF32:
      return at::kFloat;
    case DType::kBF16:
      return at::kBFloat16;
    default:
      return at::kHalf;
  }
}

class LibraryGemm {
 public:
  LibraryGemm(const Program& program, at::Device device, DrawMaskFn draw_mask)
      : program_(program),
        device_(device),
        draw_mask_(draw_mask),
        sum_type_(program.dtype == DType::kF64 ? at::kDouble : at::kFloat) {}

  void run(Layout layout, const Problem& p) const {
    if (p.M == 0 || p.N == 0) return;
    if (p.is_diagonal) return write_diagonal(p);
    if (sums_in_C(layout, p)) {
      for (const Part& C : parts(p.C, p.N, 0, p.M)) {
        start_sum(C.rows, p, C.row);
        for (int32_t i = 0; i < p.num_segments; ++i) add_product(C.rows, layout, p, i, C.row);
      }
      return;
    }
    const Tensor total = zeros({p.M, p.N});
    for (int32_t i = 0; i < p.num_segments; ++i) {
      const Tensor sum = p.num_segments == 1 ? total : zeros({p.M, p.N});
      add_product(sum, layout, p, i, 0);
      if (drops(p) && layout == Layout::kNN) {
        sum.masked_fill_(dropped(p, i, p.M, p.N), 0).mul_(keep_scale(p.drop_threshold));
      }
      if (const void* scale_m = segment(p, i).scale_m) sum.mul_(scale(scale_m, p.M).unsqueeze(1));
      if (p.num_segments > 1) total.add_(sum);
    }
    for (const Part& C : parts(p.C, p.N, 0, p.M)) {
      const Tensor rows = total.narrow(0, C.row, C.rows.size(0));
      add_C_in(rows, p, C.row);
      C.rows.copy_(rows);
    }
  }

 private:
  // Rows of a stack that exist in memory, from `row` of the stack on.
  struct Part {
    int64_t row;
    Tensor rows;
    int64_t end() const { return row + rows.size(0); }
  };

  static bool drops(const Problem& p) { return p.drop_threshold > 0; }
  const Segment& segment(const Problem& p, int32_t i) const {
    return program_.segments[p.first_segment + i];
  }

  Tensor zeros(at::IntArrayRef sizes) const {
    return at::zeros(sizes, at::TensorOptions(device_).dtype(sum_type_));
  }

  Tensor view(const void* data, DType dtype, at::IntArrayRef sizes, at::IntArrayRef strides) const {
    return at::for_blob(const_cast<void*>(data), sizes)
        .strides(strides)
        .options(at::TensorOptions(device_).dtype(scalar_type(dtype)))
        .target_device(device_)
        .make_tensor();
  }

  Tensor scale(const void* data, int64_t size) const {
    return view(data, program_.scale_dtype, {size}, {1}).to(sum_type_);
  }

  // What of the stack's rows [begin, end) is in memory; the rest reads as zeros.
  std::vector<Part> parts(const Matrix& m, int64_t cols, int64_t begin, int64_t end) const {
    std::vector<Part> found;
    int64_t row = 0;
    for (int32_t i = 0; i < m.num_blocks; ++i) {
      const Block& block = program_.blocks[m.first_block + i];
      const int64_t first = std::max(row, begin), last = std::min(row + block.rows, end);
      if (block.ptr != nullptr && first < last) {
        const char* data =
            static_cast<const char*>(block.ptr) + (first - row) * block.ld * element_size(m.dtype);
        found.push_back({first, view(data, m.dtype, {last - first, cols}, {block.ld, 1})});
      }
      row += block.rows;
    }
    return found;
  }

  bool sums_in_C(Layout layout, const Problem& p) const {
    bool has_scale_m = false;
    for (int32_t i = 0; i < p.num_segments; ++i) has_scale_m |= segment(p, i).scale_m != nullptr;
    return scalar_type(p.C.dtype) == sum_type_ && !has_scale_m &&
           !(drops(p) && layout == Layout::kNN);
  }

  // True where an element of the (tokens, features) matrix is dropped.
  Tensor dropped(const Problem& p, int32_t i, int64_t tokens, int64_t features) const {
    const Tensor kept = at::empty({tokens, features}, at::TensorOptions(device_).dtype(at::kBool));
    draw_mask_({segment(p, i).seed, p.drop_threshold, static_cast<int32_t>(tokens),
                static_cast<int32_t>(features), kept.mutable_data_ptr<bool>()});
    return kept.logical_not_();
  }

  // out (m,N) += op(A)·op(B), from row m0 of the product on, without the factor of the sum in NN.
  void add_product(const Tensor& out, Layout layout, const Problem& p, int32_t i,
                   int64_t m0) const {
    const Segment& s = segment(p, i);
    const int64_t m = out.size(0);
    const double keep = keep_scale(p.drop_threshold);
    const auto scaled = [&](const Tensor& rows, int64_t k, int64_t count) {  // along the last axis
      const Tensor t = rows.to(sum_type_);
      if (s.scale_k == nullptr) return t;
      const char* first = static_cast<const char*>(s.scale_k);
      return t.mul(scale(first + k * element_size(program_.scale_dtype), count));
    };
    if (layout == Layout::kNT) {
      const Tensor mask = drops(p) ? dropped(p, i, p.M, s.K) : Tensor();
      for (const Part& A : parts(s.A, s.K, m0, m0 + m)) {
        Tensor a = A.rows.to(sum_type_);
        if (drops(p)) a = a.masked_fill(mask.narrow(0, A.row, a.size(0)), 0);
        for (const Part& B : parts(s.B, s.K, 0, p.N)) {
          out.narrow(0, A.row - m0, a.size(0))
              .narrow(1, B.row, B.rows.size(0))
              .addmm_(a, scaled(B.rows, 0, s.K).t(), 1, keep);
        }
      }
    } else if (layout == Layout::kNN) {
      for (const Part& A : parts(s.A, s.K, m0, m0 + m)) {
        for (const Part& B : parts(s.B, p.N, 0, s.K)) {
          const int64_t k = B.rows.size(0);
          out.narrow(0, A.row - m0, A.rows.size(0))
              .addmm_(A.rows.narrow(1, B.row, k).to(sum_type_), scaled(B.rows.t(), B.row, k).t());
        }
      }
    } else {
      const Tensor mask = drops(p) ? dropped(p, i, s.K, p.N) : Tensor();
      for (const Part& A : parts(s.A, p.M, 0, s.K)) {
        for (const Part& B : parts(s.B, p.N, A.row, A.end())) {
          const int64_t k = B.rows.size(0);
          Tensor b = scaled(B.rows.t(), B.row, k).t();
          if (drops(p)) b = b.masked_fill(mask.narrow(0, B.row, k), 0);
          const Tensor a = A.rows.narrow(0, B.row - A.row, k).narrow(1, m0, m).to(sum_type_);
          out.addmm_(a.t(), b, 1, keep);
        }
      }
    }
  }

  // rows: of C, from `row` of its stack on.
  void start_sum(const Tensor& rows, const Problem& p, int64_t row) const {
    const std::vector<Part> C_in = parts(p.C_in, p.N, row, row + rows.size(0));
    const bool is_whole = C_in.size() == 1 && C_in[0].rows.size(0) == rows.size(0);
    if (is_whole && C_in[0].rows.const_data_ptr() == rows.const_data_ptr()) return;  // in place
    if (!is_whole) rows.zero_();
    for (const Part& part : C_in) {
      rows.narrow(0, part.row - row, part.rows.size(0)).copy_(part.rows);
    }
  }

  void add_C_in(const Tensor& rows, const Problem& p, int64_t row) const {
    for (const Part& C_in : parts(p.C_in, p.N, row, row + rows.size(0))) {
      rows.narrow(0, C_in.row - row, C_in.rows.size(0)).add_(C_in.rows);
    }
  }

  void write_diagonal(const Problem& p) const {
    const Segment& s = segment(p, 0);
    const Tensor sum = zeros({1, p.M});
    for (const Part& A : parts(s.A, p.M, 0, s.K)) {
      for (const Part& B : parts(s.B, p.M, A.row, A.end())) {
        const Tensor a = A.rows.narrow(0, B.row - A.row, B.rows.size(0)).to(sum_type_);
        sum.add_(a.mul(B.rows).sum(0, /*keepdim=*/true));
      }
    }
    for (const Part& C : parts(p.C, p.M, 0, 1)) C.rows.copy_(sum);
  }

  const Program& program_;
  const at::Device device_;
  const DrawMaskFn draw_mask_;
  const at::ScalarType sum_type_;
};

}  // namespace

void library_gemm(const Program& program, at::Device device, DrawMaskFn draw_mask) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const LibraryGemm gemm(program, device, draw_mask);
  for (const Group& group : program.groups) {
    for (int32_t i = 0; i < group.num_problems; ++i) {
      gemm.run(group.layout, program.problems[group.first_problem + i]);
    }
  }
}

}  // namespace rasa
