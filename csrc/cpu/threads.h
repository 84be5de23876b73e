// Work on several threads.
#pragma once

#include <atomic>

namespace gcond {
namespace cpu {

// Calls `task(argument)` on `threads` threads at the same time, this one among them.
void run_on_threads(int threads, void (*task)(void*), void* argument);

// Calls `run(index)` once for every index below `count`, on at most `threads` threads; which one
// takes which index is not fixed.
template <class Run>
void parallel(int count, int threads, const Run& run) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int index = 0; index < count; ++index) run(index);
    return;
  }
  struct Shared {
    std::atomic<int> next;
    int count;
    const Run* run;
  } shared{{0}, count, &run};
  run_on_threads(
      threads,
      [](void* argument) {
        Shared& s = *static_cast<Shared*>(argument);
        for (int index = s.next++; index < s.count; index = s.next++) (*s.run)(index);
      },
      &shared);
}

}  // namespace cpu
}  // namespace gcond
