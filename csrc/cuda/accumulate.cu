#include "accumulate.cuh"

namespace gcond {
namespace {

constexpr int UNROLLED = 4;

template <class A>
struct Target {
  A* data_ptr;
  float scale;
  bool overwrite;
};

// Sets the vectors or adds to them; rounded once.
template <int U, int V, class A, class G>
HD void add(const Target<A>& target, const G* gradient_ptr, const Vectors<U, V>& vectors) {
  Values<V> added[U]{}, sums[U]{};
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (vectors.has(u)) added[u] = load<V>(gradient_ptr + vectors.begin(u));
  if (!target.overwrite) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) sums[u] = load<V>(target.data_ptr + vectors.begin(u));
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float value = added[u].of[e];
      added[u].of[e] = target.overwrite ? value * target.scale
                                        : fmaf(value, target.scale, sums[u].of[e]);
    }
    if (vectors.has(u)) store<V>(target.data_ptr + vectors.begin(u), added[u]);
  }
}

template <class A>
HD void accumulate_chunk_as(const AccumulateArguments& a, TensorPtr gradient, const Chunk& chunk,
                            int thread) {
  A* target_ptr = static_cast<A*>(a.accumulator.data_ptr) + chunk.start();
  if (dtype_of(gradient) == NO_TENSOR) {
    if (a.overwrite)
      for (int e = thread; e < chunk.count; e += THREADS) target_ptr[e] = from_float<A>(0.0f);
    return;
  }
  float scale = a.scale;
  if (a.scale_tensor.data_ptr != nullptr)
    with_dtype(a.scale_tensor.dtype, a.scale_tensor.data_ptr,
               [&](const auto* scale_ptr) { scale = to_float(*scale_ptr); });
  const Target<A> target{target_ptr, scale, a.overwrite};
  // Chunks begin at vector boundaries of the tensor.
  const bool aligned = is_aligned(target_ptr) && is_aligned(address_of(gradient));
  with_dtype(dtype_of(gradient), address_of(gradient), [&](const auto* gradient_ptr) {
    for_vectors<UNROLLED>(thread, aligned, chunk.count, [&](const auto& vectors) {
      add(target, gradient_ptr + chunk.first, vectors);
    });
  });
}

HD void accumulate_chunk(const AccumulateArguments& a, const TensorList& gradients, int number,
                         int thread) {
  const Chunk chunk = chunk_at(a.chunks, number);
  const TensorPtr gradient = gradients.of[chunk.tensor];
  if (a.accumulator.dtype == FLOAT32)
    accumulate_chunk_as<float>(a, gradient, chunk, thread);
  else
    accumulate_chunk_as<__nv_bfloat16>(a, gradient, chunk, thread);
}

__global__ void __launch_bounds__(THREADS)
    accumulate_kernel(const __grid_constant__ AccumulateArguments arguments,
                      const __grid_constant__ TensorList gradients) {
  accumulate_chunk(arguments, gradients, static_cast<int>(blockIdx.x),
                   static_cast<int>(threadIdx.x));
}

}  // namespace

void accumulate(const Stream& stream, const AccumulateArguments& arguments,
                const TensorList& gradients) {
  if (stream.is_host())
    for_threads_on_host(arguments.chunks.count, [&](int chunk, int thread) {
      accumulate_chunk(arguments, gradients, chunk, thread);
    });
  else
    launch("accumulate", accumulate_kernel, stream, {arguments.chunks.count}, arguments, gradients);
}

void check_device(int device) {
  cudaFuncAttributes attributes;
  check(cudaSetDevice(device), "device " + std::to_string(device));
  check(cudaFuncGetAttributes(&attributes, accumulate_kernel), "kernels for this GPU");
}

}  // namespace gcond
