#include "machine.h"

#include <numeric>

namespace ptx {
namespace {

constexpr int CARRY_REGISTER = 0;

int product(const std::int32_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

std::string lanes_text(Mask lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "%08x", lanes);
  return text;
}

}  // namespace

Machine::Machine(const Job& job)
    : job_(job), threads_(product(job.block)), blocks_(product(job.grid)),
      ranges_(job.ranges, job.range_count),
      local_(static_cast<std::size_t>(blocks_) * threads_ * job.local_bytes, 0xff),
      random_(job.seed) {}

u64 Machine::special(int which, const Block& block, int thread, int lane) const {
  const auto component = [](int index, const std::int32_t (&sizes)[3], int axis) {
    return axis == 0 ? index % sizes[0]
                     : axis == 1 ? index / sizes[0] % sizes[1] : index / sizes[0] / sizes[1];
  };
  const u64 workspace = reinterpret_cast<u64>(workspace_);
  if (which <= TID_Z) return component(thread, job_.block, which - TID_X);
  if (which <= NTID_Z) return job_.block[which - NTID_X];
  if (which <= CTAID_Z) return component(block.number, job_.grid, which - CTAID_X);
  if (which <= NCTAID_Z) return job_.grid[which - NCTAID_X];
  switch (which) {
    case LANEID: return lane;
    case WARPID: return thread / LANES;
    case ENVREG1: return job_.cooperative ? workspace >> 32 : 0;
    default: return job_.cooperative ? static_cast<u32>(workspace) : 0;
  }
}

void Machine::set_constants(Warp& warp) {
  const Registers r = registers(warp);
  for (int n = 0; n < job_.constant_count; ++n) {
    const Constant& constant = job_.constants[n];
    for (int lane = 0; lane < LANES; ++lane) {
      const int thread = warp.number * LANES + lane;
      const u64 own_local = (u64{0} + warp.block->number * threads_ + thread) * job_.local_bytes;
      u64 value = constant.value;
      switch (constant.kind) {
        case Constant::SPECIAL: value = special(static_cast<int>(value), *warp.block, thread, lane); break;
        case Constant::LOCAL_ADDRESS: value += reinterpret_cast<u64>(local_.data()) + own_local; break;
        case Constant::PARAMETER_ADDRESS: value += reinterpret_cast<u64>(job_.parameters); break;
        default: break;
      }
      r.at(constant.reg, lane) = value;
    }
  }
}

// Registers hold noise until they are written.
void Machine::start_block(int number) {
  auto block = std::make_unique<Block>();
  block->number = number;
  block->live = threads_;
  block->shared.assign(job_.shared_bytes, 0xff);
  block->written.assign(job_.shared_bytes, 0);
  for (int w = 0; w * LANES < threads_; ++w) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get();
    warp->number = w;
    warp->values.resize(static_cast<std::size_t>(job_.registers) * LANES);
    u64 noise = u64{random_()} << 32 | random_();
    for (u64& value : warp->values) value = noise = noise * 6364136223846793005u + 1442695040888963407u;
    for (int lane = 0; lane < LANES; ++lane) {
      warp->state[lane] = w * LANES + lane < threads_ ? Lane::RUNS : Lane::HAS_EXITED;
      if (job_.cooperative) warp->known[lane].assign(blocks_, 0);
    }
    set_constants(*warp);
    block->warps.push_back(std::move(warp));
  }
  resident_.push_back(std::move(block));
}

bool Machine::run() {
  std::vector<int> order(blocks_);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  const std::size_t most = job_.cooperative ? blocks_ : job_.resident;
  for (std::size_t next = 0; !stopped_;) {
    while (resident_.size() < most && next < order.size()) start_block(order[next++]);
    if (resident_.empty()) return true;
    const std::size_t place = random_() % resident_.size();
    std::vector<Warp*> ready;
    for (const auto& warp : resident_[place]->warps)
      if (warp->can_run()) ready.push_back(warp.get());
    if (!ready.empty())
      run_warp(*ready[random_() % ready.size()], 1 + random_() % job_.quantum);
    else if (!finish_or_report_deadlock(place))
      return false;
    if (executed_ > job_.limit) {
      report(TOO_LONG, -1, -1, std::to_string(executed_) + " instructions");
      return false;
    }
  }
  return false;
}

// Removes a block none of whose warps can run: it has ended, or nothing will wake it.
bool Machine::finish_or_report_deadlock(std::size_t place) {
  const Block& block = *resident_[place];
  if (block.live == 0) {
    resident_.erase(resident_.begin() + place);
    return true;
  }
  int at = -1;
  for (const auto& warp : block.warps)
    for_lanes(warp->alive(), [&](int lane) { at = warp->pc[lane]; });
  report(DEADLOCK, at, -1, "block " + std::to_string(block.number) + ": of " +
                               std::to_string(block.live) + " threads " +
                               std::to_string(block.waiting) + " wait at a barrier");
  return false;
}

