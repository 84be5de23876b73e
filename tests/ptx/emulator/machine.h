// Blocks and warps. A warp runs its lanes in groups: always the one that is furthest behind, until it
// branches, waits, or catches up with the next. Which warp goes next, and how far, is random.
#pragma once

#include <map>
#include <random>
#include <tuple>

#include "arithmetic.h"
#include "memory.h"

namespace ptx {

struct Block;

enum class Lane : u8 { RUNS, WAITS_FOR_BLOCK, WAITS_FOR_WARP, HAS_EXITED };

struct Warp {
  Block* block;
  int number;
  std::vector<u64> values;
  int pc[LANES] = {};
  Lane state[LANES];
  u32 time = 0;
  // Up to which time of each block its accesses are known to be over; of a cooperative grid.
  std::vector<u32> known[LANES];

  Mask lanes_in(Lane wanted) const {
    Mask mask = 0;
    for (int lane = 0; lane < LANES; ++lane)
      if (state[lane] == wanted) mask |= Mask{1} << lane;
    return mask;
  }
  Mask alive() const { return ~lanes_in(Lane::HAS_EXITED); }
  bool can_run() const { return lanes_in(Lane::RUNS) != 0; }
  void move(Mask lanes, int to) {
    for_lanes(lanes, [&](int lane) { pc[lane] = to; });
  }
};

struct Block {
  int number;
  int live, waiting = 0;
  u32 time = 0;
  std::vector<u8> shared, written;
  Watch watch;
  std::vector<std::unique_ptr<Warp>> warps;
};

class Machine {
 public:
  explicit Machine(const Job& job);

  bool run();  // whether the grid ended
  const std::vector<Report>& reports() const { return reports_; }
  u64 executed() const { return executed_; }

 private:
  // What an instruction does to the order in which its group of lanes goes on.
  enum class Next { FOLLOWING, CHOOSE };

  void start_block(int number);
  void set_constants(Warp& warp);
  u64 special(int which, const Block& block, int thread, int lane) const;
  bool finish_or_report_deadlock(std::size_t place);
  void run_warp(Warp& warp, u64 most);
  Next step(Warp& warp, Mask group, int& pc);
  Mask guarded(const Warp& warp, const Instruction& i, Mask group) const;
  Registers registers(Warp& warp) const { return {warp.values.data()}; }

  Next branch(Warp& warp, const Instruction& i, Mask group, Mask active, int& pc);
  Next exit(Warp& warp, Mask group, Mask active, int pc);
  Next barrier(Warp& warp, const Instruction& i, Mask group, Mask active, int pc);
  void open_barrier(Block& block);
  Next together(Warp& warp, const Instruction& i, Mask group, Mask active, int& pc);
  void shuffle(Warp& warp, const Instruction& i, Mask lanes, int pc);
  void reduce(Warp& warp, const Instruction& i, Mask lanes);

  void load(Warp& warp, const Instruction& i, Mask active, int pc);
  void store(Warp& warp, const Instruction& i, Mask active, int pc);
  void add_atomically(Warp& warp, const Instruction& i, Mask active, int pc);
  void load_matrices(Warp& warp, const Instruction& i, Mask active, int pc);
  void store_matrices(Warp& warp, const Instruction& i, Mask active, int pc);
  void count_sectors(Warp& warp, const Instruction& i, Mask active, int bytes, int pc);
  void acquire(Warp& warp, int lane, u64 address);
  void release(Warp& warp, int lane, u64 address);

  // One access of a lane: `bytes` at an address, to write where `from` is given.
  struct Request {
    int space;
    u64 address;
    int bytes;
    const u8* from;
    bool constant, synchronizing;
  };
  u8* access(Warp& warp, int lane, int pc, Request request);
  u8* private_memory(int pc, const Request& request);
  u8* shared_memory(Warp& warp, int lane, int pc, const Request& request);
  u8* global_memory(Warp& warp, int lane, int pc, const Request& request);
  void track(Watch& watch, Warp& warp, int lane, int pc, const Request& request, bool same);
  bool ordered(const Access& before, const Warp& warp, int lane, u32 me) const;
  void report_race(const Access& before, const Warp& warp, u32 me, int pc, const std::string& what);
  void report(Fault fault, int at, int other, const std::string& example);

  const Job& job_;
  int threads_, blocks_;
  Ranges ranges_;
  Watch watch_;
  std::vector<u8> local_;
  u32 workspace_[16] = {};  // of a cooperative grid: where cooperative groups count arrivals
  std::vector<std::unique_ptr<Block>> resident_;
  std::map<u64, std::vector<u32>> released_;  // by address: what an acquire learns
  std::map<std::tuple<int, int, int>, std::size_t> known_reports_;
  std::vector<Report> reports_;
  std::mt19937 random_;
  bool stopped_ = false;
  u64 executed_ = 0;
  u8 nowhere_[64];
};

}  // namespace ptx
