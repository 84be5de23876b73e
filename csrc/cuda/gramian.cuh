// gramian: inner products of task gradients, history and momentum. Each chunk of a tensor is summed
// in float32, the sums of the chunks are added up in float64, in a fixed order.
#pragma once

#include "../common/block.h"
#include "../common/products.h"
#include "launch.cuh"

namespace gcond {

// With more tasks one product of every pair does not stay in registers.
constexpr int MAX_TASKS_IN_REGISTERS = 8;

struct GramianArguments {
  Chunks chunks;
  TaskGradients gradients;
  const float* momentum_ptr;        // [N'], or null
  int rows;                         // R = K, or K + 1 with momentum as the last row
  const double* history_scale_ptr;  // [K]; read where there is a history
  float* partials_ptr;              // [Products<K>::COUNT, C]
  double* total_ptr;                // [K, K]
  double* cross_ptr;                // [K, K], or null without history
  double* per_tensor_ptr;           // [T, R, R]
  double* cross_per_tensor_ptr;     // [T, K, K], or null without history
};

// Products of K tasks, in this order: all pairs of the tasks and the momentum, row by row; then of
// each task with each task's history. Without momentum or history theirs are not stored.
template <int K>
struct Products {
  static constexpr int PAIRS = pairs_of(K + 1);
  static constexpr int COUNT = PAIRS + K * K;
  float of[COUNT];
};

// Adds the products of all pairs of rows: of the tasks and the momentum.
template <int K, int V>
HD void add_pairs(Products<K>& sums, const Values<V> (&rows)[K + 1]) {
  int product = 0;
#pragma unroll
  for (int i = 0; i <= K; ++i) {
#pragma unroll
    for (int j = i; j <= K; ++j, ++product) {
#pragma unroll
      for (int e = 0; e < V; ++e)
        sums.of[product] = fmaf(rows[i].of[e], rows[j].of[e], sums.of[product]);
    }
  }
}

// Adds the products of all tasks with the history of one.
template <int K, int V>
HD void add_cross(Products<K>& sums, const Values<V> (&rows)[K + 1], const Values<V>& history,
                  int task) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float& sum = sums.of[Products<K>::PAIRS + i * K + task];
#pragma unroll
    for (int e = 0; e < V; ++e) sum = fmaf(rows[i].of[e], history.of[e], sum);
  }
}

// What is known of the history when the kernel is compiled: a branch on it between the loads would
// wait for those before it.
enum HistoryKind : int { NO_HISTORY, TWO_BYTES, FOUR_BYTES };

// Sets what is not trainable to zero in the vectors of every row.
template <int K, HistoryKind HISTORY, int V>
HD void mask_rows(Raw<V> (&rows)[K + 1], Raw<V> (&history)[K], std::uint32_t bits, bool two_bytes) {
  const Raw<V> mask = bit_mask<V>(bits, two_bytes);
#pragma unroll
  for (int k = 0; k < K; ++k) apply_mask(rows[k], mask);
  apply_mask(rows[K], bit_mask<V>(bits, false));
  if constexpr (HISTORY != NO_HISTORY) {
    const Raw<V> history_mask = bit_mask<V>(bits, HISTORY == TWO_BYTES);
#pragma unroll
    for (int k = 0; k < K; ++k) apply_mask(history[k], history_mask);
  }
}

// Adds the products of the vectors of every row; the chunk begins at `start` in flat storage.
// Where it is known that there is no mask (not MASKABLE) that saves registers.
template <int K, bool MASKABLE, HistoryKind HISTORY, int U, int V>
HD void add_products(Products<K>& sums, const GramianArguments& a, std::int64_t start,
                     const Vectors<U, V>& vectors) {
  const TaskGradients& g = a.gradients;
  Raw<V> rows[U][K + 1]{}, history[U][K]{};
  const bool two_bytes = g.accumulators.dtype != FLOAT32;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!vectors.has(u)) continue;
    const std::int64_t offset = start + vectors.begin(u);