void Machine::run_warp(Warp& warp, u64 most) {
  for (const u64 end = executed_ + most; executed_ < end && !stopped_;) {
    const Mask runs = warp.lanes_in(Lane::RUNS);
    if (!runs) return;
    int pc = INT32_MAX, following = INT32_MAX;  // of the group, and of the lanes ahead of it
    for_lanes(runs, [&](int l) { pc = std::min(pc, warp.pc[l]); });
    Mask group = 0;
    for_lanes(runs, [&](int l) {
      if (warp.pc[l] == pc)
        group |= Mask{1} << l;
      else
        following = std::min(following, warp.pc[l]);
    });
    Next next = Next::FOLLOWING;
    while (next == Next::FOLLOWING && pc < following && executed_ < end && !stopped_) {
      ++executed_;
      next = step(warp, group, pc);
    }
    if (next == Next::FOLLOWING) warp.move(group, pc);
  }
}

Mask Machine::guarded(const Warp& warp, const Instruction& i, Mask group) const {
  if (i.guard < 0) return group;
  Mask active = 0;
  for_lanes(group, [&](int l) {
    const u64 value = warp.values[static_cast<std::size_t>(i.guard) * LANES + l];
    if ((value & 1) != static_cast<u64>(i.unless)) active |= Mask{1} << l;
  });
  return active;
}

Machine::Next Machine::step(Warp& warp, Mask group, int& pc) {
  const Instruction& i = job_.code[pc];
  const Mask active = guarded(warp, i, group);
  switch (i.operation) {
    case BRA: return branch(warp, i, group, active, pc);
    case EXIT: return exit(warp, group, active, pc);
    case BAR: return barrier(warp, i, group, active, pc);
    case WARP_BAR: case SHFL: case REDUX: return together(warp, i, group, active, pc);
    case LD: load(warp, i, active, pc); break;
    case ST: store(warp, i, active, pc); break;
    case ATOM_ADD: add_atomically(warp, i, active, pc); break;
    case LDMATRIX: load_matrices(warp, i, active, pc); break;
    case STMATRIX: store_matrices(warp, i, active, pc); break;
    case FENCE: case NOP: break;
    case TRAP:
      if (!active) break;
      report(TRAPPED, pc, -1, "trap");
      stopped_ = true;
      break;
    default:
      if (calculate(registers(warp), i, active, CARRY_REGISTER)) break;
      report(UNSUPPORTED, pc, -1, "");
      stopped_ = true;
  }
  ++pc;
  return Next::FOLLOWING;
}

Machine::Next Machine::branch(Warp& warp, const Instruction& i, Mask group, Mask active, int& pc) {
  if (active == 0 || active == group) {
    pc = active ? i.target : pc + 1;
    // A loop, maybe one that waits for another warp: choose again.
    if (active && i.target <= pc) {
      warp.move(group, pc);
      return Next::CHOOSE;
    }
    return Next::FOLLOWING;
  }
  warp.move(active, i.target);
  warp.move(group & ~active, pc + 1);
  return Next::CHOOSE;
}

Machine::Next Machine::exit(Warp& warp, Mask group, Mask active, int pc) {
  warp.move(group & ~active, pc + 1);
  for_lanes(active, [&](int l) {
    warp.state[l] = Lane::HAS_EXITED;
    --warp.block->live;
  });
  open_barrier(*warp.block);
  return Next::CHOOSE;
}

Machine::Next Machine::barrier(Warp& warp, const Instruction& i, Mask group, Mask active, int pc) {
  warp.move(group & ~active, pc + 1);
  if (i.flags & ALIGNED && active && active != warp.alive())
    report(DIVERGENT_BARRIER, pc, -1,
           "lanes " + lanes_text(active) + " of " + lanes_text(warp.alive()));
  warp.move(active, pc);
  for_lanes(active, [&](int l) {
    warp.state[l] = Lane::WAITS_FOR_BLOCK;
    ++warp.block->waiting;
  });
  open_barrier(*warp.block);
  return Next::CHOOSE;
}

