// Loads and stores: bounds, alignment, races, and the sectors of each request.
#include <cstdio>

#include "machine.h"

namespace ptx {
namespace {

std::string hex(u64 number) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(number));
  return text;
}

std::string of_thread(int thread) { return "thread " + std::to_string(thread); }

// Orders `time` after what is known.
void learn(std::vector<u32>& known, const std::vector<u32>& other) {
  for (std::size_t block = 0; block < known.size(); ++block)
    known[block] = std::max(known[block], other[block]);
}

}  // namespace

void Machine::report(Fault fault, int at, int other, const std::string& example) {
  const auto [found, is_new] = known_reports_.try_emplace({fault, at, other}, reports_.size());
  if (is_new)
    reports_.push_back({fault, at, other, 1, example});
  else
    ++reports_[found->second].count;
}

void Machine::count_sectors(Warp& warp, const Instruction& i, Mask active, int bytes, int pc) {
  if (i.second != GLOBAL || !active) return;
  Sectors sectors;
  const Registers r = registers(warp);
  for_lanes(active, [&](int l) { sectors.add(r.at(i.source[0], l) + i.immediate); });
  const auto [touched, fewest] = sectors.count(bytes);
  job_.counts[pc][0] += 1;
  job_.counts[pc][1] += touched;
  job_.counts[pc][2] += fewest;
}

void Machine::load(Warp& warp, const Instruction& i, Mask active, int pc) {
  const Registers r = registers(warp);
  const int size = size_of(i.type);
  count_sectors(warp, i, active, size * i.results, pc);
  for_lanes(active, [&](int l) {
    const u64 address = r.at(i.source[0], l) + i.immediate;
    const bool synchronizes = i.flags & ACQUIRE;
    const u8* from = access(warp, l, pc, {i.second, address, size * i.results, nullptr,
                                          (i.flags & CONSTANT) != 0, synchronizes});
    for (int n = 0; n < i.results; ++n) {
      u64 bits = 0;
      std::memcpy(&bits, from + n * size, size);
      if (i.result[n] >= 0) r.at(i.result[n], l) = is_signed(i.type) ? extended(bits, i.type) : bits;
    }
    if (synchronizes) acquire(warp, l, address);
  });
}

void Machine::store(Warp& warp, const Instruction& i, Mask active, int pc) {
  const Registers r = registers(warp);
  const int size = size_of(i.type), count = i.sources - 1;
  count_sectors(warp, i, active, size * count, pc);
  for_lanes(active, [&](int l) {
    u8 bytes[64];
    for (int n = 0; n < count; ++n) std::memcpy(bytes + n * size, &r.at(i.source[1 + n], l), size);
    const u64 address = r.at(i.source[0], l) + i.immediate;
    const bool synchronizes = i.flags & RELEASE;
    if (synchronizes) release(warp, l, address);
    u8* to = access(warp, l, pc, {i.second, address, size * count, bytes, false, synchronizes});
    std::memcpy(to, bytes, size * count);
  });
}

void Machine::add_atomically(Warp& warp, const Instruction& i, Mask active, int pc) {
  const Registers r = registers(warp);
  for_lanes(active, [&](int l) {
    const u64 address = r.at(i.source[0], l) + i.immediate;
    u8* place = access(warp, l, pc, {i.second, address, 4, nullptr, false, true});
    u32 old;
    std::memcpy(&old, place, 4);
    const u32 sum = old + r.get<u32>(i.source[1], l);
    std::memcpy(place, &sum, 4);
    if (i.result[0] >= 0) r.put<u32>(i.result[0], l, old);
    if (i.flags & RELEASE) release(warp, l, address);
    if (i.flags & ACQUIRE) acquire(warp, l, address);
  });
}

void Machine::acquire(Warp& warp, int lane, u64 address) {
  if (!job_.cooperative) return;
  const auto found = released_.find(address);
  if (found != released_.end()) learn(warp.known[lane], found->second);
}

void Machine::release(Warp& warp, int lane, u64 address) {
  if (!job_.cooperative) return;
  std::vector<u32>& published = released_[address];
  published.resize(blocks_, 0);
  learn(published, warp.known[lane]);
  u32& own = published[warp.block->number];
  own = std::max(own, warp.block->time);
}

