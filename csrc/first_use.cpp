// The programs of the check at first use, and what they may be wrong by.
#include "first_use.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <string_view>

#include "cpu/dropout_mask.h"
#include "library_gemm.h"
#include "program_builder.h"

namespace rasa {
namespace {

using at::Tensor;

constexpr double kDropout = 0.25;
constexpr int64_t kSeed = 2024;
constexpr int64_t kLastBlock = 7;  // rows of the last block of a stack of two
constexpr int64_t kGap = 3;        // rows before it that are nowhere in memory

// One problem. Sizes end inside a tile in every dimension, and reductions over features or tokens
// outlast the stages of a pipeline.
struct Case {
  const char* form;
  Layout layout;
  int64_t M, N;
  std::vector<int64_t> K;  // of the segments
  bool drops = false;
  bool scales_k = false;
  bool scales_m = false;
  bool has_diagonal = false;  // beside it, as dd beside dBt
  bool has_f32_ranks = false;
  bool has_gap = false;  // in B, as between the ranks of layers that share x
};

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const int64_t R : {39, 78, 156}) {
    for (const bool drops : {false, true}) {
      cases.push_back({.form = "shrink", .layout = Layout::kNT, .M = 200, .N = R, .K = {328}});
      cases.back().drops = drops;
      cases.push_back({.form = "expand", .layout = Layout::kNN, .M = 200, .N = 136, .K = {R}});
      cases.back().drops = drops;
      cases.back().scales_k = true;
      cases.push_back({.form = "wgrad", .layout = Layout::kTN, .M = R, .N = 136, .K = {328}});
      cases.back().drops = drops;
      cases.back().scales_m = cases.back().has_diagonal = true;
    }
  }
  // The widest rank beside few tokens, whose tiles are smaller; a sum of unscaled segments.
  for (const bool drops : {false, true}) {
    cases.push_back({.form = "shrink", .layout = Layout::kNT, .M = 70, .N = 156, .K = {328}});
    cases.push_back({.form = "expand", .layout = Layout::kNN, .M = 70, .N = 136, .K = {156}});
    cases.push_back({.form = "expand", .layout = Layout::kNN, .M = 70, .N = 136, .K = {39, 7}});
    for (size_t i = cases.size() - 3; i < cases.size(); ++i) cases[i].drops = drops;
  }
  // Reductions long enough to be split.
  cases.push_back({.form = "shrink", .layout = Layout::kNT, .M = 70, .N = 39, .K = {2000}});
  cases.push_back({.form = "wgrad", .layout = Layout::kTN, .M = 39, .N = 136, .K = {2000}});
  for (const int64_t R : {39, 156, 200}) {
    cases.push_back({.form = "merge", .layout = Layout::kTN, .M = 200, .N = 136, .K = {R}});
    cases.back().scales_k = true;
  }
  // Sums of segments, each with a scale of its rows.
  for (const bool drops : {false, true}) {
    cases.push_back({.form = "shrink", .layout = Layout::kNT, .M = 70, .N = 39, .K = {40, 328}});
    cases.push_back({.form = "expand", .layout = Layout::kNN, .M = 70, .N = 136, .K = {39, 7}});
    cases.push_back({.form = "wgrad", .layout = Layout::kTN, .M = 39, .N = 136, .K = {40, 328}});
    cases.push_back({.form = "wgrad", .layout = Layout::kTN, .M = 128, .N = 136, .K = {40, 328}});
    for (size_t i = cases.size() - 4; i < cases.size(); ++i) {
      cases[i].scales_m = true;
      cases[i].drops = drops;
    }
  }
  // Rows that no 16-byte load may read, and ranks in float32.
  cases.push_back({.form = "shrink", .layout = Layout::kNT, .M = 33, .N = 14, .K = {61}});
  cases.push_back({.form = "expand", .layout = Layout::kNN, .M = 33, .N = 61, .K = {14}});
  cases.push_back({.form = "wgrad", .layout = Layout::kTN, .M = 14, .N = 61, .K = {33}});
  for (size_t i = cases.size() - 3; i < cases.size(); ++i) {
    cases[i].drops = cases[i].scales_k = cases[i].has_f32_ranks = true;
  }
  // A gap among the ranks, between neighbours that 16-bit formats may keep as pairs.
  cases.push_back({.form = "shrink", .layout = Layout::kNT, .M = 70, .N = 40, .K = {328}});
  cases.push_back({.form = "expand", .layout = Layout::kNN, .M = 70, .N = 136, .K = {40}});
  for (size_t i = cases.size() - 2; i < cases.size(); ++i) cases[i].has_gap = true;
  return cases;
}

