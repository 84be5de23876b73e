// gramian: inner products of the rows of flat storage. Each piece of a tensor is summed in float32,
// the sums of the pieces are added up in float64, in a fixed order.
#pragma once

#include "common.cuh"
#include "launch.cuh"
#include "team.cuh"

namespace gcond {

// Beyond this many tasks one product of every pair of rows does not stay in registers.
constexpr int MOST_TASKS_IN_REGISTERS = 8;

// Products of K tasks, in this order: all pairs of the tasks and the momentum, row by row; then
// of each task with each task's history. Where there is no momentum or history they are not
// stored.
template <int K>
struct Products {
  static constexpr int ROWS = K + 1;
  static constexpr int PAIRS = ROWS * (ROWS + 1) / 2;
  static constexpr int COUNT = PAIRS + K * K;
  float of[COUNT];
};

struct Gramian {
  Rows accumulators;  // [K, N'], float32 or bfloat16
  Rows history;       // [K, N'], float32, bfloat16 or float16; or null
  Rows momentum;      // [N'], float32; or null
  Mask mask;          // [N' / 32], or null: all is trained
  const Segment* segments;  // [T]
  const Chunk* chunks;      // [C]
  const std::int32_t* first;  // [T + 1], the first piece of each tensor
  int tensors;
  int chunk_count;
  int length;  // of a piece, in elements
  float* partials;  // [COUNT, C]
};

// What the sums become. All float64.
struct Totals {
  const double* scale;          // [K], or null: all 1
  const double* history_scale;  // [K]; read where there are cross products
  double* total;                // [K, K]
  double* cross;                // [K, K], or null
  double* per_tensor;           // [T, R, R]
  double* crosses;              // [T, K, K], goes with `cross`
  int tasks;
  int rows;    // R: K, or K + 1 with the momentum
  int stored;  // rows of the products: as R, or more than that
};

// Products of all pairs of rows.
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

// Products of all tasks with the history of one.
template <int K, int V>
HD void add_crosses(Products<K>& sums, const Values<V> (&rows)[K + 1], const Values<V>& past,
                    int task) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float& sum = sums.of[Products<K>::PAIRS + i * K + task];
#pragma unroll
    for (int e = 0; e < V; ++e) sum = fmaf(rows[i].of[e], past.of[e], sum);
  }
}

// What is known of the history when the kernel is compiled: a branch on it between the loads would
// wait for those before it.
enum Past : int { NO_HISTORY, TWO_BYTES, FOUR_BYTES };

// What is not trained counts as zero in the vectors of every row.
template <int K, Past PAST, int V>
HD void clear_untrained_rows(Raw<V> (&own)[K + 1], Raw<V> (&past)[K], std::uint32_t bits, bool narrow) {
  const Raw<V> rows = trained_bits<V>(bits, narrow);
#pragma unroll
  for (int k = 0; k < K; ++k) keep_bits(own[k], rows);
  keep_bits(own[K], trained_bits<V>(bits, false));
  if constexpr (PAST != NO_HISTORY) {
    const Raw<V> history = trained_bits<V>(bits, PAST == TWO_BYTES);
#pragma unroll
    for (int k = 0; k < K; ++k) keep_bits(past[k], history);
  }
}

// Adds the products of the vectors of every row; `start` is where the piece begins in the rows.
// Where it is known that there is no mask (not MASKABLE) that saves registers.
template <int K, bool MASKABLE, Past PAST, int U, int V>
HD void add_products(Products<K>& sums, const Gramian& g, std::int64_t start,
                     const Vectors<U, V>& vectors) {
  Raw<V> own[U][K + 1]{}, past[U][K]{};
  const bool narrow = g.accumulators.type != FLOAT32;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!vectors.has(u)) continue;
    const std::int64_t here = start + vectors.begin(u);
#pragma unroll
    for (int k = 0; k < K; ++k)
      own[u][k] = load_raw<V>(g.accumulators.data, narrow, k * g.accumulators.stride + here);
    if (g.momentum.data) own[u][K] = load_raw<V>(g.momentum.data, false, here);
    if constexpr (PAST != NO_HISTORY) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        past[u][k] = load_raw<V>(g.history.data, PAST == TWO_BYTES, k * g.history.stride + here);
    }
  }
  if (MASKABLE && g.mask != nullptr) {  // its words are loaded when the rows are on their way
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u))
        clear_untrained_rows<K, PAST, V>(own[u], past[u], trained(g.mask, start + vectors.begin(u)),
                                    narrow);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Values<V> rows[K + 1];
