// combine: writes the weighted sum of the accumulators as the gradient of every parameter, with
// momentum and history in the same pass.
#pragma once

#include "../common/factors.h"
#include "../common/task_use.h"
#include "launch.cuh"

namespace gcond {

constexpr int COMBINE_CHUNK = 4096;

struct CombineArguments {
  Chunks chunks;
  TaskGradients gradients;
  Momentum momentum;
  const double* factors_ptr;  // [T], or null: all 1
};

// What was resolved, as the kernels of combine get it.
struct ResolutionPtrs {
  const double* weights_ptr;      // [K], or [T, K]: each tensor's own
  std::int64_t stride;            // from one tensor's weights to the next one's: 0 or K
  const bool* finite_ptr;         // []
  const double* clip_factor_ptr;  // [], or null: 1
};

// The same once it is read.
struct Resolution {
  const double* weights_ptr;
  std::int64_t stride;
  bool finite;
  double clip_factor;
};

// Vectors of one task's accumulator, in flight, and what is done with them.
template <int U, int V>
struct TaskVectors {
  TaskUse use;
  Raw<V> raw[U];
};

// Loads the vectors of a task; of one beyond the last none.
template <int U, int V>
HD TaskVectors<U, V> load_task(const CombineArguments& c, const Resolution& resolution, int task,
                               std::int64_t start, const Vectors<U, V>& vectors) {
  TaskVectors<U, V> loaded{};
  if (task >= c.gradients.tasks) return loaded;
  loaded.use = use_of(c.gradients, c.momentum.beta, resolution.weights_ptr, resolution.finite, task);
  if (!loaded.use.weighted && !loaded.use.stored) return loaded;
  const Matrix& accumulators = c.gradients.accumulators;
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (vectors.has(u))
      loaded.raw[u] = load_raw<V>(accumulators.data_ptr, accumulators.dtype != FLOAT32,
                                  task * accumulators.stride + start + vectors.begin(u));
  return loaded;
}

// Adds weight · accumulator, and stores the accumulator as the new history.
template <int U, int V>
HD void add_task(Values<V> (&total)[U], const TaskVectors<U, V>& loaded, const CombineArguments& c,
                 int task, std::int64_t start, const Vectors<U, V>& vectors) {
  if (!loaded.use.weighted && !loaded.use.stored) return;
  const Matrix& history = c.gradients.history;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const Values<V> values = converted(loaded.raw[u], c.gradients.accumulators.dtype);
    if (loaded.use.stored && vectors.has(u))
      store_as<V>(history.dtype, history.data_ptr,
                  task * history.stride + start + vectors.begin(u), values);
    if (loaded.use.weighted) {
#pragma unroll
      for (int e = 0; e < V; ++e)
        total[u].of[e] = fmaf(loaded.use.weight, values.of[e], total[u].of[e]);
    }
  }
}

// Adds all tasks, two at a time: both are loaded before one is used.
template <int U, int V>
HD void add_tasks(Values<V> (&total)[U], const CombineArguments& c, const Resolution& resolution,
                  std::int64_t start, const Vectors<U, V>& vectors) {
  for (int k = 0; k < c.gradients.tasks; k += 2) {
    const TaskVectors<U, V> first = load_task(c, resolution, k, start, vectors);
    const TaskVectors<U, V> second = load_task(c, resolution, k + 1, start, vectors);
    add_task(total, first, c, k, start, vectors);
    add_task(total, second, c, k + 1, start, vectors);
  }
}

struct Output {
  TensorPtr tensor;
  std::int64_t first;  // element of the chunk, in the tensor
  float factor;
};

// Combines the vectors of a chunk that begins at `start` in flat storage.
template <int U, int V>
HD void combine_vectors(const CombineArguments& c, const Resolution& resolution,
                        const Output& output, std::int64_t start, const Vectors<U, V>& vectors) {
  const Dtype dtype = dtype_of(output.tensor);
  const std::uint32_t* mask_ptr = c.gradients.mask_ptr;
  float* momentum_ptr = c.momentum.buffer_ptr + start;
  const bool has_momentum =
      c.momentum.buffer_ptr != nullptr && resolution.finite && dtype != NO_TENSOR;
  Values<V> total[U]{}, old[U]{};
  std::uint32_t bits[U]{};
  if (has_momentum) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) old[u] = load<V>(momentum_ptr + vectors.begin(u));
  }
  if (mask_ptr != nullptr) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) bits[u] = trainable_bits(mask_ptr, start + vectors.begin(u));
  }
  add_tasks<U, V>(total, c, resolution, start, vectors);
  const float beta = static_cast<float>(c.momentum.beta);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!vectors.has(u)) continue;
    Values<V>& values = total[u];
    if (has_momentum) {
#pragma unroll
      for (int e = 0; e < V; ++e) values.of[e] = fmaf(beta, old[u].of[e], values.of[e]);
    }
    if (mask_ptr != nullptr) {
#pragma unroll
      for (int e = 0; e < V; ++e) values.of[e] = is_trainable(bits[u], e) ? values.of[e] : 0.0f;
    }
    if (has_momentum) store<V>(momentum_ptr + vectors.begin(u), values);
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] *= output.factor;
    store_as<V>(dtype, address_of(output.tensor), output.first + vectors.begin(u), values);
  }
}

// Combines what one thread does of a chunk.
HD void combine_chunk(const CombineArguments& c, Resolution resolution, const TensorList& outputs,
                      int number, int thread) {
  constexpr int UNROLLED = 4;
  const Chunk chunk = chunk_at(c.chunks, number);
  resolution.weights_ptr += chunk.tensor * resolution.stride;
  double factor = resolution.finite ? resolution.clip_factor : 0.0;
  if (resolution.finite && c.factors_ptr != nullptr) factor *= c.factors_ptr[chunk.tensor];
  const Output output{outputs.of[chunk.tensor], chunk.first, static_cast<float>(factor)};
  const bool aligned = is_aligned(c.gradients.accumulators, chunk.segment) &&
                       is_aligned(c.gradients.history, chunk.segment) &&
                       is_aligned(c.momentum.buffer_ptr) && is_aligned(address_of(output.tensor));
  for_vectors<UNROLLED>(thread, aligned, chunk.count, [&](const auto& vectors) {
    combine_vectors(c, resolution, output, chunk.start(), vectors);
  });
}

HD bool is_written(const TensorList& outputs, int tensor) {
  return dtype_of(outputs.of[tensor]) != NO_TENSOR;
}

void combine(const Stream& stream, const CombineArguments& arguments,
             const ResolutionPtrs& resolution, const TensorList& outputs);

void find_factors(const Stream& stream, const FactorArguments& arguments,
                  const ResolutionPtrs& resolution, const TensorList& outputs);

void find_clip_factor(const Stream& stream, const double* squares_ptr, int tensors, double max_norm,
                      double* factor_ptr);

}  // namespace gcond
