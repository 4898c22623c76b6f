// Runs the blocks of a grid: which block, warp and lanes come next, deadlock and the watchdog.
#include <stdio.h>

#include <algorithm>

#include "grid.h"

namespace ptx {
namespace {

constexpr s64 kPlainFuel = 1 << 12;  // backward jumps before another warp gets its turn
constexpr u64 kPlainSpins = 300;     // rounds without a store, barrier or exit: spinning for ever
constexpr u64 kAdversarialSpins = 30000;

struct LaneGroup {
  u32 pc, lanes;
};

// Groups the live lanes by where they are, in program order: the group furthest behind runs first,
// so that lanes meet again.
u32 group_lanes(const Warp& w, LaneGroup* groups) {
  u32 count = 0;
  for (u32 left = w.live; left;) {
    const u32 pc = w.pc[lowest_lane(left)];
    u32 same = 0;
    for_each_lane(left, [&](u32 lane) { same |= static_cast<u32>(w.pc[lane] == pc) << lane; });
    left &= ~same;
    u32 at = count++;
    for (; at > 0 && groups[at - 1].pc > pc; --at) groups[at] = groups[at - 1];
    groups[at] = {pc, same};
  }
  return count;
}

// The lanes of a group that may run its block now; 0: they wait for others.
u32 ready_lanes(Warp& w, const LaneGroup& group) {
  const BasicBlock& block = w.grid->program->blocks[group.pc];
  if (block.collective == Collective::kAllLanes) return group.lanes == w.live ? group.lanes : 0;
  if (block.collective == Collective::kMemberMask) {
    u32 ready = 0;
    for_each_lane(group.lanes, [&](u32 lane) {
      const u32 needed = reg<u32>(w, block.member)[lane] & w.live;
      if (!ready && needed && !(needed & ~group.lanes)) ready = needed;
    });
    return ready;
  }
  if (w.grid->options.adversarial && (next_random(w.random) & 3) == 0 &&
      (group.lanes & (group.lanes - 1))) {
    const u32 some = group.lanes & next_random(w.random);  // let only some lanes run ahead
    if (some) return some;
  }
  return group.lanes;
}

constexpr s32 kNone = -1;

// A finding's instruction for a position: the first at or after block pc.
s32 instruction_at(const Program& p, u32 pc) {
  for (; pc < p.blocks.size(); ++pc) {
    if (p.blocks[pc].num_ops) return p.ops[p.blocks[pc].first_op].instruction;
  }
  return kNone;
}

s32 pick_block(Warp& w, u32* mask) {
  if (w.leave != Leave::kStay) return kNone;
  if (!w.live) {
    w.state = State::kDone;
    w.leave = Leave::kDone;
    return kNone;
  }
  const bool adversarial = w.grid->options.adversarial;
  LaneGroup groups[kWarpSize];
  const u32 count = group_lanes(w, groups), start = adversarial ? next_random(w.random) % count : 0;
  for (u32 i = 0; i < count; ++i) {
    const LaneGroup& group = groups[(start + i) % count];
    const u32 ready = ready_lanes(w, group);
    if (!ready) continue;
    if (adversarial && --w.fuel <= 0) {
      w.fuel = 1 + next_random(w.random) % 64;
      w.leave = Leave::kYield;
      return kNone;
    }
    *mask = ready;
    return group.pc;
  }
  char text[160] = "";
  for (u32 i = 0, n = 0; i < std::min(count, 4u) && n < sizeof text; ++i) {
    n += snprintf(text + n, sizeof text - n, "%s mask %08x at @%d", i ? "," : "", groups[i].lanes,
                  instruction_at(*w.grid->program, groups[i].pc));
  }
  fail(w, Kind::kDivergent, instruction_at(*w.grid->program, groups[0].pc),
       lowest_lane(groups[0].lanes), 0,
       "lanes of one warp wait at different warp-wide instructions:%s", text);
}

void set_pc(Warp& w, u32 mask, u32 pc) {
  for_each_lane(mask, [&](u32 lane) { w.pc[lane] = pc; });
}

// Continues at `target` directly while the warp is together. A backward jump costs fuel, so that a
// spinning warp yields.
s32 go_to(Warp& w, u32 mask, u32 target, u32 from) {
  const bool adversarial = w.grid->options.adversarial;
  const bool tired = target <= from && !adversarial && --w.fuel <= 0;
  if (!tired && !adversarial && mask == w.live) return target;
  set_pc(w, mask, target);
  if (tired) w.leave = Leave::kYield;
  return kNone;
}

s32 branch(Warp& w, const BasicBlock& block, u32 mask, u32 pc) {
  const u32 taken = block.guard == kNoOperand ? mask : mask & predicate(w, block.guard);
  if (taken == mask) return go_to(w, mask, block.target, pc);
  if (!taken) return go_to(w, mask, pc + 1, pc);
  set_pc(w, taken, block.target);
  set_pc(w, mask & ~taken, pc + 1);
  if (block.target <= pc && !w.grid->options.adversarial && --w.fuel <= 0) w.leave = Leave::kYield;
  return kNone;
}

s32 end_block(Warp& w, const BasicBlock& block, u32 mask, u32 pc) {
  const Op* last =
      block.num_ops ? &w.grid->program->ops[block.first_op + block.num_ops - 1] : nullptr;
  switch (block.end) {
    case End::kFallThrough:
      return go_to(w, mask, pc + 1, pc);
    case End::kBranch:
      return branch(w, block, mask, pc);
    case End::kExit:
      w.live &= ~mask;
      return kNone;
    case End::kBarrier:
      set_pc(w, mask, pc + 1);
      return arrive_at_barrier(w, *last, mask) ? go_to(w, mask, pc + 1, pc) : kNone;
    case End::kPoll:
      set_pc(w, mask, pc + 1);
      if (test_mbarrier(w, *last, mask)) return go_to(w, mask, pc + 1, pc);
      w.leave = Leave::kPolling;
      return kNone;
  }
  return kNone;
}

void run_warp(Warp& w) {
  Grid& g = *w.grid;
  const Program& program = *g.program;
  u32 mask = 0;
  s32 pc = pick_block(w, &mask);
  while (pc != kNone) {
    const BasicBlock& block = program.blocks[pc];
    ++g.block_runs[pc];
    g.block_lanes[pc] += __builtin_popcount(mask);
    const bool ends_with_op = block.end == End::kBarrier || block.end == End::kPoll;
    const Op* op = &program.ops[block.first_op];
    for (const Op* end = op + block.num_ops - ends_with_op; op < end; ++op) {
      const u32 lanes = op->guard == kNoOperand ? mask : mask & predicate(w, op->guard);
      if (lanes) op->fn(w, *op, lanes);
    }
    pc = end_block(w, block, mask, pc);
    if (pc == kNone) pc = pick_block(w, &mask);
  }
}

class Cohort {  // blocks that are resident together
 public:
  Cohort(Grid& grid, u32 first, u32 count)
      : grid_(grid), random_(grid.options.seed + first * 31 + 7) {
    if (!random_) random_ = 1;
    for (u32 i = 0; i < count; ++i) {
      blocks_.push_back(grid.blocks[i].get());
      for (const auto& w : grid.blocks[i]->warps) warps_.push_back(w.get());
    }
  }