#pragma unroll
    for (int k = 0; k < K; ++k) rows[k] = converted(own[u][k], g.accumulators.type);
    rows[K] = converted(own[u][K], FLOAT32);
    add_pairs<K, V>(sums, rows);
    if constexpr (PAST != NO_HISTORY) {
      const Type type = PAST == FOUR_BYTES ? FLOAT32 : g.history.type;
#pragma unroll
      for (int k = 0; k < K; ++k) add_crosses<K, V>(sums, rows, converted(past[u][k], type), k);
    }
  }
}

// Whether all rows may be read in vectors in a segment that starts here.
HD bool rows_are_wide(const Rows& rows, std::int64_t offset) {
  return rows.data == nullptr ||
         (is_vector_boundary(rows.data) && rows.stride % 8 == 0 && offset % 8 == 0);
}

// What one thread sums of a piece.
template <int K, bool MASKABLE>
HD void sum_piece(Products<K>& sums, const Gramian& g, int chunk, int thread) {
  constexpr int UNROLLED = K <= 2 ? 4 : K <= 4 ? 2 : 1;
  const Piece piece = piece_of(g.segments, g.chunks, chunk, g.length);
  const std::int64_t start = piece.offset + piece.first;
  const bool wide = rows_are_wide(g.accumulators, piece.offset) &&
                    rows_are_wide(g.history, piece.offset) &&
                    rows_are_wide(g.momentum, piece.offset);

  const int whole = wide ? piece.count / VECTOR * VECTOR : 0;
  const auto sum_with = [&](auto past) {
    for_vectors<UNROLLED>(thread, whole, piece.count, [&](const auto& vectors) {
      add_products<K, MASKABLE, decltype(past)::value>(sums, g, start, vectors);
    });
  };
  if (g.history.data == nullptr)
    sum_with(std::integral_constant<Past, NO_HISTORY>{});
  else if (g.history.type == FLOAT32)
    sum_with(std::integral_constant<Past, FOUR_BYTES>{});
  else
    sum_with(std::integral_constant<Past, TWO_BYTES>{});
}

// Adds up the sums of all threads of a block, and stores them as those of one piece.
// `sums(thread)` points to the COUNT sums of a thread.
template <int COUNT, class F>
HD void store_products(const Gramian& g, int chunk, F sums) {
#ifdef __CUDA_ARCH__
  __shared__ float warps[WARPS][COUNT];
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int product = 0; product < COUNT; ++product) {
    const float sum = warp_sum(sums(thread)[product]);
    if (thread % WARP == 0) warps[thread / WARP][product] = sum;
  }
  __syncthreads();
#else
  float warps[WARPS][COUNT], lanes[WARP];
  for (int product = 0; product < COUNT; ++product) {
    for (int warp = 0; warp < WARPS; ++warp) {
      for (int lane = 0; lane < WARP; ++lane) lanes[lane] = sums(warp * WARP + lane)[product];
      warps[warp][product] = warp_sum_on_host(lanes);
    }
  }
#endif
  // Ends with a barrier: the memory may be used again.
  each(COUNT, [&](int product) {
    g.partials[static_cast<std::int64_t>(product) * g.chunk_count + chunk] =
        sum_of_warps(&warps[0][product], COUNT);
  });
}

// All products of one piece.
template <int K, bool MASKABLE>
HD void products_of_chunk(const Gramian& g, int chunk) {
#ifdef __CUDA_ARCH__
  Products<K> sums{};
  sum_piece<K, MASKABLE>(sums, g, chunk, static_cast<int>(threadIdx.x));
  store_products<Products<K>::COUNT>(g, chunk, [&](int) { return sums.of; });
#else
  Products<K> sums[THREADS]{};
  for (int thread = 0; thread < THREADS; ++thread)
    sum_piece<K, MASKABLE>(sums[thread], g, chunk, thread);
  store_products<Products<K>::COUNT>(g, chunk, [&](int thread) { return sums[thread].of; });
#endif
}

HD int pairs_of(int rows) { return rows * (rows + 1) / 2; }

// Row and column of a pair, counted row by row.
struct Pair {
  int i, j;
};

HD Pair pair_of(int pair, int rows) {
  int i = 0;
  while (pair >= rows - i) {
    pair -= rows - i;
    ++i;
  }
  return {i, i + pair};
}

// A task that takes no part (scale 0) may hold anything, NaN included: select, do not multiply.
HD double weighted(double sum, double weight) { return weight != 0.0 ? sum * weight : 0.0; }

HD double scale_of(const Totals& totals, int row) {
  return totals.scale == nullptr || row >= totals.tasks ? 1.0 : totals.scale[row];
}

