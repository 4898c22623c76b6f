// The C interface that runtime.py calls: buffers, programs, and launches in a child process under a
// time limit.
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <unordered_map>

#include "grid.h"

namespace ptx {
namespace {

std::unordered_map<std::string, OpFn>& op_table() {
  static std::unordered_map<std::string, OpFn> table;
  return table;
}

std::vector<OpFn>& numbered_ops() {
  static std::vector<OpFn> ops;
  return ops;
}

// Buffers live in memory shared with the child, far apart, so that no overrun reaches another one.
constexpr u64 kPage = 4096, kGap = 1ull << 32;
struct Allocation {
  u64 base, size;
};
std::vector<Allocation>& allocations() {
  static std::vector<Allocation> list;
  return list;
}

u64 whole_pages(u64 size) { return (size + kPage - 1) / kPage * kPage; }

void* map_shared(u64 size) {
  void* p =
      mmap(nullptr, whole_pages(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

}  // namespace

void add_op(const std::string& name, OpFn fn) { op_table()[name] = fn; }

}  // namespace ptx

using namespace ptx;

// The structures below are mirrored by layouts.py.
struct EncodedOp {
  u32 fn, instruction, guard, first_arg, first_imm;
};

struct ProgramImage {
  const EncodedOp* ops;
  const BasicBlock* blocks;
  const u32* args;
  const s64* imms;
  const u8* constants;
  const s32* line_slots;
  u32 num_ops, num_blocks, num_args, num_imms, num_constant_bytes, num_instructions, num_line_slots,
      register_bytes, local_bytes, pad;
};

struct Output {
  u64 address;
  const u8* expected;
};

// Where a launch leaves its results; the child fills a copy in shared memory.
struct Results {
  u64* block_runs;
  u64* block_lanes;
  InstructionCount* counts;
  Finding* findings;
  u64* unique_by_slot;
  u64* unique_by_kind;  // loads, stores, atomics, any
  u32 num_findings, fatal;
  u64 steps;
};

enum class Outcome : int { kEnded = 0, kKilled = 1, kCrashed = 2, kNoChild = 3 };
constexpr u32 kNumKinds = 3;
constexpr u32 kNumFindingKinds = 20;

static void prepare_buffers(Grid& g, const Output* outputs) {
  for (const Allocation& a : allocations()) {
    GlobalBuffer buffer{};
    buffer.base = a.base;
    buffer.size = a.size;
    buffer.first_sector = g.num_sectors;
    g.num_sectors += (a.size + 31) / 32;
    const u64 shadow_bytes = whole_pages((a.size / 2 + 1) * sizeof(GlobalRecord));
    void* shadow = mmap(nullptr, 2 * shadow_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    buffer.writes = static_cast<GlobalRecord*>(shadow);
    buffer.reads = buffer.writes + shadow_bytes / sizeof(GlobalRecord);
    for (u32 i = 0; i < g.shape.num_outputs; ++i) {
      if (outputs[i].address != a.base) continue;
      buffer.stored.assign(a.size, 0);
      buffer.expected = outputs[i].expected;
    }
    g.buffers.push_back(std::move(buffer));
  }
}

static void report_never_stored(Grid& g) {
  u32 num_reported = 0;
  for (const GlobalBuffer& buffer : g.buffers) {
    u64 missing = 0, first = 0;
    for (u64 i = 0; i < buffer.stored.size(); ++i) {
      if (buffer.stored[i] || (buffer.expected && !buffer.expected[i])) continue;
      if (!missing++) first = i;
    }
    if (!missing || num_reported++ >= g.options.max_findings) continue;
    Finding f{};
    f.kind = static_cast<s32>(Kind::kStoredNever);
    f.instruction = f.other_instruction = -1;
    f.thread = f.block = f.other_thread = f.other_block = kNobody;
    f.address = first;
    f.count = 1;
    snprintf(f.message, sizeof f.message, "%llu of %llu bytes, the first at byte %llu",
             static_cast<unsigned long long>(missing), static_cast<unsigned long long>(buffer.size),
             static_cast<unsigned long long>(first));
    g.findings.push_back(f);
  }
}

static void copy_results(const Grid& g, const u32* slot_kinds, bool fatal, Results& r) {
  memcpy(r.block_runs, g.block_runs.data(), 8 * g.block_runs.size());
  memcpy(r.block_lanes, g.block_lanes.data(), 8 * g.block_lanes.size());
  memcpy(r.counts, g.counts.data(), sizeof(InstructionCount) * g.counts.size());
  memcpy(r.findings, g.findings.data(), sizeof(Finding) * g.findings.size());
  std::vector<u32> by_kind[kNumKinds], all;
  for (u32 slot = 0; slot < g.program->num_line_slots; ++slot) {
    r.unique_by_slot[slot] = count_unique_sectors(g, {slot});
    by_kind[slot_kinds[slot]].push_back(slot);
    all.push_back(slot);
  }
  for (u32 kind = 0; kind < kNumKinds; ++kind)
    r.unique_by_kind[kind] = count_unique_sectors(g, by_kind[kind]);
  r.unique_by_kind[kNumKinds] = count_unique_sectors(g, all);
  r.num_findings = g.findings.size();
  r.fatal = fatal;
  r.steps = g.steps;
}

static void run_launch(Grid& g, const Output* outputs, const u32* slot_kinds, Results& r) {
  const Program& p = *g.program;
  prepare_buffers(g, outputs);
  g.last_buffer.assign(p.num_instructions + 1, 0);
  g.block_runs.assign(p.blocks.size(), 0);
  g.block_lanes.assign(p.blocks.size(), 0);
  g.counts.assign(p.num_instructions + 1, InstructionCount());
  g.touched.assign(p.num_line_slots * ((g.num_sectors + 63) / 64), 0);
  g.deadline =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(g.options.time_limit_ms);
  bool fatal = false;
  try {
    run_grid(g);
    report_never_stored(g);
  } catch (const Fatal& f) {
    fatal = true;
    g.findings.insert(g.findings.begin(), f.finding);
  }
  copy_results(g, slot_kinds, fatal, r);
}

// Waits for the child until its end of the pipe closes; kills it after the limit.
static Outcome wait_for_child(pid_t child, int pipe_end, s64 limit_ms) {
  pollfd p{pipe_end, POLLIN, 0};
  const bool ended = poll(&p, 1, static_cast<int>(std::min<s64>(limit_ms, 1 << 30))) > 0;
  if (!ended) kill(child, SIGKILL);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!ended) return Outcome::kKilled;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? Outcome::kEnded : Outcome::kCrashed;
}

extern "C" {

int ptx_op_index(const char* name) {
  const auto it = op_table().find(name);
  if (it == op_table().end()) return -1;
  numbered_ops().push_back(it->second);
  return static_cast<int>(numbered_ops().size()) - 1;
}

u64 ptx_allocate(u64 size) {
  const u64 body = whole_pages(std::max<u64>(size, 1));
  u8* reserved = static_cast<u8*>(mmap(nullptr, body + 2 * kGap, PROT_NONE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (reserved == MAP_FAILED) return 0;
  void* p = mmap(reserved + kGap, body, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (p == MAP_FAILED) return 0;
  const Allocation a{reinterpret_cast<u64>(p), size};
  auto& list = allocations();
  list.insert(
      std::upper_bound(list.begin(), list.end(), a,
                       [](const Allocation& x, const Allocation& y) { return x.base < y.base; }),
      a);
  return a.base;
}

void ptx_free(u64 base) {
  auto& list = allocations();
  for (auto it = list.begin(); it != list.end(); ++it) {
    if (it->base != base) continue;
    munmap(reinterpret_cast<void*>(base - kGap),
           whole_pages(std::max<u64>(it->size, 1)) + 2 * kGap);
    list.erase(it);
    return;
  }
}

Program* ptx_load_program(const ProgramImage* image) {
  auto* p = new Program();
  p->blocks.assign(image->blocks, image->blocks + image->num_blocks);
  p->args.assign(image->args, image->args + image->num_args);
  p->imms.assign(image->imms, image->imms + image->num_imms);
  p->constants.assign(image->constants, image->constants + image->num_constant_bytes);
  p->line_slots.assign(image->line_slots, image->line_slots + image->num_instructions);
  p->num_instructions = image->num_instructions;
  p->num_line_slots = image->num_line_slots;
  p->register_bytes = image->register_bytes;
  p->local_bytes = image->local_bytes;
  for (u32 i = 0; i < image->num_ops; ++i) {
    const EncodedOp& e = image->ops[i];
    p->ops.push_back({numbered_ops()[e.fn], p->args.data() + e.first_arg,
                      p->imms.data() + e.first_imm, e.guard, e.instruction});
  }
  return p;
}

void ptx_free_program(Program* p) { delete p; }

int ptx_launch(const Program* program, const Options* options, const LaunchShape* shape,
               const Output* outputs, const u32* slot_kinds, Results* results) {
  const u64 num_blocks = program->blocks.size(), num_counts = program->num_instructions + 1;
  const u64 sizes[] = {8 * num_blocks,
                       8 * num_blocks,
                       sizeof(InstructionCount) * num_counts,
                       sizeof(Finding) * (kNumFindingKinds * options->max_findings + 1),
                       8ull * program->num_line_slots + 8,
                       8 * (kNumKinds + 1)};
  u64 total = sizeof(Results);
  for (u64 size : sizes) total += size;
  u8* memory = static_cast<u8*>(map_shared(total));
  int ends[2];
  if (!memory || pipe(ends) != 0) return static_cast<int>(Outcome::kNoChild);
  auto* shared = reinterpret_cast<Results*>(memory);
  u8* parts[6];
  u8* next = memory + sizeof(Results);
  for (u32 i = 0; i < 6; next += sizes[i++]) parts[i] = next;
  *shared = {reinterpret_cast<u64*>(parts[0]),
             reinterpret_cast<u64*>(parts[1]),
             reinterpret_cast<InstructionCount*>(parts[2]),
             reinterpret_cast<Finding*>(parts[3]),
             reinterpret_cast<u64*>(parts[4]),
             reinterpret_cast<u64*>(parts[5]),
             0,
             0,
             0};
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) signal(number, SIG_DFL);
    Grid* g = new Grid();  // never freed: the process ends
    g->program = program;
    g->options = *options;
    g->shape = *shape;
    run_launch(*g, outputs, slot_kinds, *shared);
    _exit(0);
  }
  close(ends[1]);
  // The child's own watchdog ends first and can say where; the margin is for a child that cannot.
  const Outcome outcome =
      child < 0
          ? Outcome::kNoChild
          : wait_for_child(child, ends[0], static_cast<s64>(options->time_limit_ms) * 2 + 2000);
  close(ends[0]);
  if (outcome == Outcome::kEnded) {
    u8* targets[] = {reinterpret_cast<u8*>(results->block_runs),
                     reinterpret_cast<u8*>(results->block_lanes),
                     reinterpret_cast<u8*>(results->counts),
                     reinterpret_cast<u8*>(results->findings),
                     reinterpret_cast<u8*>(results->unique_by_slot),
                     reinterpret_cast<u8*>(results->unique_by_kind)};
    for (u32 i = 0; i < 6; ++i) memcpy(targets[i], parts[i], sizes[i]);
    results->num_findings = shared->num_findings;
    results->fatal = shared->fatal;
    results->steps = shared->steps;
  }
  munmap(memory, whole_pages(total));
  return static_cast<int>(outcome);
}

}  // extern "C"
