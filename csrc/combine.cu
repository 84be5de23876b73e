#include "combine.cuh"

namespace gcond {
namespace {

HD Resolved read(const ResolvedAt& at) {
  return {at.weights, at.stride, *at.finite, at.clipping == nullptr ? 1.0 : *at.clipping};
}

__global__ void __launch_bounds__(THREADS)
    combine_kernel(const __grid_constant__ Combine arguments, const ResolvedAt resolved,
                   const __grid_constant__ Addresses outputs) {
  combine_chunk(arguments, read(resolved), outputs, static_cast<int>(blockIdx.x),
                static_cast<int>(threadIdx.x));
}

HD void factor_of(const Factors& arguments, const ResolvedAt& resolved, const Addresses& outputs,
                  int tensor) {
  const bool written = is_written(outputs, tensor) && *resolved.finite;
  find_factor(arguments, resolved.weights + tensor * resolved.stride, tensor, written);
  count_step(arguments, tensor, written);
}

__global__ void __launch_bounds__(THREADS)
    factor_kernel(const __grid_constant__ Factors arguments, const ResolvedAt resolved,
                  const __grid_constant__ Addresses outputs) {
  const int tensor = static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  if (tensor < arguments.tensors) factor_of(arguments, resolved, outputs, tensor);
}

__global__ void __launch_bounds__(THREADS)
    clipping_kernel(const double* squares, int tensors, double max_norm, double* factor) {
  const double found = clipping_factor(squares, tensors, max_norm);
  if (threadIdx.x == 0) *factor = found;
}

}  // namespace

void combine(const Place& place, const Combine& arguments, const ResolvedAt& resolved,
             const Addresses& outputs, int chunks) {
  if (!place.is_host()) {
    launch("combine", combine_kernel, place, chunks, 0, false, arguments, resolved, outputs);
    return;
  }
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int thread = 0; thread < THREADS; ++thread)
      combine_chunk(arguments, read(resolved), outputs, chunk, thread);
}

void factors(const Place& place, const Factors& arguments, const ResolvedAt& resolved,
             const Addresses& outputs) {
  if (!place.is_host()) {
    const int blocks = (arguments.tensors + THREADS - 1) / THREADS;
    launch("combine", factor_kernel, place, blocks, 0, false, arguments, resolved, outputs);
    return;
  }
  for (int tensor = 0; tensor < arguments.tensors; ++tensor)
    factor_of(arguments, resolved, outputs, tensor);
}

void clipping(const Place& place, const double* squares, int tensors, double max_norm,
              double* factor) {
  if (place.is_host())
    *factor = clipping_factor(squares, tensors, max_norm);
  else
    launch("combine", clipping_kernel, place, 1, 0, false, squares, tensors, max_norm, factor);
}

}  // namespace gcond