// The product of a task with the history of a task.
HD void store_cross(const Totals& totals, double* crosses, int place, double sum) {
  const int i = place / totals.tasks, j = place % totals.tasks;
  crosses[place] = weighted(sum, totals.scale[i] * totals.history_scale[j]);
}

// Stores a sum over one tensor.
HD void store_of_tensor(const Totals& totals, int tensor, int product, double sum) {
  const int R = totals.rows, K = totals.tasks, pairs = pairs_of(totals.stored);
  if (product >= pairs) {
    store_cross(totals, totals.crosses + static_cast<std::int64_t>(tensor) * K * K,
                product - pairs, sum);
    return;
  }
  const Pair pair = pair_of(product, totals.stored);
  if (pair.j >= R) return;  // there is no momentum
  const double value = weighted(sum, scale_of(totals, pair.i) * scale_of(totals, pair.j));
  double* of_tensor = totals.per_tensor + static_cast<std::int64_t>(tensor) * R * R;
  of_tensor[pair.i * R + pair.j] = value;
  of_tensor[pair.j * R + pair.i] = value;
}

// Stores a sum over all tensors.
HD void store_total(const Totals& totals, int product, double sum) {
  const int K = totals.tasks, pairs = pairs_of(totals.stored);
  if (product >= pairs) {
    store_cross(totals, totals.cross, product - pairs, sum);
    return;
  }
  const Pair pair = pair_of(product, totals.stored);
  if (pair.j >= K) return;
  const double value = weighted(sum, scale_of(totals, pair.i) * scale_of(totals, pair.j));
  totals.total[pair.i * K + pair.j] = value;
  totals.total[pair.j * K + pair.i] = value;
}

// The partial sums of a product over pieces begin .. end, one in `step`.
HD double sum_of_pieces(const Gramian& g, int product, int begin, int end, int step) {
  const float* from = g.partials + static_cast<std::int64_t>(product) * g.chunk_count;
  double sum = 0.0;
#pragma unroll 4
  for (int chunk = begin; chunk < end; chunk += step) sum += from[chunk];
  return sum;
}

// A product over all tensors, by a block.
HD void total_of_product(const Gramian& g, const Totals& totals, int product) {
  const double sum = block_sum<double>(
      [&](int thread) { return sum_of_pieces(g, product, thread, g.chunk_count, THREADS); });
  once([&] { store_total(totals, product, sum); });
}

// How many products of a tensor there are to sum, and of all tensors.
HD int totals_of(const Totals& totals) {
  return pairs_of(totals.stored) + (totals.cross ? totals.tasks * totals.tasks : 0);
}

HD std::int64_t sums_of_tensors(const Gramian& g, const Totals& totals) {
  return static_cast<std::int64_t>(g.tensors) * totals_of(totals);
}

// A product over one tensor, by a warp.
HD void product_of_tensor(const Gramian& g, const Totals& totals, std::int64_t sum) {
  const int products = totals_of(totals);
  const int tensor = static_cast<int>(sum / products), product = static_cast<int>(sum % products);
  const auto of_lane = [&](int lane) {
    return sum_of_pieces(g, product, g.first[tensor] + lane, g.first[tensor + 1], WARP);
  };
#ifdef __CUDA_ARCH__
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const double total = warp_sum(of_lane(lane));
  if (lane == 0) store_of_tensor(totals, tensor, product, total);
#else
  double lanes[WARP];
  for (int lane = 0; lane < WARP; ++lane) lanes[lane] = of_lane(lane);
  store_of_tensor(totals, tensor, product, warp_sum_on_host(lanes));
#endif
}

// All sums over pieces, shared out to a number of blocks: first those over all tensors, by a
// block each, then those over one, by a warp each. On the host a block is one warp.
HD void add_up(const Gramian& g, const Totals& totals, int block, int blocks) {
  for (int product = block; product < totals_of(totals); product += blocks)
    total_of_product(g, totals, product);
#ifdef __CUDA_ARCH__
  const int warp = block * WARPS + static_cast<int>(threadIdx.x) / WARP, step = blocks * WARPS;
#else
  const int warp = block, step = blocks;
#endif
  for (std::int64_t sum = warp; sum < sums_of_tensors(g, totals); sum += step)
    product_of_tensor(g, totals, sum);
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

// The launch of `add_up` alone.
void add_up(const Place& place, const Gramian& arguments, const Totals& totals);

void gramian(const Place& place, const Gramian& arguments, const Totals& totals);

}  // namespace gcond
