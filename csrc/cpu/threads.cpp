#include "threads.h"

#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(GCOND_OWN_THREADS) && defined(__unix__)
#include <dlfcn.h>
#endif

namespace gcond {
namespace cpu {
namespace {

// The function by which code of GCC starts the threads of OpenMP.
using GompParallel = void (*)(void (*task)(void*), void* argument, unsigned threads,
                              unsigned flags);

// Torch's own threads, where it uses OpenMP: others beside them would compete for the processors,
// for both wait in loops.
GompParallel torch_threads() {
#if !defined(GCOND_OWN_THREADS) && defined(__unix__)
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

void run_on_threads(int threads, void (*task)(void*), void* argument) {
  if (const GompParallel start = torch_threads()) {
    start(task, argument, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(task, argument);
  } catch (const std::system_error&) {  // those that have started do the work
  }
  task(argument);
  for (std::thread& other : others) other.join();
}

}  // namespace cpu
}  // namespace gcond