struct SegmentInputs {
  Tensor A, B, scale_k, scale_m;
};
struct Inputs {
  std::vector<SegmentInputs> segments;
  Tensor C_in, diagonal_B, seed;
};

// Dtypes of a run: of most operands, and of what belongs to the adapter.
struct Types {
  at::ScalarType main, adapter;
};

at::ScalarType scalar_type(Products products) {
  return products == Products::kF64    ? at::kDouble
         : products == Products::kBF16 ? at::kBFloat16
         : products == Products::kF16  ? at::kHalf
                                       : at::kFloat;
}

// In full precision there are merges alone.
bool has(Products products, const Case& c) {
  return products != Products::kFullPrecision || std::string_view(c.form) == "merge";
}

// Normal values that the dtypes can hold, as float64 on the CPU.
Inputs make_inputs(const Case& c, const Types& types) {
  at::Generator draw = at::detail::createCPUGenerator(kSeed);
  const auto normal = [&](at::IntArrayRef sizes, at::ScalarType type, double scale = 1) {
    return at::randn(sizes, draw, at::TensorOptions(at::kCPU).dtype(at::kDouble))
        .mul_(scale)
        .to(type)
        .to(at::kDouble);
  };
  const bool is_wgrad = c.layout == Layout::kTN;
  const at::ScalarType B_type = is_wgrad ? types.main : types.adapter;
  const at::ScalarType C_type = is_wgrad ? types.adapter : types.main;
  Inputs in;
  for (const int64_t K : c.K) {
    SegmentInputs s;
    s.A = is_wgrad ? normal({K, c.M}, types.main) : normal({c.M, K}, types.main);
    const double scale = 1 / std::sqrt(static_cast<double>(K));
    s.B =
        c.layout == Layout::kNT ? normal({c.N, K}, B_type, scale) : normal({K, c.N}, B_type, scale);
    if (c.scales_k) s.scale_k = normal({K}, types.adapter);
    if (c.scales_m) s.scale_m = normal({c.M}, types.adapter);
    in.segments.push_back(std::move(s));
  }
  if (c.layout == Layout::kNN || c.K.size() > 1) in.C_in = normal({c.M, c.N}, C_type);
  if (c.has_diagonal) in.diagonal_B = normal({c.K.front(), c.M}, types.main);
  in.seed = at::full({1}, kSeed, at::TensorOptions(at::kCPU).dtype(at::kLong));
  return in;
}

