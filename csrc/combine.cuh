// combine: one weighted sum of the accumulators is written as the gradient of every parameter, with
// momentum and history in the same pass.
#pragma once

#include "common.cuh"
#include "launch.cuh"
#include "team.cuh"

namespace gcond {

constexpr int COMBINE_CHUNK = 4096;

// Below this norm a trust ratio is 1: a tensor of zeros has no scale to keep to.
constexpr double TRUST_RATIO_EPS = 1e-8;

struct Combine {
  Rows accumulators;  // [K, N'], float32 or bfloat16
  Rows history;       // [K, N'], float32, bfloat16 or float16; or null
  Rows momentum;      // [N'], float32; or null
  Mask mask;          // [N' / 32], or null: all is trained
  const Segment* segments;  // [T]
  const Chunk* chunks;      // [C]
  int length;               // of a piece, in elements
  int tasks;
  const double* scale;    // [K]
  const double* factors;  // [T], or null: all 1
  double beta;
  bool signs;
};

// What the resolution came to.
struct Resolved {
  const double* weights;  // [K], or [T, K]: each tensor's own
  std::int64_t stride;    // from one tensor's weights to the next one's: 0 or K
  bool finite;
  double clipping;
};

// What multiplies the new momentum m of each tensor, or its sign.
struct Factors {
  const double* per_tensor;  // [T, R, R]; read where there are norms
  std::int64_t* momentum_steps;   // [T], or null without momentum
  const double* parameter_norms;  // [T], or null without signs
  double* factors;                // [T], written
  double* squares;                // [T], written where there are norms: ‖m̂‖², 0 where unwritten
  int tasks;
  int tensors;
  int rows;  // R
  double beta, trust_ratio_coef, trust_ratio_clip;
  bool norms;
};

// What is done with the row of one task.
struct Share {
  bool weighted, kept;
  float weight;
};

HD Share share_of(const Combine& c, const Resolved& resolved, int task) {
  const double scale = c.scale[task];
  const float weight = static_cast<float>(resolved.weights[task] * scale * (1.0 - c.beta));
  // Where a gradient was not finite nothing is read: zeros are written, the rest is kept.
  return {resolved.finite && weight != 0.0f,
          resolved.finite && scale != 0.0 && c.history.data != nullptr, weight};
}

struct Output {
  void* data;  // of the tensor
  Type type;
  std::int64_t first;  // of the piece, in the tensor
  float factor;
};

// What is to be done with one task's row, and its vectors, on their way.
template <int U, int V>
struct Row {
  Share share;
  Raw<V> raw[U];
};

// The row of a task; of one that there is not, nothing is to be done.
template <int U, int V>
HD Row<U, V> load_row(const Combine& c, const Resolved& resolved, int task, std::int64_t start,
                      const Vectors<U, V>& vectors) {
  Row<U, V> row{};
  if (task >= c.tasks) return row;
  row.share = share_of(c, resolved, task);
  if (!row.share.weighted && !row.share.kept) return row;
  const bool narrow = c.accumulators.type != FLOAT32;
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (vectors.has(u))
      row.raw[u] = load_raw<V>(c.accumulators.data, narrow,
                               task * c.accumulators.stride + start + vectors.begin(u));
  return row;
}

// Adds weight · row; the row goes into the history on the way.
template <int U, int V>
HD void add_row(Values<V> (&total)[U], const Row<U, V>& row, const Combine& c, int task,
                std::int64_t start, const Vectors<U, V>& vectors) {
  if (!row.share.weighted && !row.share.kept) return;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const Values<V> values = converted(row.raw[u], c.accumulators.type);
    if (row.share.kept && vectors.has(u))
      store_as<V>(c.history.type, c.history.data,
                  task * c.history.stride + start + vectors.begin(u), values);
    if (row.share.weighted) {
#pragma unroll
      for (int e = 0; e < V; ++e)
        total[u].of[e] = fmaf(row.share.weight, values.of[e], total[u].of[e]);
    }
  }
}

// All rows, two of them at a time: both are loaded before one is used.
template <int U, int V>
HD void add_rows(Values<V> (&total)[U], const Combine& c, const Resolved& resolved,
                 std::int64_t start, const Vectors<U, V>& vectors) {
  for (int k = 0; k < c.tasks; k += 2) {
    const Row<U, V> first = load_row(c, resolved, k, start, vectors);
    const Row<U, V> second = load_row(c, resolved, k + 1, start, vectors);
    add_row(total, first, c, k, start, vectors);
    add_row(total, second, c, k + 1, start, vectors);
  }
}

// What is not trained becomes exactly zero.
template <int V>
HD void clear_untrained(Values<V>& values, std::uint32_t bits) {
#pragma unroll
  for (int e = 0; e < V; ++e) values.of[e] = is_trained(bits, e) ? values.of[e] : 0.0f;
}

// What is done with the vectors of a piece that begins at `start` in the rows.
template <int U, int V>
HD void combine_vectors(const Combine& c, const Resolved& resolved, const Output& output,
                        std::int64_t start, const Vectors<U, V>& vectors) {
  const bool moving = c.momentum.data != nullptr && resolved.finite && output.type != NO_TENSOR;
  float* momentum = static_cast<float*>(c.momentum.data) + start;
  Values<V> total[U]{}, old[U]{};
  std::uint32_t bits[U]{};
  if (moving) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) old[u] = load<V>(momentum + vectors.begin(u));
  }
  if (c.mask != nullptr) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) bits[u] = trained(c.mask, start + vectors.begin(u));
  }
  add_rows<U, V>(total, c, resolved, start, vectors);
  const float beta = static_cast<float>(c.beta);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!vectors.has(u)) continue;
    if (moving) {
#pragma unroll
      for (int e = 0; e < V; ++e) total[u].of[e] = fmaf(beta, old[u].of[e], total[u].of[e]);
    }
    if (c.mask != nullptr) clear_untrained<V>(total[u], bits[u]);
    if (moving) store<V>(momentum + vectors.begin(u), total[u]);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      float& value = total[u].of[e];
      if (c.signs) value = value > 0.0f ? 1.0f : value < 0.0f ? -1.0f : 0.0f;
      value *= output.factor;
    }
    store_as<V>(output.type, output.data, output.first + vectors.begin(u), total[u]);
  }
}

