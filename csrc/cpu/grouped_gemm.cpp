// The CPU launcher: lays out memory, packs the small operands, and deals tiles to threads.
//
// NT and NN groups run together, token tile by token tile, so that s and g are still in cache when
// the next group reads them; layers that do not read each other's results are dealt out as separate
// chains of problems. TN groups run one after the other and are cut by columns of features, each
// tile summing over all tokens: no partial sums, so the result does not depend on the number of
// threads. A diagonal is cut likewise, and nothing is packed for it.
#include "grouped_gemm.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>

#include "tile_runner.h"

namespace rasa::cpu {
namespace {

constexpr int64_t kAlignment = 64;

// Below this much work per thread, waking another thread costs more than it saves.
constexpr int64_t kMinFlopsPerThread = 1 << 20;

// A consecutive run of groups of one kind (by row tiles, or by column blocks) with its packed
// operands.
class Phase {
 public:
  Phase(const Program& program, const TileRunner& runner, size_t first_group, size_t end_group)
      : program_(program), runner_(runner) {
    int64_t bytes = 0;
    for (size_t g = first_group; g < end_group; ++g) {
      const Group& group = program.groups[g];
      for (int32_t i = 0; i < group.num_problems; ++i) {
        add_problem(group.layout, program.problems[group.first_problem + i], bytes);
      }
    }
    packed_memory_ = c10::GetCPUAllocator()->allocate(bytes);
    char* base = static_cast<char*>(packed_memory_.get());  // the allocator aligns to 64 bytes
    for (size_t i = 0; i < packed_.size(); ++i) packed_[i].data = base + offsets_[i];
    pack_all();
  }

  void run_rows(char* scratch) {
    // One task runs a row tile through all problems of its chain.
    const std::vector<std::vector<size_t>> chains = independent_chains();
    std::vector<int64_t> first_task = {0};
    int64_t flops = 0;
    for (const std::vector<size_t>& chain : chains) {
      int32_t rows = 0;
      for (const size_t i : chain) {
        rows = std::max(rows, items_[i].problem->M);
        flops += items_[i].flops;
      }
      first_task.push_back(first_task.back() + ceil_div(rows, kTileRows));
    }
    for_tasks(first_task.back(), flops, scratch, [&](int64_t task, const Scratch& mine) {
      const size_t c = index_of(first_task, task);
      const int64_t m0 = (task - first_task[c]) * kTileRows;
      for (const size_t i : chains[c]) {
        const Item& item = items_[i];
        if (m0 < item.problem->M) {
          runner_.row_tile(item.layout, *item.problem, packed_of(item), m0, mine);
        }
      }
    });
  }

  void run_wgrad(char* scratch) {
    std::vector<int64_t> first_task = {0};
    int64_t flops = 0;
    for (const Item& item : items_) {
      flops += item.flops;
      first_task.push_back(first_task.back() +
                           num_row_blocks(*item.problem) * num_column_blocks(*item.problem));
    }
    for_tasks(first_task.back(), flops, scratch, [&](int64_t task, const Scratch& mine) {
      const size_t i = index_of(first_task, task);
      const Problem& p = *items_[i].problem;
      const int64_t tile = task - first_task[i];
      const int64_t n0 = tile / num_row_blocks(p) * kWgradColumns;
      if (p.is_diagonal) return runner_.diagonal_tile(p, n0);
      runner_.wgrad_tile(p, packed_of(items_[i]), tile % num_row_blocks(p) * kWgradRows, n0, mine);
    });
  }

 private:
  struct Item {
    Layout layout;
    const Problem* problem;
    size_t first_packed;
    int64_t flops;
  };

  // Memory from the first to the last element of a matrix in one piece, or of one block.
  struct Span {
    const char *begin, *end;

    Span(const Block& block, int64_t rows, int64_t cols, DType dtype)
        : begin(static_cast<const char*>(block.ptr)),
          end(begin + ((rows - 1) * block.ld + cols) * element_size(dtype)) {}
    bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
  };

  // Whether a problem may read rows that an earlier one writes. Columns of one matrix, side by
  // side, count as overlapping: that joins two chains, and no more.
  bool reads(const Problem& reader, const Problem& writer) const {
    for (int32_t b = 0; b < writer.C.num_blocks; ++b) {
      const Block& block = program_.blocks[writer.C.first_block + b];
      if (!block.ptr) continue;
      const Span written(block, block.rows, writer.N, writer.C.dtype);
      const auto is_written = [&](const Matrix& matrix, int64_t cols) {
        return matrix.num_blocks > 0 &&
               Span(program_.blocks[matrix.first_block], reader.M, cols, matrix.dtype)
                   .overlaps(written);
      };
      if (is_written(reader.C_in, reader.N)) return true;
      for (int32_t i = 0; i < reader.num_segments; ++i) {
        const Segment& s = program_.segments[reader.first_segment + i];
        if (is_written(s.A, s.K)) return true;
      }
    }
    return false;
  }