// Eight rows of eight two-byte elements; the address of row r of matrix m is lane 8 m + r's.
void Machine::load_matrices(Warp& warp, const Instruction& i, Mask active, int pc) {
  if (active != ~Mask{0}) report(ABSENT_LANE, pc, -1, "ldmatrix with lanes " + hex(active));
  const Registers r = registers(warp);
  u16 rows[4][8][8];
  for (int lane = 0; lane < 8 * i.results; ++lane) {
    const u64 address = r.get<u32>(i.source[0], lane) + i.immediate;
    const u8* from = access(warp, lane, pc, {SHARED, address, 16, nullptr, false, false});
    std::memcpy(rows[lane / 8][lane % 8], from, 16);
  }
  for (int m = 0; m < i.results; ++m)
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const u32 low = i.flags & TRANSPOSED ? rows[m][column][row] : rows[m][row][column];
      const u32 high = i.flags & TRANSPOSED ? rows[m][column + 1][row] : rows[m][row][column + 1];
      r.put<u32>(i.result[m], lane, high << 16 | low);
    }
}

void Machine::store_matrices(Warp& warp, const Instruction& i, Mask active, int pc) {
  if (active != ~Mask{0}) report(ABSENT_LANE, pc, -1, "stmatrix with lanes " + hex(active));
  const Registers r = registers(warp);
  u16 rows[4][8][8];
  const int matrices = i.sources - 1;
  for (int m = 0; m < matrices; ++m)
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const u32 pair = r.get<u32>(i.source[1 + m], lane);
      (i.flags & TRANSPOSED ? rows[m][column][row] : rows[m][row][column]) = pair & 0xffff;
      (i.flags & TRANSPOSED ? rows[m][column + 1][row] : rows[m][row][column + 1]) = pair >> 16;
    }
  for (int lane = 0; lane < 8 * matrices; ++lane) {
    const u8* from = reinterpret_cast<const u8*>(rows[lane / 8][lane % 8]);
    const u64 address = r.get<u32>(i.source[0], lane) + i.immediate;
    std::memcpy(access(warp, lane, pc, {SHARED, address, 16, from, false, false}), from, 16);
  }
}

u8* Machine::access(Warp& warp, int lane, int pc, Request request) {
  const auto lies_in = [&](const void* begin, std::size_t bytes) {
    const u64 first = reinterpret_cast<u64>(begin);
    return request.address >= first && request.address + request.bytes <= first + bytes;
  };
  if (request.space == GENERIC) {
    request.space = GLOBAL;
    if (lies_in(local_.data(), local_.size())) request.space = LOCAL;
    if (lies_in(job_.parameters, job_.parameter_bytes)) request.space = PARAMETER;
  }
  if (request.address % request.bytes)
    report(MISALIGNED, pc, -1, std::to_string(request.bytes) + " bytes at " + hex(request.address));
  if (request.space == SHARED) {
    request.address = static_cast<u32>(request.address);
    return shared_memory(warp, lane, pc, request);
  }
  if (request.space == GLOBAL) {
    if (job_.cooperative && lies_in(workspace_, sizeof workspace_))
      return reinterpret_cast<u8*>(request.address);
    return global_memory(warp, lane, pc, request);
  }
  const bool is_local = request.space == LOCAL;
  if (is_local ? lies_in(local_.data(), local_.size()) : lies_in(job_.parameters, job_.parameter_bytes))
    return reinterpret_cast<u8*>(request.address);
  report(OUT_OF_BOUNDS, pc, -1, is_local ? "beyond local memory" : "beyond the parameters");
  return nowhere_;
}

u8* Machine::shared_memory(Warp& warp, int lane, int pc, const Request& request) {
  Block& block = *warp.block;
  if (request.address + request.bytes > block.shared.size()) {
    report(OUT_OF_BOUNDS, pc, -1, std::to_string(request.bytes) + " bytes at " + hex(request.address) +
                                      " of " + std::to_string(block.shared.size()) + " shared");
    return nowhere_;
  }
  u8* place = &block.shared[request.address];
  u8* written = &block.written[request.address];
  const bool same = request.from && std::memcmp(place, request.from, request.bytes) == 0;
  if (request.from)
    std::memset(written, 1, request.bytes);
  else if (std::memchr(written, 0, request.bytes))
    report(UNWRITTEN_SHARED, pc, -1,
           hex(request.address) + ", by " + of_thread(warp.number * LANES + lane));
  track(block.watch, warp, lane, pc, request, same);
  return place;
}

