// Memory that is watched: who accessed each byte last, and whether the accesses were ordered.
#pragma once

#include <array>
#include <memory>
#include <unordered_map>

#include "program.h"

namespace ptx {

// An access: by which thread, when, and by which instruction. A block's time is the number of its
// barriers so far, a warp's the number of its warp barriers.
struct Access {
  std::uint32_t thread = 0;  // of the grid, from 1 on; 0: none
  std::uint32_t block_time = 0, warp_time = 0;
  std::int32_t at = -1;
};

// The last write and two reads of a cell. Of reads by several warps two of different warps are kept:
// whichever thread writes next, one of them is another's.
struct Cell {
  Access write, first_read, second_read;
};

// Cells for addresses, in pages. A cell stands for four bytes until an access of fewer, or across a
// boundary, divides the page into cells of one byte.
class Watch {
 public:
  // Calls `run(cell)` for the cells of an access, until one returns false.
  template <class F>
  void for_cells(std::uint64_t address, int bytes, F run) {
    for (std::uint64_t end = address + bytes; address < end;) {
      Page& page = page_of(address);
      const std::uint64_t here = std::min(end, (address / PAGE + 1) * PAGE);
      if (page.shift && (address | here) % 4) page.divide();
      for (; address < here; address += std::uint64_t{1} << page.shift)
        if (!run(page.cells[address % PAGE >> page.shift])) return;
    }
  }

 private:
  static constexpr std::uint64_t PAGE = 4096;

  struct Page {
    int shift = 2;
    std::unique_ptr<Cell[]> cells{new Cell[PAGE / 4]};

    void divide() {
      std::unique_ptr<Cell[]> finer{new Cell[PAGE]};
      for (std::uint64_t byte = 0; byte < PAGE; ++byte) finer[byte] = cells[byte >> shift];
      cells = std::move(finer);
      shift = 0;
    }
  };

  Page& page_of(std::uint64_t address) {
    if (last_ == nullptr || address / PAGE != last_number_) {
      last_number_ = address / PAGE;
      last_ = &pages_[last_number_];
    }
    return *last_;
  }

  std::unordered_map<std::uint64_t, Page> pages_;  // whose elements stay where they are
  std::uint64_t last_number_ = 0;
  Page* last_ = nullptr;
};

// The tensors that a launch may access. An access must lie within one of them.
class Ranges {
 public:
  Ranges(const Range* ranges, int count) : ranges_(ranges, ranges + count) {}

  bool contain(std::uint64_t address, int bytes) {
    if (last_ < ranges_.size() && within(ranges_[last_], address, bytes)) return true;
    const auto after = std::upper_bound(
        ranges_.begin(), ranges_.end(), address,
        [](std::uint64_t value, const Range& range) { return value < range.begin; });
    if (after == ranges_.begin()) return false;
    last_ = static_cast<std::size_t>(after - ranges_.begin()) - 1;
    return within(ranges_[last_], address, bytes);
  }

 private:
  static bool within(const Range& range, std::uint64_t address, int bytes) {
    return range.begin <= address && address + bytes <= range.end;
  }

  std::vector<Range> ranges_;
  std::size_t last_ = 0;
};

// Distinct 32-byte sectors that the lanes of one request touch, and the fewest that could hold the
// distinct bytes they ask for.
struct Sectors {
  std::array<std::uint64_t, LANES> addresses;
  int lanes = 0;

  void add(std::uint64_t address) { addresses[lanes++] = address; }

  std::pair<int, int> count(int bytes) {
    std::sort(addresses.begin(), addresses.begin() + lanes);
    const int distinct =
        static_cast<int>(std::unique(addresses.begin(), addresses.begin() + lanes) - addresses.begin());
    int sectors = 0;
    std::uint64_t next = 0;  // the first sector that is not counted yet
    for (int lane = 0; lane < distinct; ++lane) {
      const std::uint64_t first = std::max(next, addresses[lane] / 32);
      const std::uint64_t end = (addresses[lane] + bytes - 1) / 32 + 1;
      if (end > first) sectors += static_cast<int>(end - first);
      next = std::max(next, end);
    }
    return {sectors, (distinct * bytes + 31) / 32};
  }
};

}  // namespace ptx