HD bool combine_is_wide(const Combine& c, Packed output, std::int64_t offset) {
  return is_vector_boundary(c.accumulators.data) && c.accumulators.stride % 8 == 0 &&
         offset % 8 == 0 && is_vector_boundary(c.history.data) &&
         is_vector_boundary(c.momentum.data) && is_vector_boundary(address_of(output));
}

// What one thread does of a piece.
HD void combine_chunk(const Combine& c, Resolved resolved, const Addresses& outputs, int chunk,
                      int thread) {
  constexpr int UNROLLED = 4;
  const Piece piece = piece_of(c.segments, c.chunks, chunk, c.length);
  const std::int64_t start = piece.offset + piece.first;
  const Packed packed = outputs.of[piece.tensor];
  resolved.weights += piece.tensor * resolved.stride;
  double factor = resolved.finite ? resolved.clipping : 0.0;
  if (resolved.finite && c.factors != nullptr) factor *= c.factors[piece.tensor];
  const Output output{address_of(packed), type_of(packed), piece.first,
                      static_cast<float>(factor)};

  const bool wide = combine_is_wide(c, packed, piece.offset);
  const int whole = wide ? piece.count / VECTOR * VECTOR : 0;
  for_vectors<UNROLLED>(thread, whole, piece.count, [&](const auto& vectors) {
    combine_vectors(c, resolved, output, start, vectors);
  });
}

// 1 / (1 - β^t). A tensor that never had a gradient has t = 0 and is not written: any factor does.
HD double bias_correction(std::int64_t steps, double beta) {
  double power = 1.0, square = beta;  // by squaring: the same bits on every processor
  for (std::int64_t left = steps > 1 ? steps : 1; left > 0; left /= 2) {
    if (left % 2 == 1) power *= square;
    square *= square;
  }
  return 1.0 / (1.0 - power);
}

// ‖m‖² of a tensor without a pass over memory: vᵀ G v with v = (1-β) w, and β for the old momentum.
HD double squared_norm(const Factors& f, const double* weights, int tensor) {
  const double* gramian = f.per_tensor + static_cast<std::int64_t>(tensor) * f.rows * f.rows;
  const auto v = [&](int row) { return row < f.tasks ? (1.0 - f.beta) * weights[row] : f.beta; };
  double square = 0.0;
  for (int i = 0; i < f.rows; ++i) {
    double sum = 0.0;
    for (int j = 0; j < f.rows; ++j) sum += gramian[i * f.rows + j] * v(j);
    square += sum * v(i);
  }
  return square > 0.0 ? square : 0.0;
}

// The factor of one tensor, with its weights [K] where there are norms. `written`: it has an
// output, and all is finite.
HD void find_factor(const Factors& f, const double* weights, int tensor, bool written) {
  double factor = 1.0;
  if (f.momentum_steps != nullptr)
    factor = bias_correction(f.momentum_steps[tensor] + (written ? 1 : 0), f.beta);
  if (f.norms) {
    const double square = squared_norm(f, weights, tensor) * factor * factor;
    f.squares[tensor] = written ? square : 0.0;
    if (f.parameter_norms != nullptr) {
      const double norm = sqrt(square), own = f.parameter_norms[tensor];
      const bool tiny = norm < TRUST_RATIO_EPS || own < TRUST_RATIO_EPS;
      const double ratio = tiny ? 1.0 : own / norm;
      factor = f.trust_ratio_coef * (tiny || ratio < f.trust_ratio_clip ? ratio : f.trust_ratio_clip);
    }
  }
  f.factors[tensor] = factor;
}

HD bool is_written(const Addresses& outputs, int tensor) {
  return type_of(outputs.of[tensor]) != NO_TENSOR;
}

HD void count_step(const Factors& f, int tensor, bool written) {
  if (written && f.momentum_steps != nullptr) ++f.momentum_steps[tensor];
}

// min(1, max_norm / ‖m̂‖) over all tensors together; every thread of the block has it.
HD double clipping_factor(const double* squares, int tensors, double max_norm) {
  const double square = block_sum<double>([&](int thread) {
    double sum = 0.0;
    for (int tensor = thread; tensor < tensors; tensor += THREADS) sum += squares[tensor];
    return sum;
  });
  const double norm = sqrt(square);
  return norm > max_norm ? max_norm / norm : 1.0;
}

// Where the launches of combine find what the resolution came to.
struct ResolvedAt {
  const double* weights;   // [K], or [T, K]
  std::int64_t stride;     // 0 or K
  const bool* finite;      // []
  const double* clipping;  // [], or null: 1
};

void combine(const Place& place, const Combine& arguments, const ResolvedAt& resolved,
             const Addresses& outputs, int chunks);

void factors(const Place& place, const Factors& arguments, const ResolvedAt& resolved,
             const Addresses& outputs);

void clipping(const Place& place, const double* squares, int tensors, double max_norm,
              double* factor);

}  // namespace gcond
