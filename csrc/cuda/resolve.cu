#include "resolve.cuh"

#include <cooperative_groups.h>

#include <algorithm>
#include <vector>

namespace gcond {
namespace {

constexpr int MAX_DEVICES = 64;

HD bool needs_norms(const ResolveArguments& r) { return r.factors.per_tensor_ptr != nullptr; }

HD Resolution resolution_in(const Scratch& scratch, double clip_factor) {
  return {scratch.weights, 0, scratch.shared->finite, clip_factor};
}

// Stores the state of the next step, by one block, when no other reads the old one any more.
HD void store_all_state(const ResolveArguments& r, const TensorList& outputs,
                        const Scratch& scratch) {
  store_state(r.arbitrate, scratch);
  if (!scratch.shared->finite) return;
  parallel_for(r.factors.tensors,
               [&](int tensor) { count_step(r.factors, tensor, is_written(outputs, tensor)); });
}

// Makes both passes over memory. Between them every block resolves the conflicts: all find the same
// bits, and none waits for the answer of another.
template <int K>
__global__ void __launch_bounds__(THREADS, 1)
    resolve_kernel(const __grid_constant__ ResolveArguments r,
                   const __grid_constant__ TensorList outputs) {
  __shared__ double memory[scratch_size(K)];
  auto grid = cooperative_groups::this_grid();
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int chunks = r.gramian.chunks.count;
  for (int chunk = block; chunk < chunks; chunk += blocks)
    sum_chunk_in_block<K, true>(r.gramian, chunk);
  grid.sync();

  const auto find_own_factors = [&](const double* weights_ptr, bool finite) {
    for (int t = block * THREADS + thread; t < r.factors.tensors; t += blocks * THREADS)
      find_factor(r.factors, weights_ptr, t, is_written(outputs, t) && finite);
  };
  sum_partials(r.gramian, block, blocks);
  if (r.factors.factors_ptr != nullptr && !needs_norms(r)) find_own_factors(nullptr, true);
  grid.sync();

  const Scratch scratch = scratch_in(memory, K);
  resolve_conflicts(r.arbitrate, scratch, block == 0);
  double clipping = 1.0;
  if (needs_norms(r)) {
    find_own_factors(scratch.weights, scratch.shared->finite);
    grid.sync();
    clipping = clip_factor(r.factors.squares_ptr, r.factors.tensors, r.max_norm);
  }
  // From here on no block reads the old state; the one that writes the new waits for that, later.
  auto all_have_read = grid.barrier_arrive();

  // Backwards: what the first pass read last is still in the cache.
  const int last = block < chunks ? block + (chunks - 1 - block) / blocks * blocks : -1;
  const Resolution resolution = resolution_in(scratch, clipping);
  for (int chunk = last; chunk >= 0; chunk -= blocks)
    combine_chunk(r.combine, resolution, outputs, chunk, thread);

  grid.barrier_wait(std::move(all_have_read));
  if (block == 0) store_all_state(r, outputs, scratch);
}

// As many blocks as run at the same time, and no more than have something to do.
template <int K>
int blocks_for(const Stream& stream, const ResolveArguments& r) {
  static int resident[MAX_DEVICES] = {};
  if (stream.device >= MAX_DEVICES)
    throw std::invalid_argument("a device number beyond " + std::to_string(MAX_DEVICES - 1));
  int& known = resident[stream.device];
  if (known == 0) {
    int per_processor = 0, processors = 0, cooperative = 0;
    check(cudaSetDevice(stream.device), "resolve");
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, stream.device),
          "resolve");
    if (!cooperative) throw std::runtime_error("resolve: the GPU has no cooperative launches");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device),
          "resolve");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, resolve_kernel<K>, THREADS, 0),
          "resolve");
    known = per_processor * processors;
  }
  return std::max(1, std::min(known, std::max(r.gramian.chunks.count, product_count(r.gramian))));
}

// The same on the host, in the same order.
template <int K>
void resolve_on_host(const ResolveArguments& r, const TensorList& outputs) {
  const int chunks = r.gramian.chunks.count;
  for (int chunk = 0; chunk < chunks; ++chunk) sum_chunk_in_block<K, true>(r.gramian, chunk);
  sum_partials(r.gramian, 0, 1);
  std::vector<double> memory(scratch_size(K));
  const Scratch scratch = scratch_in(memory.data(), K);
  resolve_conflicts(r.arbitrate, scratch, true);
  if (r.factors.factors_ptr != nullptr)
    for (int t = 0; t < r.factors.tensors; ++t)
      find_factor(r.factors, scratch.weights, t, is_written(outputs, t) && scratch.shared->finite);
  const double clipping =
      needs_norms(r) ? clip_factor(r.factors.squares_ptr, r.factors.tensors, r.max_norm) : 1.0;
  const Resolution resolution = resolution_in(scratch, clipping);
  for (int chunk = chunks - 1; chunk >= 0; --chunk)
    for (int thread = 0; thread < THREADS; ++thread)
      combine_chunk(r.combine, resolution, outputs, chunk, thread);
  store_all_state(r, outputs, scratch);
}

}  // namespace

void resolve(const Stream& stream, const ResolveArguments& arguments, const TensorList& outputs) {
  with_tasks(arguments.arbitrate.tasks, [&](auto tasks) {
    constexpr int K = decltype(tasks)::value;
    if (stream.is_host())
      resolve_on_host<K>(arguments, outputs);
    else
      launch("resolve", resolve_kernel<K>, stream, {blocks_for<K>(stream, arguments), 0, true},
             arguments, outputs);
  });
}

}  // namespace gcond