#pragma unroll
    for (int k = 0; k < K; ++k)
      rows[u][k] = load_raw<V>(g.accumulators.data_ptr, two_bytes, k * g.accumulators.stride + offset);
    if (a.momentum_ptr) rows[u][K] = load_raw<V>(a.momentum_ptr, false, offset);
    if constexpr (HISTORY != NO_HISTORY) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        history[u][k] =
            load_raw<V>(g.history.data_ptr, HISTORY == TWO_BYTES, k * g.history.stride + offset);
    }
  }
  if (MASKABLE && g.mask_ptr != nullptr) {  // loaded while the rows are in flight
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u))
        mask_rows<K, HISTORY, V>(rows[u], history[u],
                                 trainable_bits(g.mask_ptr, start + vectors.begin(u)), two_bytes);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Values<V> values[K + 1];
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = converted(rows[u][k], g.accumulators.dtype);
    values[K] = converted(rows[u][K], FLOAT32);
    add_pairs<K, V>(sums, values);
    if constexpr (HISTORY != NO_HISTORY) {
      const Dtype dtype = HISTORY == FOUR_BYTES ? FLOAT32 : g.history.dtype;
#pragma unroll
      for (int k = 0; k < K; ++k) add_cross<K, V>(sums, values, converted(history[u][k], dtype), k);
    }
  }
}

// Adds the products that one thread sums in a chunk.
template <int K, bool MASKABLE>
HD void sum_chunk(Products<K>& sums, const GramianArguments& a, int number, int thread) {
  constexpr int UNROLLED = K <= 2 ? 4 : K <= 4 ? 2 : 1;
  const Chunk chunk = chunk_at(a.chunks, number);
  const bool aligned = is_aligned(a.gradients.accumulators, chunk.segment) &&
                       is_aligned(a.gradients.history, chunk.segment) && is_aligned(a.momentum_ptr);
  const auto sum_with = [&](auto history) {
    for_vectors<UNROLLED>(thread, aligned, chunk.count, [&](const auto& vectors) {
      add_products<K, MASKABLE, decltype(history)::value>(sums, a, chunk.start(), vectors);
    });
  };
  if (a.gradients.history.data_ptr == nullptr)
    sum_with(std::integral_constant<HistoryKind, NO_HISTORY>{});
  else if (a.gradients.history.dtype == FLOAT32)
    sum_with(std::integral_constant<HistoryKind, FOUR_BYTES>{});
  else
    sum_with(std::integral_constant<HistoryKind, TWO_BYTES>{});
}

// Sums all products of a chunk over the threads of a block, and stores them.
template <int K, bool MASKABLE>
HD void sum_chunk_in_block(const GramianArguments& a, int number) {
  constexpr int COUNT = Products<K>::COUNT;
#ifdef __CUDA_ARCH__
  __shared__ float warps[WARPS][COUNT];
  const int thread = static_cast<int>(threadIdx.x);
  Products<K> sums{};
  sum_chunk<K, MASKABLE>(sums, a, number, thread);
#pragma unroll
  for (int product = 0; product < COUNT; ++product) {
    const float sum = warp_sum(sums.of[product]);
    if (thread % WARP == 0) warps[thread / WARP][product] = sum;
  }
  __syncthreads();
#else
  float warps[WARPS][COUNT], lanes[WARP];
  Products<K> sums[THREADS]{};
  for (int thread = 0; thread < THREADS; ++thread)
    sum_chunk<K, MASKABLE>(sums[thread], a, number, thread);
  for (int product = 0; product < COUNT; ++product) {
    for (int warp = 0; warp < WARPS; ++warp) {
      for (int lane = 0; lane < WARP; ++lane) lanes[lane] = sums[warp * WARP + lane].of[product];
      warps[warp][product] = warp_sum_on_host(lanes);
    }
  }
#endif
  // Ends with a barrier: the memory may be used again.
  parallel_for(COUNT, [&](int product) {
    a.partials_ptr[static_cast<std::int64_t>(product) * a.chunks.count + number] =
        sum_of_warps(&warps[0][product], COUNT);
  });
}

// How many products there are to sum over all tensors, and over each of them.
HD int product_count(const GramianArguments& a) {
  const int K = a.gradients.tasks;
  return pairs_of(K + 1) + (a.cross_ptr != nullptr ? K * K : 0);
}