// The case on a device: its tensors, and the program that says what to do with them.
class Run {
 public:
  Run(const Case& c, const Inputs& in, const Types& types, Products products, at::Device device)
      : builder_("first use", types.main, types.adapter) {
    if (products == Products::kFullPrecision) builder_.require_full_precision();
    const bool is_wgrad = c.layout == Layout::kTN;
    const at::ScalarType B_type = is_wgrad ? types.main : types.adapter;
    const at::ScalarType C_type = is_wgrad ? types.adapter : types.main;
    const auto keep = [&](const Tensor& t, at::ScalarType type) {
      kept_.push_back(t.to(at::TensorOptions(device).dtype(type)));
      return kept_.back();
    };
    // Two blocks of rows, where the rows are ranks.
    const auto stack = [&](const Tensor& t) {
      const int64_t first = t.size(0) - kLastBlock;
      if (first <= 0) return builder_.matrix(t);
      const Tensor blocks[] = {t.narrow(0, 0, first), t.narrow(0, first, kLastBlock)};
      return builder_.stack({&blocks[0], &blocks[1]});
    };
    const auto stack_with_gap = [&](const Tensor& t) {
      const int64_t last = t.size(0) - kLastBlock;
      Matrix m = builder_.begin_stack(t.scalar_type());
      builder_.append(m, t.narrow(0, 0, last - kGap));
      builder_.append_gap(m, kGap);
      builder_.append(m, t.narrow(0, last, kLastBlock));
      return m;
    };
    // The rank axis of a shrink's result is padded; the columns beyond come out as zeros.
    const int64_t N = c.layout == Layout::kNT ? round_up(c.N, 8) : c.N;
    const auto nan = std::numeric_limits<double>::quiet_NaN();
    results_ = {at::full({c.M, N}, nan, at::TensorOptions(device).dtype(C_type))};

    builder_.begin_group(c.layout);
    Problem& p = builder_.add_problem(c.M, N);
    p.C = is_wgrad ? stack(results_[0]) : builder_.matrix(results_[0]);
    if (in.C_in.defined()) {
      p.C_in = builder_.matrix(keep(at::constant_pad_nd(in.C_in, {0, N - c.N}), C_type));
    }
    const Tensor seed = keep(in.seed, at::kLong);
    for (const SegmentInputs& s : in.segments) {
      const Tensor A = keep(s.A, types.main), B = keep(s.B, B_type);
      const int64_t K = A.size(is_wgrad ? 0 : 1);
      const Matrix rows = builder_.matrix(A);
      Segment& segment = builder_.add_segment(rows, c.has_gap ? stack_with_gap(B) : stack(B), K);
      if (s.scale_k.defined()) segment.scale_k = keep(s.scale_k, types.adapter).const_data_ptr();
      if (s.scale_m.defined()) segment.scale_m = keep(s.scale_m, types.adapter).const_data_ptr();
      if (c.drops) builder_.drop(seed.const_data_ptr<int64_t>(), drop_threshold(kDropout));
    }
    if (c.has_diagonal) {
      results_.push_back(at::full({c.M}, nan, at::TensorOptions(device).dtype(types.adapter)));
      const Matrix A = builder_.matrix(keep(in.segments[0].A, types.main));
      const Matrix B = builder_.matrix(keep(in.diagonal_B, types.main));
      builder_.add_diagonal(results_[1], A, B, c.K.front());
    }
  }

  const Program& program() const { return builder_.program(); }

  // In float64 on the CPU.
  std::vector<Tensor> results() const {
    std::vector<Tensor> copies;
    for (const Tensor& t : results_) copies.push_back(t.to(at::kCPU).to(at::kDouble));
    return copies;
  }

 private:
  ProgramBuilder builder_;
  std::vector<Tensor> kept_, results_;
};

// float32 as TF32 is multiplied: 10 bits of fraction, ties away from zero.
Tensor to_tf32(const Tensor& t) {
  const Tensor bits = t.to(at::kFloat).view(at::kInt);
  return bits.add(0x1000).bitwise_and(~0x1fff).view(at::kFloat).to(at::kDouble);
}

Inputs rounded_to_tf32(Inputs in) {
  for (SegmentInputs& s : in.segments) {
    s.A = to_tf32(s.A);
    s.B = to_tf32(s.B);
  }
  if (in.diagonal_B.defined()) in.diagonal_B = to_tf32(in.diagonal_B);
  return in;
}

std::vector<Tensor> run_on_cpu(const Case& c, const Inputs& in, const Types& types) {
  const Run run(c, in, types, Products::kF32, at::kCPU);
  library_gemm(run.program(), at::kCPU, cpu::draw_mask);
  return run.results();
}

