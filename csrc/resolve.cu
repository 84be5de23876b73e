#include "resolve.cuh"

#include <cooperative_groups.h>

#include <algorithm>
#include <vector>

namespace gcond {
namespace {

constexpr int MOST_DEVICES = 64;

HD bool clips(const Resolve& r) { return r.max_norm < INFINITY; }

// What was found, in the memory of the block.
HD Resolved resolved_in(const Scratch& scratch, double clipping) {
  return {scratch.weights, 0, scratch.common->finite, clipping};
}

// The state of the next step, by one block, when no other reads the old one any more.
HD void keep(const Resolve& r, const Addresses& outputs, const Scratch& scratch) {
  keep_state(r.arbitrate, scratch);
  if (!scratch.common->finite) return;
  each(r.factors.tensors,
       [&](int tensor) { count_step(r.factors, tensor, is_written(outputs, tensor)); });
}

// Both passes over memory. Between them every block resolves the conflicts for itself: they find
// the same, and nobody waits for the answer of one.
template <int K>
__global__ void __launch_bounds__(THREADS, 1)
    resolve_kernel(const __grid_constant__ Resolve r, const __grid_constant__ Addresses outputs) {
  __shared__ double memory[scratch_doubles(K)];
  auto grid = cooperative_groups::this_grid();
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int thread = static_cast<int>(threadIdx.x), number = block * THREADS + thread;
  const int chunks = r.gramian.chunk_count;
  for (int chunk = block; chunk < chunks; chunk += blocks) products_of_chunk<K, true>(r.gramian, chunk);
  grid.sync();

  add_up(r.gramian, r.totals, block, blocks);
  const bool factors_now = r.factors.factors != nullptr && !r.factors.norms;
  if (factors_now) {
    for (int tensor = number; tensor < r.factors.tensors; tensor += blocks * THREADS)
      find_factor(r.factors, nullptr, tensor, is_written(outputs, tensor));
  }
  grid.sync();

  const Scratch scratch = scratch_in(memory, K);
  arbitrate_in(r.arbitrate, scratch, block == 0);
  double clipping = 1.0;
  if (r.factors.norms) {
    for (int tensor = number; tensor < r.factors.tensors; tensor += blocks * THREADS)
      find_factor(r.factors, scratch.weights, tensor,
                  is_written(outputs, tensor) && scratch.common->finite);
    grid.sync();
    if (clips(r)) clipping = clipping_factor(r.factors.squares, r.factors.tensors, r.max_norm);
  }
  // From here on no block reads the old state; the one that writes the new waits for that, later.
  auto all_have_read = grid.barrier_arrive();

  // Backwards: what the first pass read last is still in the cache.
  const int last = block < chunks ? block + (chunks - 1 - block) / blocks * blocks : -1;
  const Resolved resolved = resolved_in(scratch, clipping);
  for (int chunk = last; chunk >= 0; chunk -= blocks)
    combine_chunk(r.combine, resolved, outputs, chunk, thread);

  grid.barrier_wait(std::move(all_have_read));
  if (block == 0) keep(r, outputs, scratch);
}

// As many blocks as run at the same time, and no more than have something to do.
template <int K>
int grid_of(const Place& place, const Resolve& r) {
  static int resident[MOST_DEVICES] = {};
  if (place.device >= MOST_DEVICES)
    throw std::invalid_argument("a device number beyond " + std::to_string(MOST_DEVICES - 1));
  int& known = resident[place.device];
  if (known == 0) {
    int each = 0, processors = 0, cooperative = 0;
    check(cudaSetDevice(place.device), "resolve");
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, place.device),
          "resolve");
    if (!cooperative) throw std::runtime_error("resolve: the GPU has no cooperative launches");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, place.device),
          "resolve");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, resolve_kernel<K>, THREADS, 0),
          "resolve");
    known = each * processors;
  }
  return std::max(1, std::min(known, std::max(r.gramian.chunk_count, totals_of(r.totals))));
}

// The same on the host, in the same order.
template <int K>
void resolve_on_host(const Resolve& r, const Addresses& outputs) {
  for (int chunk = 0; chunk < r.gramian.chunk_count; ++chunk)
    products_of_chunk<K, true>(r.gramian, chunk);
  add_up(r.gramian, r.totals, 0, 1);
  std::vector<double> memory(scratch_doubles(K));
  const Scratch scratch = scratch_in(memory.data(), K);
  arbitrate_in(r.arbitrate, scratch, true);
  double clipping = 1.0;
  if (r.factors.factors != nullptr) {
    for (int tensor = 0; tensor < r.factors.tensors; ++tensor)
      find_factor(r.factors, scratch.weights, tensor,
                  is_written(outputs, tensor) && scratch.common->finite);
    if (clips(r)) clipping = clipping_factor(r.factors.squares, r.factors.tensors, r.max_norm);
  }
  const Resolved resolved = resolved_in(scratch, clipping);
  for (int chunk = r.gramian.chunk_count - 1; chunk >= 0; --chunk)
    for (int thread = 0; thread < THREADS; ++thread)
      combine_chunk(r.combine, resolved, outputs, chunk, thread);
  keep(r, outputs, scratch);
}

}  // namespace

void resolve(const Place& place, const Resolve& arguments, const Addresses& outputs) {
  with_tasks(arguments.arbitrate.tasks, [&](auto tasks) {
    constexpr int K = decltype(tasks)::value;
    if (place.is_host())
      resolve_on_host<K>(arguments, outputs);
    else
      launch("resolve", resolve_kernel<K>, place, grid_of<K>(place, arguments), 0, true, arguments,
             outputs);
  });
}

}  // namespace gcond