  void run() {
    while (num_done_ < warps_.size()) {
      const bool moved = run_round();
      if (moved && !spins_for_ever()) continue;
      bool landed = false;
      for (Block* b : blocks_) landed |= land_one_bulk_copy(*b);
      if (!landed) fail_deadlocked();
    }
  }

 private:
  // Every runnable warp gets a turn; adversarial: from a random start, some left out.
  bool run_round() {
    const bool adversarial = grid_.options.adversarial;
    const u32 n = warps_.size(), start = adversarial ? next_random(random_) % n : 0;
    bool moved = false;
    for (u32 i = 0; i < n; ++i) {
      Warp& w = *warps_[(start + i) % n];
      if (w.state != State::kRunnable) continue;
      if (adversarial && (next_random(random_) & 3) == 0) {
        moved = true;
        continue;
      }
      moved |= run_turn(w);
    }
    return moved;
  }

  bool run_turn(Warp& w) {
    land_some_bulk_copies(*w.block);
    const u64 progress = w.block->progress;
    w.leave = Leave::kStay;
    if (!grid_.options.adversarial) w.fuel = kPlainFuel;
    run_warp(w);
    if (++grid_.steps % 16 == 0 && std::chrono::steady_clock::now() > grid_.deadline)
      fail_timed_out(w);
    if (w.state == State::kDone) {
      ++num_done_;
      ++w.block->progress;
      check_exit(w);
      release_barriers_of_exited_warp(w);
      return true;
    }
    return w.leave == Leave::kBarrier || w.leave == Leave::kYield || w.block->progress != progress;
  }

