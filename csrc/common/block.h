// What the threads of a block do together. On the host one thread does the work of all of them: the
// loops over threads are loops, and sums are formed in the same trees.
#pragma once

#include "types.h"

namespace gcond {

constexpr int THREADS = 256;  // of a block
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;

// Calls `run` for every index below `count`, then synchronizes the block.
template <class F>
HD void parallel_for(int count, F run) {
#ifdef __CUDA_ARCH__
  for (int index = threadIdx.x; index < count; index += THREADS) run(index);
  __syncthreads();
#else
  for (int index = 0; index < count; ++index) run(index);
#endif
}

// Calls `run` in one thread, then synchronizes the block.
template <class F>
HD void run_once(F run) {
  parallel_for(1, [&](int) { run(); });
}

#ifdef __CUDACC__
// The sum over the lanes of a warp, as a tree; every lane has it.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
#endif

// The same tree on the host, over the values that the lanes would hold.
template <class T>
inline T warp_sum_on_host(const T* lanes) {
  T values[WARP];
  for (int lane = 0; lane < WARP; ++lane) values[lane] = lanes[lane];
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    for (int lane = 0; lane < distance; ++lane) values[lane] += values[lane + distance];
  return values[0];
}

// The sum over the warps of a block, in their order.
template <class T>
HD T sum_of_warps(const T* warps, int stride = 1) {
  T total = warps[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) total += warps[warp * stride];
  return total;
}

// The sum of `value(thread)` over the threads of a block; every thread has it.
template <class T, class F>
HD T block_sum(F value) {
#ifdef __CUDA_ARCH__
  __shared__ T warps[WARPS];
  const T of_warp = warp_sum<T>(value(static_cast<int>(threadIdx.x)));
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = of_warp;
  __syncthreads();
  return sum_of_warps(warps);
#else
  T lanes[THREADS], warps[WARPS];
  for (int thread = 0; thread < THREADS; ++thread) lanes[thread] = value(thread);
  for (int warp = 0; warp < WARPS; ++warp) warps[warp] = warp_sum_on_host(lanes + warp * WARP);
  return sum_of_warps(warps);
#endif
}

}  // namespace gcond