// Lets the block go on where all threads that have not exited wait.
void Machine::open_barrier(Block& block) {
  if (!block.waiting || block.waiting < block.live) return;
  if (block.live < threads_)
    report(BARRIER_AFTER_EXIT, -1, -1, std::to_string(threads_ - block.live) + " threads have exited");
  std::vector<u32> known(blocks_, 0);
  const auto of_live = [&](auto run) {
    for (auto& warp : block.warps)
      for_lanes(warp->lanes_in(Lane::WAITS_FOR_BLOCK), [&](int l) { run(*warp, l); });
  };
  if (job_.cooperative) {  // what one thread has learnt, all know now
    of_live([&](Warp& warp, int l) {
      for (int b = 0; b < blocks_; ++b) known[b] = std::max(known[b], warp.known[l][b]);
    });
    of_live([&](Warp& warp, int l) { warp.known[l] = known; });
  }
  ++block.time;
  block.waiting = 0;
  of_live([&](Warp& warp, int l) {
    warp.state[l] = Lane::RUNS;
    ++warp.pc[l];
  });
}

// Runs an instruction for which all lanes of its mask come together.
Machine::Next Machine::together(Warp& warp, const Instruction& i, Mask group, Mask active, int& pc) {
  if (!active) {
    ++pc;
    return Next::FOLLOWING;
  }
  const Registers r = registers(warp);
  const Mask named = r.get<u32>(i.source[i.sources - 1], __builtin_ctz(active));
  const Mask wanted = named & warp.alive();
  const int unused = std::max(0, (warp.number + 1) * LANES - threads_);
  const Mask exited = named & ~warp.alive() & (~Mask{0} >> unused);
  if (exited) report(ABSENT_LANE, pc, -1, "lanes " + lanes_text(exited) + " have exited");
  Mask here = active;
  for_lanes(warp.lanes_in(Lane::WAITS_FOR_WARP), [&](int l) {
    if (warp.pc[l] == pc) here |= Mask{1} << l;
  });
  warp.move(group & ~active, pc + 1);
  if (wanted & ~here) {  // wait for the others
    warp.move(active, pc);
    for_lanes(active, [&](int l) { warp.state[l] = Lane::WAITS_FOR_WARP; });
    return Next::CHOOSE;
  }
  for_lanes(here, [&](int l) { warp.state[l] = Lane::RUNS; });
  if (i.operation == SHFL)
    shuffle(warp, i, here, pc);
  else if (i.operation == REDUX)
    reduce(warp, i, here);
  else
    ++warp.time;
  if (here == group) {
    ++pc;
    return Next::FOLLOWING;
  }
  warp.move(here, pc + 1);
  return Next::CHOOSE;
}

void Machine::shuffle(Warp& warp, const Instruction& i, Mask lanes, int pc) {
  const Registers r = registers(warp);
  u32 given[LANES], taken[LANES];
  bool in_range[LANES];
  for (int l = 0; l < LANES; ++l) given[l] = r.get<u32>(i.source[0], l);
  for_lanes(lanes, [&](int l) {
    const int by = r.get<u32>(i.source[1], l) & 31, clamp = r.get<u32>(i.source[2], l);
    const int segment = clamp >> 8 & 31, last = (l & segment) | (clamp & 31 & ~segment);
    int from = l;
    switch (i.flags) {
      case SHUFFLE_UP: from = l - by; break;
      case SHUFFLE_DOWN: from = l + by; break;
      case SHUFFLE_XOR: from = l ^ by; break;
      default: from = (l & segment) | (by & ~segment);
    }
    in_range[l] = i.flags == SHUFFLE_UP ? from >= last : from <= last;
    if (!in_range[l]) from = l;
    if (!(lanes >> from & 1)) report(ABSENT_LANE, pc, -1, "lane " + std::to_string(from) + " is read");
    taken[l] = given[from];
  });
  for_lanes(lanes, [&](int l) {
    if (i.result[0] >= 0) r.put<u32>(i.result[0], l, taken[l]);
    if (i.results > 1 && i.result[1] >= 0) r.put<u64>(i.result[1], l, in_range[l]);
  });
}

void Machine::reduce(Warp& warp, const Instruction& i, Mask lanes) {
  const Registers r = registers(warp);
  const auto value = [&](int l) { return static_cast<s64>(extended(r.at(i.source[0], l), i.type)); };
  s64 total = value(__builtin_ctz(lanes));
  for_lanes(lanes & (lanes - 1), [&](int l) {
    const s64 next = value(l);
    switch (i.flags) {
      case SUM: total += next; break;
      case MINIMUM: total = std::min(total, next); break;
      case MAXIMUM: total = std::max(total, next); break;
      case ALL: total &= next; break;
      case ANY: total |= next; break;
      default: total ^= next;
    }
  });
  for_lanes(lanes, [&](int l) { r.put<u32>(i.result[0], l, static_cast<u32>(total)); });
}

}  // namespace ptx
