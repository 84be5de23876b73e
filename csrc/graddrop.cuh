// graddrop: of every element one sign is picked, and only the gradients of that sign are added up.
// Nothing is fused here, so that every backend rounds alike, and so picks alike: python/graddrop.py
// has the same operations in the same order.
#pragma once

#include "combine.cuh"

namespace gcond {

struct Graddrop {
  Rows accumulators;  // [K, N'], float32 or bfloat16
  Rows momentum;      // [N'], float32; or null
  Mask mask;          // [N' / 32], or null: all is trained
  const Segment* segments;  // [T]
  const Chunk* chunks;      // [C]
  int length;               // of a piece, in elements
  int tasks;
  const double* scale;    // [K]
  const double* factors;  // [T], or null: all 1
  double beta;
  float leak;
  std::uint64_t seed;
  const std::int64_t* draws;  // []
  std::uint64_t first;        // the place of the rows' first element
  const bool* finite;         // []
};

// Random numbers that are a function of a seed, a count of draws and a place: SplitMix64, as in
// gcond_kernels/ops/random.py.
constexpr std::uint64_t GAMMA = 0x9E3779B97F4A7C15;
constexpr int RANDOM_BITS = 23;  // and one half: so many that float32 holds each of them exactly

HD std::uint64_t mixed(std::uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EB;
  return bits ^ bits >> 31;
}

// Where the numbers of one draw start.
HD std::uint64_t start_of(std::uint64_t seed, std::int64_t draws) {
  return mixed(static_cast<std::uint64_t>(draws) * GAMMA + seed);
}

// A random number in (0, 1), an odd multiple of 2^-24.
HD float uniform(std::uint64_t start, std::uint64_t place) {
  const std::uint64_t bits = mixed(start + (place + 1) * GAMMA) >> (64 - RANDOM_BITS);
  constexpr float UNIT = 1.0f / (1 << RANDOM_BITS);
  return (static_cast<float>(static_cast<std::uint32_t>(bits)) + 0.5f) * UNIT;
}

// A row of scale 0 is not read: it may hold anything. Of rows that there are not it is 0 too.
HD float row_scale(const Graddrop& g, int task) {
  return task < g.tasks ? static_cast<float>(g.scale[task]) : 0.0f;
}

template <int U, int V>
HD void load_row(Raw<V> (&raw)[U], const Graddrop& g, int task, std::int64_t start,
                 const Vectors<U, V>& vectors) {
  const bool narrow = g.accumulators.type != FLOAT32;
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (vectors.has(u))
      raw[u] = load_raw<V>(g.accumulators.data, narrow,
                           task * g.accumulators.stride + start + vectors.begin(u));
}

// v = scale · row. Of a row that was not read this is 0, which changes no sum.
template <int V>
HD Values<V> scaled(const Raw<V>& raw, Type type, float scale) {
  Values<V> values = converted(raw, type);
#pragma unroll
  for (int e = 0; e < V; ++e) values.of[e] *= scale;
  return values;
}

// The vectors of K rows in registers, from a first one on: each is needed twice, for the purity and
// for the sum.
template <int K, int U, int V>
struct Kept {
  Raw<V> raw[K][U];
  float scale[K];

  HD Kept(const Graddrop& g, int first, std::int64_t start, const Vectors<U, V>& vectors) : raw{} {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      scale[k] = row_scale(g, first + k);
      if (scale[k] != 0.0f) load_row(raw[k], g, first + k, start, vectors);
    }
  }

  // Calls `run(u, v)` for the vectors of every row, row by row.
  template <class F>
  HD void each(Type type, F run) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int u = 0; u < U; ++u) run(u, scaled(raw[k][u], type, scale[k]));
    }
  }
};

// The rows of all tasks, K of them.
template <int K, int U, int V>
struct All {
  const Graddrop& g;
  const Kept<K, U, V> kept;

  HD All(const Graddrop& g, std::int64_t start, const Vectors<U, V>& vectors)
      : g(g), kept(g, 0, start, vectors) {}

  template <class F>
  HD void each(F run) const {
    kept.each(g.accumulators.type, run);
  }
};

// More rows than registers hold (K = 0) are read both times, some of them at once; the second time
// they are in a cache.
template <int U, int V>
struct All<0, U, V> {
  static constexpr int AT_ONCE = 4;
  const Graddrop& g;
  std::int64_t start;
  const Vectors<U, V>& vectors;

  HD All(const Graddrop& g, std::int64_t start, const Vectors<U, V>& vectors)
      : g(g), start(start), vectors(vectors) {}

  template <class F>
  HD void each(F run) const {
    for (int k = 0; k < g.tasks; k += AT_ONCE)
      Kept<AT_ONCE, U, V>(g, k, start, vectors).each(g.accumulators.type, run);
  }
};

