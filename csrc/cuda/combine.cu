#include "combine.cuh"

namespace gcond {
namespace {

HD Resolution read(const ResolutionPtrs& r) {
  const double clip_factor = r.clip_factor_ptr == nullptr ? 1.0 : *r.clip_factor_ptr;
  return {r.weights_ptr, r.stride, *r.finite_ptr, clip_factor};
}

__global__ void __launch_bounds__(THREADS)
    combine_kernel(const __grid_constant__ CombineArguments arguments,
                   const ResolutionPtrs resolution, const __grid_constant__ TensorList outputs) {
  combine_chunk(arguments, read(resolution), outputs, static_cast<int>(blockIdx.x),
                static_cast<int>(threadIdx.x));
}

HD void find_factor_of(const FactorArguments& arguments, const ResolutionPtrs& resolution,
                       const TensorList& outputs, int tensor) {
  const bool written = is_written(outputs, tensor) && *resolution.finite_ptr;
  find_factor(arguments, resolution.weights_ptr + tensor * resolution.stride, tensor, written);
  count_step(arguments, tensor, written);
}

__global__ void __launch_bounds__(THREADS)
    factor_kernel(const __grid_constant__ FactorArguments arguments,
                  const ResolutionPtrs resolution, const __grid_constant__ TensorList outputs) {
  const int tensor = static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  if (tensor < arguments.tensors) find_factor_of(arguments, resolution, outputs, tensor);
}

__global__ void __launch_bounds__(THREADS)
    clip_kernel(const double* squares_ptr, int tensors, double max_norm, double* factor_ptr) {
  const double factor = clip_factor(squares_ptr, tensors, max_norm);
  if (threadIdx.x == 0) *factor_ptr = factor;
}

}  // namespace

void combine(const Stream& stream, const CombineArguments& arguments,
             const ResolutionPtrs& resolution, const TensorList& outputs) {
  if (stream.is_host())
    for_threads_on_host(arguments.chunks.count, [&](int chunk, int thread) {
      combine_chunk(arguments, read(resolution), outputs, chunk, thread);
    });
  else
    launch("combine", combine_kernel, stream, {arguments.chunks.count}, arguments, resolution,
           outputs);
}

void find_factors(const Stream& stream, const FactorArguments& arguments,
                  const ResolutionPtrs& resolution, const TensorList& outputs) {
  if (stream.is_host())
    for (int tensor = 0; tensor < arguments.tensors; ++tensor)
      find_factor_of(arguments, resolution, outputs, tensor);
  else
    launch("combine", factor_kernel, stream, {(arguments.tensors + THREADS - 1) / THREADS},
           arguments, resolution, outputs);
}

void find_clip_factor(const Stream& stream, const double* squares_ptr, int tensors, double max_norm,
                      double* factor_ptr) {
  if (stream.is_host())
    *factor_ptr = clip_factor(squares_ptr, tensors, max_norm);
  else
    launch("combine", clip_kernel, stream, {1}, squares_ptr, tensors, max_norm, factor_ptr);
}

}  // namespace gcond
