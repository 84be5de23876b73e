// Work on several threads.
#pragma once

#include <atomic>
#include <exception>

namespace gcond {
namespace cpu {

// Calls `task(argument)` on `threads` threads at the same time, this one among them.
void run_on_threads(int threads, void (*task)(void*), void* argument);

// Calls `run(index)` once for every index below `count`, on at most `threads` threads; which one
// takes which index is not fixed. What one of them throws is thrown here, when all have ended.
template <class Run>
void parallel(int count, int threads, const Run& run) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int index = 0; index < count; ++index) run(index);
    return;
  }
  struct Shared {
    std::atomic<int> next;
    std::atomic<bool> failed;
    std::exception_ptr error;
    int count;
    const Run* run;
  } shared{{0}, {false}, nullptr, count, &run};
  run_on_threads(
      threads,
      [](void* argument) {
        Shared& s = *static_cast<Shared*>(argument);
        try {
          for (int index = s.next++; index < s.count; index = s.next++) (*s.run)(index);
        } catch (...) {  // for want of memory
          if (!s.failed.exchange(true)) s.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace cpu
}  // namespace gcond