// Stores a sum in a Gramian [rows, rows], or in a cross-Gramian [K, K].
HD void store_product(const GramianArguments& a, double* gramian_ptr, int rows, double* cross_ptr,
                      int product, double sum) {
  const int K = a.gradients.tasks, pairs = pairs_of(K + 1);
  const auto scale = [&](int row) { return row < K ? a.gradients.scale_ptr[row] : 1.0; };
  if (product >= pairs) {
    const int place = product - pairs;
    cross_ptr[place] = weighted(sum, scale(place / K) * a.history_scale_ptr[place % K]);
    return;
  }
  int i = 0, first = 0;  // the first product of row i
  for (; product >= first + K + 1 - i; ++i) first += K + 1 - i;
  const int j = product - first + i;
  if (j >= rows) return;  // of the momentum
  const double value = weighted(sum, scale(i) * scale(j));
  gramian_ptr[i * rows + j] = value;
  gramian_ptr[j * rows + i] = value;
}

// The sum of a product over chunks begin .. end, one in `stride`.
HD double sum_of_chunks(const GramianArguments& a, int product, int begin, int end, int stride) {
  const float* from = a.partials_ptr + static_cast<std::int64_t>(product) * a.chunks.count;
  double sum = 0.0;
#pragma unroll 4
  for (int chunk = begin; chunk < end; chunk += stride) sum += from[chunk];
  return sum;
}

// Sums a product over all tensors, by a block.
HD void sum_total(const GramianArguments& a, int product) {
  const double sum = block_sum<double>(
      [&](int thread) { return sum_of_chunks(a, product, thread, a.chunks.count, THREADS); });
  run_once([&] { store_product(a, a.total_ptr, a.gradients.tasks, a.cross_ptr, product, sum); });
}

// Sums a product over one tensor, by a warp.
HD void sum_tensor(const GramianArguments& a, int tensor, int product) {
  const std::int64_t K = a.gradients.tasks, R = a.rows;
  const auto store = [&](double sum) {
    store_product(a, a.per_tensor_ptr + tensor * R * R, a.rows,
                  a.cross_per_tensor_ptr + tensor * K * K, product, sum);
  };
  const auto of_lane = [&](int lane) {
    const std::int32_t* first_ptr = a.chunks.first_ptr + tensor;
    return sum_of_chunks(a, product, first_ptr[0] + lane, first_ptr[1], WARP);
  };
#ifdef __CUDA_ARCH__
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const double sum = warp_sum(of_lane(lane));
  if (lane == 0) store(sum);
#else
  double lanes[WARP];
  for (int lane = 0; lane < WARP; ++lane) lanes[lane] = of_lane(lane);
  store(warp_sum_on_host(lanes));
#endif
}

// Adds up the sums of the chunks, distributed over blocks: first those over all tensors, a block
// each, then those over one tensor, a warp each. On the host a block is one warp.
HD void sum_partials(const GramianArguments& a, int block, int blocks) {
  const int products = product_count(a);
  for (int product = block; product < products; product += blocks) sum_total(a, product);
#ifdef __CUDA_ARCH__
  const int warp = block * WARPS + static_cast<int>(threadIdx.x) / WARP, stride = blocks * WARPS;
#else
  const int warp = block, stride = blocks;
#endif
  const std::int64_t sums = static_cast<std::int64_t>(a.chunks.tensors) * products;
  for (std::int64_t sum = warp; sum < sums; sum += stride)
    sum_tensor(a, static_cast<int>(sum / products), static_cast<int>(sum % products));
}

// Calls `run` with K as a constant.
template <class F>
void with_tasks(int tasks, F run) {
  switch (tasks) {
    case 1: run(std::integral_constant<int, 1>{}); break;
    case 2: run(std::integral_constant<int, 2>{}); break;
    case 3: run(std::integral_constant<int, 3>{}); break;
    case 4: run(std::integral_constant<int, 4>{}); break;
    case 5: run(std::integral_constant<int, 5>{}); break;
    case 6: run(std::integral_constant<int, 6>{}); break;
    case 7: run(std::integral_constant<int, 7>{}); break;
    case 8: run(std::integral_constant<int, 8>{}); break;
    default: throw std::invalid_argument("the number of tasks must be 1 to 8");
  }
}

void gramian(const Stream& stream, const GramianArguments& arguments);

}  // namespace gcond
