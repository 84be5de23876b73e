#include "accumulate.cuh"

namespace gcond {
namespace {

// Vectors of every thread in a full piece: all loads are on their way before the first is used.
constexpr int UNROLLED = ACCUMULATE_CHUNK / (THREADS * VECTOR);

template <class A>
struct Target {
  A* data;
  float scale;
  bool overwrite;
};

// Sets or adds to U vectors of V elements, THREADS vectors apart; rounded once.
template <int U, int V, class A, class G>
HD void add(const Target<A>& target, const G* gradient, std::int64_t at) {
  Values<V> added[U], sums[U]{};
#pragma unroll
  for (int u = 0; u < U; ++u) added[u] = load<V>(gradient + at + u * THREADS * V);
  if (!target.overwrite) {
#pragma unroll
    for (int u = 0; u < U; ++u) sums[u] = load<V>(target.data + at + u * THREADS * V);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float value = added[u].of[e];
      added[u].of[e] = target.overwrite ? value * target.scale
                                        : fmaf(value, target.scale, sums[u].of[e]);
    }
    store<V>(target.data + at + u * THREADS * V, added[u]);
  }
}

// What one thread does of a piece: the whole piece, its whole vectors, or what is left.
template <class A, class G>
HD void add_piece(const Target<A>& target, const G* gradient, std::int64_t first, int count,
                  bool wide, int thread) {
  if (wide && count == ACCUMULATE_CHUNK) {
    add<UNROLLED, VECTOR>(target, gradient, first + thread * VECTOR);
    return;
  }
  const int whole = wide ? count / VECTOR * VECTOR : 0;
  for (int at = thread * VECTOR; at < whole; at += THREADS * VECTOR)
    add<1, VECTOR>(target, gradient, first + at);
  for (int at = whole + thread; at < count; at += THREADS) add<1, 1>(target, gradient, first + at);
}

// Where a parameter has no gradient.
template <class A>
HD void clear_piece(A* target, std::int64_t first, int count, int thread) {
  for (int at = thread; at < count; at += THREADS) target[first + at] = from_float<A>(0.0f);
}

template <class A>
HD void accumulate_piece(const Accumulate& arguments, Packed gradient, const Segment& segment,
                         std::int64_t first, int count, int thread) {
  A* target = static_cast<A*>(arguments.accumulator) + segment.offset;
  if (type_of(gradient) == NO_TENSOR) {
    if (arguments.overwrite) clear_piece(target, first, count, thread);
    return;
  }
  float scale = arguments.scale;
  if (arguments.scale_tensor != nullptr)
    scale = load_as<1>(arguments.scale_type, arguments.scale_tensor, 0).of[0];
  const Target<A> scaled{target, scale, arguments.overwrite};
  const bool wide = is_vector_boundary(target) && is_vector_boundary(address_of(gradient));
  with_type(type_of(gradient), [&](auto* null) {
    using G = std::remove_pointer_t<decltype(null)>;
    add_piece(scaled, static_cast<const G*>(address_of(gradient)), first, count, wide, thread);
  });
}

HD void accumulate_chunk(const Accumulate& arguments, const Addresses& gradients, int chunk,
                         int thread) {
  const Chunk piece = arguments.chunks[chunk];
  const Segment segment = arguments.segments[piece.tensor];
  const std::int64_t first = static_cast<std::int64_t>(piece.piece) * ACCUMULATE_CHUNK;
  const std::int64_t left = segment.size - first;
  const int count = left < ACCUMULATE_CHUNK ? static_cast<int>(left) : ACCUMULATE_CHUNK;
  const Packed gradient = gradients.of[piece.tensor];
  if (arguments.type == FLOAT32)
    accumulate_piece<float>(arguments, gradient, segment, first, count, thread);
  else
    accumulate_piece<__nv_bfloat16>(arguments, gradient, segment, first, count, thread);
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
