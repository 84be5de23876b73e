#include "gramian.cuh"

namespace gcond {
namespace {

template <int K, bool MASKABLE>
__global__ void __launch_bounds__(THREADS, 1)
    products_kernel(const __grid_constant__ Gramian arguments) {
  products_of_chunk<K, MASKABLE>(arguments, static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(THREADS) sum_kernel(const __grid_constant__ Gramian arguments,
                                                      const __grid_constant__ Totals totals) {
  add_up(arguments, totals, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

template <int K, bool MASKABLE>
void products(const Place& place, const Gramian& arguments) {
  if (!place.is_host()) {
    launch("gramian", products_kernel<K, MASKABLE>, place, arguments.chunk_count, 0, false,
           arguments);
    return;
  }
  for (int chunk = 0; chunk < arguments.chunk_count; ++chunk)
    products_of_chunk<K, MASKABLE>(arguments, chunk);
}

// One block for every sum over all tensors, and enough that a warp has one tensor's sum to do.
int blocks_for_sums(const Gramian& g, const Totals& totals) {
  const std::int64_t wanted = (sums_of_tensors(g, totals) + WARPS - 1) / WARPS;
  return totals_of(totals) + static_cast<int>(wanted < 4096 ? wanted : 4096);
}

}  // namespace

void add_up(const Place& place, const Gramian& arguments, const Totals& totals) {
  if (place.is_host())
    add_up(arguments, totals, 0, 1);
  else
    launch("gramian", sum_kernel, place, blocks_for_sums(arguments, totals), 0, false, arguments,
           totals);
}

void gramian(const Place& place, const Gramian& arguments, const Totals& totals) {
  with_tasks(totals.tasks, [&](auto tasks) {
    constexpr int K = decltype(tasks)::value;
    if (arguments.mask == nullptr)
      products<K, false>(place, arguments);
    else
      products<K, true>(place, arguments);
  });
  add_up(place, arguments, totals);
}

}  // namespace gcond