// Which sign is kept: 1, -1, or 0 for neither. The purity P = (1 + total / size) / 2 is above the
// random U where total > (2 U - 1) size.
template <int V>
HD Values<V> kept_signs(const Values<V>& total, const Values<V>& size, std::uint64_t origin,
                        std::uint64_t place) {
  Values<V> signs;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float bar = (2.0f * uniform(origin, place + e) - 1.0f) * size.of[e];
    signs.of[e] = total.of[e] > bar ? 1.0f : total.of[e] < bar ? -1.0f : 0.0f;
  }
  return signs;
}

// Σ_k (leak + (1 - leak) · kept_k) · v_k of the vectors that begin at `start` in the rows.
template <int K, int U, int V>
HD void add_picked(Values<V> (&picked)[U], const Graddrop& g, std::uint64_t origin,
                   std::int64_t start, const Vectors<U, V>& vectors) {
  const All<K, U, V> rows(g, start, vectors);
  Values<V> total[U]{}, size[U]{}, signs[U];
  rows.each([&](int u, const Values<V>& v) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      total[u].of[e] += v.of[e];
      size[u].of[e] += fabsf(v.of[e]);
    }
  });
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = g.first + static_cast<std::uint64_t>(start + vectors.begin(u));
    signs[u] = kept_signs(total[u], size[u], origin, place);
  }
  rows.each([&](int u, const Values<V>& v) {
#pragma unroll
    for (int e = 0; e < V; ++e)
      picked[u].of[e] += signs[u].of[e] * v.of[e] > 0.0f ? v.of[e] : v.of[e] * g.leak;
  });
}

// m ← β m + (1-β) g
template <int V>
HD void average_in(Values<V>& total, const Values<V>& old, double beta) {
  const float own = static_cast<float>(1.0 - beta), kept = static_cast<float>(beta);
#pragma unroll
  for (int e = 0; e < V; ++e) total.of[e] = old.of[e] * kept + total.of[e] * own;
}

// What is done with the vectors of a piece that begins at `start` in the rows.
template <int K, int U, int V>
HD void graddrop_vectors(const Graddrop& g, std::uint64_t origin, const Output& output,
                         std::int64_t start, const Vectors<U, V>& vectors) {
  float* momentum = g.momentum.data ? static_cast<float*>(g.momentum.data) + start : nullptr;
  Values<V> total[U]{}, old[U]{};
  std::uint32_t bits[U]{};
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!vectors.has(u)) continue;
    if (momentum != nullptr) old[u] = load<V>(momentum + vectors.begin(u));
    if (g.mask != nullptr) bits[u] = trained(g.mask, start + vectors.begin(u));
  }
  add_picked<K, U, V>(total, g, origin, start, vectors);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!vectors.has(u)) continue;
    if (momentum != nullptr) average_in(total[u], old[u], g.beta);
    if (g.mask != nullptr) clear_untrained(total[u], bits[u]);
    if (momentum != nullptr) store<V>(momentum + vectors.begin(u), total[u]);
#pragma unroll
    for (int e = 0; e < V; ++e) total[u].of[e] *= output.factor;
    store_as<V>(output.type, output.data, output.first + vectors.begin(u), total[u]);
  }
}

template <int V>
HD void clear_output(const Output& output, const Vectors<1, V>& vectors) {
  store_as<V>(output.type, output.data, output.first + vectors.begin(0), Values<V>{});
}

HD bool graddrop_is_wide(const Graddrop& g, Packed output, std::int64_t offset) {
  return is_vector_boundary(g.accumulators.data) && g.accumulators.stride % 8 == 0 &&
         offset % 8 == 0 && is_vector_boundary(g.momentum.data) &&
         is_vector_boundary(address_of(output));
}

// What one thread does of a piece; K = 0 stands for any number of tasks.
template <int K>
HD void graddrop_chunk(const Graddrop& g, const Addresses& outputs, int chunk, int thread) {
  constexpr int UNROLLED = K == 0 ? 1 : K <= 2 ? 4 : K <= 4 ? 2 : 1;
  const Piece piece = piece_of(g.segments, g.chunks, chunk, g.length);
  const std::int64_t start = piece.offset + piece.first;
  const Packed packed = outputs.of[piece.tensor];
  if (type_of(packed) == NO_TENSOR) return;
  const double factor = g.factors == nullptr ? 1.0 : g.factors[piece.tensor];
  const Output output{address_of(packed), type_of(packed), piece.first,
                      static_cast<float>(factor)};

  const int whole =
      graddrop_is_wide(g, packed, piece.offset) ? piece.count / VECTOR * VECTOR : 0;
  if (!*g.finite) {  // nothing is read: zeros are written, the rest is kept
    for_vectors<1>(thread, whole, piece.count, [&](const auto& vectors) {
      clear_output(output, vectors);
    });
    return;
  }
  const std::uint64_t origin = start_of(g.seed, *g.draws);
  for_vectors<UNROLLED>(thread, whole, piece.count, [&](const auto& vectors) {
    graddrop_vectors<K>(g, origin, output, start, vectors);
  });
}

void graddrop(const Place& place, const Graddrop& arguments, const Addresses& outputs, int chunks);

}  // namespace gcond