  bool spins_for_ever() {
    u64 progress = num_done_;
    for (const Block* b : blocks_) progress += b->progress;
    if (progress != last_progress_) {
      last_progress_ = progress;
      spins_ = 0;
      return false;
    }
    return ++spins_ > (grid_.options.adversarial ? kAdversarialSpins : kPlainSpins);
  }

  // Where the unfinished warps are; "@n" stands for instruction n.
  std::string positions() const {
    std::string text;
    u32 shown = 0;
    for (const Warp* w : warps_) {
      if (w->state == State::kDone || ++shown > 4) continue;
      const u32 pc = w->live ? w->pc[lowest_lane(w->live)] : 0;
      // A warp at a barrier has its pc behind the barrier's block.
      const bool waits = w->state == State::kAtBarrier;
      char line[96];
      snprintf(line, sizeof line, "%swarp %u of block %u %s @%d", text.empty() ? "" : "; ",
               w->index, w->block->linear, waits ? "at the barrier before" : "at",
               instruction_at(*grid_.program, pc));
      text += line;
    }
    return text;
  }

  [[noreturn]] void fail_deadlocked() {
    for (Warp* w : warps_) {
      if (w->state == State::kDone) continue;
      const u32 pc = w->live ? w->pc[lowest_lane(w->live)] : 0;
      fail(*w, Kind::kDeadlock, instruction_at(*grid_.program, pc), 0, 0, "%s",
           positions().c_str());
    }
    __builtin_unreachable();
  }

  [[noreturn]] void fail_timed_out(Warp& w) {
    const u32 pc = w.live ? w.pc[lowest_lane(w.live)] : 0;
    fail(w, Kind::kWatchdog, instruction_at(*grid_.program, pc), 0, 0, "no end after %llu ms: %s",
         static_cast<unsigned long long>(grid_.options.time_limit_ms), positions().c_str());
  }