// The largest error of any element over the largest element.
double largest_error(const Tensor& out, const Tensor& exact) {
  return out.sub(exact).abs().max().div(exact.abs().max()).item<double>();
}

double epsilon(at::ScalarType type) {
  return type == at::kDouble     ? std::numeric_limits<double>::epsilon()
         : type == at::kFloat    ? std::numeric_limits<float>::epsilon()
         : type == at::kBFloat16 ? 0x1p-7
                                 : 0x1p-10;
}

Types types_of(const Case& c, at::ScalarType main) {
  return {main, c.has_f32_ranks && main != at::kDouble ? at::kFloat : main};
}

std::string failure_of(const Case& c, const Run& run, const NameKernelsFn& name_kernels,
                       double error, double allowed, Products products, at::Device device) {
  std::ostringstream message;
  message << "rasa_ext: a kernel computes wrong numbers on " << device << " in "
          << (products == Products::kTF32            ? "TF32"
              : products == Products::kFullPrecision ? "Float, of updates to weights"
                                                     : at::toString(scalar_type(products)))
          << ": " << c.form << " (M " << c.M << ", N " << c.N << ", K " << c.K.front()
          << (c.drops ? ", dropout" : "") << ") by " << name_kernels(run.program())
          << " has an error of " << error << ", allowed are " << allowed
          << (scalar_type(products) == at::kFloat
                  ? ". torch's own products compute it instead in this process"
                  : ". The ops refuse this dtype on this device in this process; float32 does not "
                    "use this kernel")
          << ". `python -m rasa_ext` runs every check: please report its output.";
  return message.str();
}

// Nothing if every case is right. Allowed are twice the error that the library has in the same
// dtype (of operands that are rounded to TF32 before, for that), one rounding of the result, and
// the roundings of the float64 reference; not NaN.
std::string find_failure(LaunchFn launch, const NameKernelsFn& name_kernels, Products products,
                         at::Device device) {
  const at::ScalarType type = scalar_type(products);
  for (const Case& c : all_cases()) {
    if (!has(products, c)) continue;
    const Types types = types_of(c, type);
    const Inputs in = make_inputs(c, types);
    const std::vector<Tensor> exact = run_on_cpu(c, in, {at::kDouble, at::kDouble});
    const std::vector<Tensor> plain =
        run_on_cpu(c, products == Products::kTF32 ? rounded_to_tf32(in) : in, types);
    const Run run(c, in, types, products, device);
    launch(run.program());
    const std::vector<Tensor> results = run.results();
    for (size_t i = 0; i < exact.size(); ++i) {
      const double error = largest_error(results[i], exact[i]);
      const double allowed =
          2 * largest_error(plain[i], exact[i]) + epsilon(type) + 64 * epsilon(at::kDouble);
      if (!(error <= allowed)) {
        return failure_of(c, run, name_kernels, error, allowed, products, device);
      }
    }
  }
  return "";
}

}  // namespace

std::string FirstUse::failure(Products products, at::Device device) {
  if (is_checked(products, device)) return "";
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t key = slot(products, device);
  if (passed_[key].load(std::memory_order_acquire)) return "";
  auto found = failures_.find(key);
  if (found == failures_.end()) {
    std::string failure = find_failure(launch_, name_kernels_, products, device);
    if (failure.empty()) {
      passed_[key].store(true, std::memory_order_release);
      return "";
    }
    found = failures_.emplace(key, std::move(failure)).first;
  }
  return found->second;
}

void FirstUse::check(Products products, at::Device device) {
  const std::string wrong = failure(products, device);
  TORCH_CHECK(wrong.empty(), wrong);
}

void for_each_first_use_program(Products products,
                                const std::function<void(const Program&)>& visit) {
  for (const Case& c : all_cases()) {
    if (!has(products, c)) continue;
    const Types types = types_of(c, scalar_type(products));
    visit(Run(c, make_inputs(c, types), types, products, at::kCPU).program());
  }
}

}  // namespace rasa