  // The problems, in order, by chains that read no other chain's results.
  std::vector<std::vector<size_t>> independent_chains() const {
    std::vector<size_t> first_of(items_.size());  // each problem's chain, named by its first
    for (size_t j = 0; j < items_.size(); ++j) {
      first_of[j] = j;
      for (size_t i = 0; i < j; ++i) {
        if (first_of[i] == first_of[j] || !reads(*items_[j].problem, *items_[i].problem)) continue;
        const size_t joined = std::min(first_of[i], first_of[j]);
        const size_t left = std::max(first_of[i], first_of[j]);
        std::replace(first_of.begin(), first_of.begin() + j + 1, left, joined);
      }
    }
    std::vector<std::vector<size_t>> chains(items_.size());
    for (size_t i = 0; i < items_.size(); ++i) chains[first_of[i]].push_back(i);
    std::erase_if(chains, [](const std::vector<size_t>& chain) { return chain.empty(); });
    return chains;
  }

  static int64_t num_row_blocks(const Problem& p) {
    return p.is_diagonal ? 1 : ceil_div(p.M, kWgradRows);
  }
  static int64_t num_column_blocks(const Problem& p) { return ceil_div(p.N, kWgradColumns); }
  static size_t index_of(const std::vector<int64_t>& first, int64_t task) {
    return std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
  }

  const Segment& segment(const Item& item, int32_t i) const {
    return program_.segments[item.problem->first_segment + i];
  }
  const Packed* packed_of(const Item& item) const { return packed_.data() + item.first_packed; }

  void add_problem(Layout layout, const Problem& p, int64_t& bytes) {
    Item item = {layout, &p, packed_.size(), 0};
    for (int32_t i = 0; i < p.num_segments; ++i) {
      const Segment& s = segment(item, i);
      item.flops += int64_t{2} * s.K * p.M * (p.is_diagonal ? 1 : p.N);
      packed_.push_back({nullptr, runner_.packed_ld(layout, p, s)});
      offsets_.push_back(bytes);
      if (!p.is_diagonal) bytes += round_up(runner_.packed_bytes(layout, p, s), kAlignment);
    }
    items_.push_back(item);
  }

  void pack_all() {
    struct Job {
      const Item* item;
      int32_t segment;
      int64_t job;
    };
    std::vector<Job> jobs;
    int64_t elements = 0;
    for (const Item& item : items_) {
      for (int32_t i = 0; i < item.problem->num_segments && !item.problem->is_diagonal; ++i) {
        const Segment& s = segment(item, i);
        elements += int64_t{s.K} * (item.layout == Layout::kTN ? item.problem->M : item.problem->N);
        for (int64_t j = 0; j < runner_.num_pack_jobs(item.layout, *item.problem, s); ++j) {
          jobs.push_back({&item, i, j});
        }
      }
    }
    // Dealt out in turn: the jobs of one operand, which cost alike, follow each other.
    constexpr int64_t kElementsPerThread = 1 << 14;
    const int64_t num_jobs = static_cast<int64_t>(jobs.size());
    const int64_t num_threads =
        std::clamp<int64_t>(elements / kElementsPerThread, 1, at::get_num_threads());
    at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t j = thread; j < num_jobs; j += num_threads) {
          const Item& item = *jobs[j].item;
          runner_.pack(item.layout, *item.problem, segment(item, jobs[j].segment),
                       packed_of(item)[jobs[j].segment], jobs[j].job);
        }
      }
    });
  }

  template <class Task>
  void for_tasks(int64_t num_tasks, int64_t flops, char* scratch, const Task& task) {
    const int64_t num_threads = std::clamp<int64_t>(std::min(num_tasks, flops / kMinFlopsPerThread),
                                                    1, at::get_num_threads());
    // A thread takes the next task when it is done: tasks of several problems differ in cost.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
      const Scratch mine =
          TileRunner::scratch_at(scratch + at::get_thread_num() * TileRunner::scratch_bytes());
      for (int64_t t = next++; t < num_tasks; t = next++) task(t, mine);
      release_micro_kernel(runner_.compute());
    });
  }

  const Program& program_;
  const TileRunner& runner_;
  std::vector<Item> items_;
  std::vector<Packed> packed_;    // of all items' segments
  std::vector<int64_t> offsets_;  // where each lies in packed_memory_, in bytes
  c10::DataPtr packed_memory_;
};

}  // namespace

void grouped_gemm(const Program& program) {
  const TileRunner runner(program);
  const c10::DataPtr scratch =
      c10::GetCPUAllocator()->allocate(at::get_num_threads() * TileRunner::scratch_bytes());
  const size_t num_groups = program.groups.size();
  for (size_t begin = 0; begin < num_groups;) {
    const bool by_rows = program.groups[begin].layout != Layout::kTN;
    size_t end = begin + 1;
    while (by_rows && end < num_groups && program.groups[end].layout != Layout::kTN) ++end;
    Phase phase(program, runner, begin, end);
    if (by_rows) {
      phase.run_rows(static_cast<char*>(scratch.get()));
    } else {
      phase.run_wgrad(static_cast<char*>(scratch.get()));
    }
    begin = end;
  }
}

}  // namespace rasa::cpu