  Grid& grid_;
  std::vector<Block*> blocks_;
  std::vector<Warp*> warps_;
  size_t num_done_ = 0;
  u64 spins_ = 0, last_progress_ = 0;
  u32 random_;
};

void set_special_registers(Warp& w) {
  const LaunchShape& s = w.grid->shape;
  const Block& b = *w.block;
  const u32 threads = s.block[0] * s.block[1] * s.block[2];
  w.live = 0;
  for (u32 lane = 0; lane < kWarpSize; ++lane) {
    const u32 t = w.index * kWarpSize + lane;
    if (t < threads) w.live |= 1u << lane;
    // In the order of SPECIAL_REGISTERS in encoder.py.
    const u32 values[kNumSpecialRegisters] = {t % s.block[0],
                                              t / s.block[0] % s.block[1],
                                              t / (s.block[0] * s.block[1]),
                                              s.block[0],
                                              s.block[1],
                                              s.block[2],
                                              b.index[0],
                                              b.index[1],
                                              b.index[2],
                                              s.grid[0],
                                              s.grid[1],
                                              s.grid[2],
                                              lane,
                                              w.index,
                                              1u << lane,
                                              (1u << lane) - 1,
                                              ~0u << lane,
                                              static_cast<u32>((2ull << lane) - 1),
                                              ~static_cast<u32>((2ull << lane) - 1),
                                              0,
                                              1,
                                              0,
                                              0};
    for (u32 i = 0; i < kNumSpecialRegisters; ++i) reg<u32>(w, i * 4 * kWarpSize)[lane] = values[i];
  }
  w.born = w.live;
}

void start_warp(Warp& w) {
  const Program& program = *w.grid->program;
  const Options& o = w.grid->options;
  w.state = State::kRunnable;
  w.leave = Leave::kStay;
  w.fuel = o.adversarial ? 16 : kPlainFuel;
  w.random = o.seed * 2654435761u + w.block->linear * 40503u + w.index * 7919u + 1;
  if (!w.random) w.random = 1;
  memset(w.pc, 0, sizeof w.pc);
  w.clock = Clock();
  w.clock.local[w.index] = 1;
  w.epoch = 1;
  w.released.clear();
  w.unfenced.clear();
  w.released_lanes = w.unfenced_lanes = 0;
  w.copies.clear();
  w.wgmmas.clear();
  w.wgmmas_committed = 0;
  memset(w.copies_committed, 0, sizeof w.copies_committed);
  memset(w.bulk_committed, 0, sizeof w.bulk_committed);
  w.registers.assign(program.register_bytes, 0xff);
  w.local.assign(static_cast<size_t>(kWarpSize) * program.local_bytes, 0xff);
  w.operands[0] = w.registers.data();
  w.operands[1] = const_cast<u8*>(program.constants.data());
  set_special_registers(w);
}

void start_block(Block& b, u32 linear) {
  const Grid& g = *b.grid;
  const LaunchShape& s = g.shape;
  b.linear = linear;
  b.index[0] = linear % s.grid[0];
  b.index[1] = linear / s.grid[0] % s.grid[1];
  b.index[2] = linear / (s.grid[0] * s.grid[1]);
  b.shared.assign(s.shared_bytes + 16, 0xff);
  b.progress = b.copy_clock = 0;
  b.random = g.options.seed + 17 * linear + 3;
  b.mbarriers.clear();
  b.bulk_copies.clear();
  for (Barrier& barrier : b.barriers) barrier = Barrier();
  const size_t granules = s.shared_bytes / 2 + 8;
  b.shadow.assign(granules, SharedRecord());
  b.read_clocks.assign(granules * b.num_warps, 0);
  for (const auto& w : b.warps) start_warp(*w);
}

}  // namespace

void run_grid(Grid& g) {
  const u32 total = g.shape.grid[0] * g.shape.grid[1] * g.shape.grid[2];
  const u32 resident = std::max(1u, std::min(total, g.options.resident_blocks));
  const u32 num_warps =
      (g.shape.block[0] * g.shape.block[1] * g.shape.block[2] + kWarpSize - 1) / kWarpSize;
  for (u32 i = 0; i < resident; ++i) {
    auto b = std::make_unique<Block>();
    b->grid = &g;
    b->num_warps = num_warps;
    for (u32 index = 0; index < num_warps; ++index) {
      auto w = std::make_unique<Warp>();
      w->block = b.get();
      w->grid = &g;
      w->index = index;
      b->warps.push_back(std::move(w));
    }
    g.blocks.push_back(std::move(b));
  }
  for (u32 first = 0; first < total; first += resident) {
    const u32 count = std::min(resident, total - first);
    for (u32 i = 0; i < count; ++i) start_block(*g.blocks[i], first + i);
    Cohort(g, first, count).run();
  }
}

}  // namespace ptx
