#include "accumulate.cuh"

namespace gcond {
namespace {

constexpr int UNROLLED = 4;

template <class A>
struct Target {
  A* data;
  float scale;
  bool overwrite;
};

// Sets or adds to the vectors; rounded once.
template <int U, int V, class A, class G>
HD void add(const Target<A>& target, const G* gradient, const Vectors<U, V>& vectors) {
  Values<V> added[U]{}, sums[U]{};
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (vectors.has(u)) added[u] = load<V>(gradient + vectors.begin(u));
  if (!target.overwrite) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) sums[u] = load<V>(target.data + vectors.begin(u));
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float value = added[u].of[e];
      added[u].of[e] = target.overwrite ? value * target.scale
                                        : fmaf(value, target.scale, sums[u].of[e]);
    }
    if (vectors.has(u)) store<V>(target.data + vectors.begin(u), added[u]);
  }
}

// Where a parameter has no gradient.
template <class A>
HD void clear_piece(A* target, int count, int thread) {
  for (int at = thread; at < count; at += THREADS) target[at] = from_float<A>(0.0f);
}

template <class A>
HD void accumulate_piece(const Accumulate& arguments, Packed gradient, const Piece& piece,
                         int thread) {
  A* target = static_cast<A*>(arguments.accumulator) + piece.offset + piece.first;
  if (type_of(gradient) == NO_TENSOR) {
    if (arguments.overwrite) clear_piece(target, piece.count, thread);
    return;
  }
  float scale = arguments.scale;
  if (arguments.scale_tensor != nullptr)
    scale = load_as<1>(arguments.scale_type, arguments.scale_tensor, 0).of[0];
  const Target<A> scaled{target, scale, arguments.overwrite};
  // Pieces begin at vector boundaries of the tensor.
  const bool wide = is_vector_boundary(target) && is_vector_boundary(address_of(gradient));
  const int whole = wide ? piece.count / VECTOR * VECTOR : 0;
  with_type(type_of(gradient), [&](auto* null) {
    using G = std::remove_pointer_t<decltype(null)>;
    const G* from = static_cast<const G*>(address_of(gradient)) + piece.first;
    for_vectors<UNROLLED>(thread, whole, piece.count,
                          [&](const auto& vectors) { add(scaled, from, vectors); });
  });
}

HD void accumulate_chunk(const Accumulate& arguments, const Addresses& gradients, int chunk,
                         int thread) {
  const Piece piece = piece_of(arguments.segments, arguments.chunks, chunk, ACCUMULATE_CHUNK);
  const Packed gradient = gradients.of[piece.tensor];
  if (arguments.type == FLOAT32)
    accumulate_piece<float>(arguments, gradient, piece, thread);
  else
    accumulate_piece<__nv_bfloat16>(arguments, gradient, piece, thread);
}

__global__ void __launch_bounds__(THREADS)
    accumulate_kernel(const __grid_constant__ Accumulate arguments,
                      const __grid_constant__ Addresses gradients) {
  accumulate_chunk(arguments, gradients, static_cast<int>(blockIdx.x),
                   static_cast<int>(threadIdx.x));
}

}  // namespace

void accumulate(const Place& place, const Accumulate& arguments, const Addresses& gradients,
                int chunks) {
  if (!place.is_host()) {
    launch("accumulate", accumulate_kernel, place, chunks, 0, false, arguments, gradients);
    return;
  }
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int thread = 0; thread < THREADS; ++thread)
      accumulate_chunk(arguments, gradients, chunk, thread);
}

void prepare(const Place& place) {
  cudaFuncAttributes attributes;
  check(cudaSetDevice(place.device), "device " + std::to_string(place.device));
  check(cudaFuncGetAttributes(&attributes, accumulate_kernel), "kernels for this GPU");
}

}  // namespace gcond