u8* Machine::global_memory(Warp& warp, int lane, int pc, const Request& request) {
  if (!ranges_.contain(request.address, request.bytes)) {
    report(OUT_OF_BOUNDS, pc, -1, std::to_string(request.bytes) + " bytes at " + hex(request.address) +
                                      ", in no tensor, by " + of_thread(warp.number * LANES + lane) +
                                      " of block " + std::to_string(warp.block->number));
    std::memset(nowhere_, 0xfe, sizeof nowhere_);
    return nowhere_;
  }
  u8* place = reinterpret_cast<u8*>(request.address);
  if (request.constant)
    watch_.for_cells(request.address, request.bytes, [&](const Cell& cell) {
      if (!cell.write.thread) return true;
      report(CONSTANT_WRITTEN, pc, cell.write.at, "ld.global.nc of what this launch has written");
      return false;
    });
  const bool same = request.from && std::memcmp(place, request.from, request.bytes) == 0;
  if (!request.synchronizing) track(watch_, warp, lane, pc, request, same);
  return place;
}

bool Machine::ordered(const Access& before, const Warp& warp, int lane, u32 me) const {
  if (!before.thread || before.thread == me) return true;
  const int thread = static_cast<int>(before.thread - 1) % threads_;
  const int block = static_cast<int>(before.thread - 1) / threads_;
  if (block != warp.block->number)
    return job_.cooperative && before.block_time < warp.known[lane][block];
  if (before.block_time < warp.block->time) return true;
  return thread / LANES == warp.number && before.warp_time < warp.time;
}

void Machine::report_race(const Access& before, const Warp& warp, u32 me, int pc,
                          const std::string& what) {
  const auto block_of = [&](u32 thread) { return static_cast<int>(thread - 1) / threads_; };
  const auto thread_of = [&](u32 thread) { return static_cast<int>(thread - 1) % threads_; };
  const bool same_block = block_of(before.thread) == block_of(me);
  const bool same_warp = same_block && thread_of(before.thread) / LANES == warp.number;
  report(same_warp ? RACE_IN_WARP : same_block ? RACE_IN_BLOCK : RACE_OF_BLOCKS, pc, before.at,
         what + ": " + of_thread(thread_of(me)) + " of block " + std::to_string(block_of(me)) +
             " after " + of_thread(thread_of(before.thread)) + " of block " +
             std::to_string(block_of(before.thread)));
}

// Compares an access with those before it, and records it. Where several threads write the value
// that is there already, nobody can see the order.
void Machine::track(Watch& watch, Warp& warp, int lane, int pc, const Request& request, bool same) {
  const u32 me = warp.block->number * threads_ + warp.number * LANES + lane + 1;
  const Access now{me, warp.block->time, warp.time, pc};
  const auto is_over = [&](const Access& before) { return ordered(before, warp, lane, me); };
  const auto warp_of = [&](const Access& a) { return (a.thread - 1) / threads_ * 64 + (a.thread - 1) % threads_ / LANES; };
  watch.for_cells(request.address, request.bytes, [&](Cell& cell) {
    if (request.from) {
      if (!same && !is_over(cell.write)) report_race(cell.write, warp, me, pc, "write after write");
      for (const Access* read : {&cell.first_read, &cell.second_read})
        if (!same && !is_over(*read)) report_race(*read, warp, me, pc, "write after read");
      cell.write = now;
      return true;
    }
    if (!is_over(cell.write)) report_race(cell.write, warp, me, pc, "read after write");
    if (is_over(cell.first_read))
      cell.first_read = now;
    else if (is_over(cell.second_read) || warp_of(cell.first_read) != warp_of(now))
      cell.second_read = now;
    return true;
  });
}

}  // namespace ptx
