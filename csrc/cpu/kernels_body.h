// The vector code itself; part of every variant, after lanes.h.

// Elements that are read before others: of many rows more, for the sums of a tile are loaded and
// stored with every block. What was read fits in the first cache, all rows in the second.
constexpr int SHORT_BLOCK = 256, BLOCK = 512, FEW_ROWS = 4;
// Arguments of prefetching: the first cache is full of what is read now.
constexpr int READ = 0, WRITE = 1, SECOND_CACHE = 2;
// Between rows of scratch memory: those that lie a multiple of 4 KB apart would share cache lines.
constexpr int GAP = 80;
constexpr int POINTER_FLOATS = 2;  // the room of a pointer among floats

// Reads and writes all lanes, or the first `count`.
struct All {
  template <class T>
  Lanes read(const T* from) const {
    return load(from);
  }
  template <class T>
  void write(T* to, const Lanes& lanes) const {
    store(to, lanes);
  }
  template <class T>
  void write_past_caches(T* to, const Lanes& lanes) const {
    stream(to, lanes);
  }
};

struct First {
  int count;

  template <class T>
  Lanes read(const T* from) const {
    return load_part(from, count);
  }
  template <class T>
  void write(T* to, const Lanes& lanes) const {
    store_part(to, lanes, count);
  }
  template <class T>
  void write_past_caches(T* to, const Lanes& lanes) const {
    write(to, lanes);
  }
};

// Writes past the caches what does not stay in them; memory that is aligned for it.
template <bool STREAMING, class Access, class T>
inline void write(const Access& access, T* to, const Lanes& lanes) {
  if constexpr (STREAMING)
    access.write_past_caches(to, lanes);
  else
    access.write(to, lanes);
}

// Calls `run(access, element)` for sixteen elements at a time, and for the rest.
template <class Run>
inline void for_lanes(std::int64_t count, Run run) {
  const std::int64_t full = count / LANES * LANES;
  for (std::int64_t e = 0; e < full; e += LANES) run(All{}, e);
  if (full < count) run(First{static_cast<int>(count - full)}, full);
}

inline bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 64 == 0;
}

// Calls `run` with the address as a pointer of the dtype; not for NO_TENSOR.
template <class Run>
inline void with_type(Dtype dtype, void* address, Run run) {
  switch (dtype) {
    case FLOAT32:
      run(static_cast<float*>(address));
      break;
    case BFLOAT16:
      run(static_cast<BFloat16*>(address));
      break;
    case FLOAT16:
      run(static_cast<Float16*>(address));
      break;
    case FLOAT64:
      run(static_cast<double*>(address));
      break;
    case NO_TENSOR:
      break;
  }
}

// The bits of the mask for up to sixteen elements, which may lie in two words.
inline std::uint32_t bits_at(const std::uint32_t* mask_ptr, std::int64_t offset, int count) {
  std::uint32_t bits = trainable_bits(mask_ptr, offset);
  const int left = 32 - static_cast<int>(offset % 32);
  if (left < count) bits |= mask_ptr[offset / 32 + 1] << left;
  return bits;
}

// accumulate

template <bool STREAMING, class A, class G>
inline void set(const AccumulateChunk& c, A* target_ptr, const G* gradient_ptr) {
  const Lanes scale = splat(c.scale);
  for_lanes(c.count, [&](auto access, std::int64_t e) {
    write<STREAMING>(access, target_ptr + e, multiply(access.read(gradient_ptr + e), scale));
  });
  if (STREAMING) {
    STREAM_END();
  }
}

template <class A, class G>
inline void accumulate_as(const AccumulateChunk& c, A* target_ptr, const G* gradient_ptr) {
  if (c.overwrite && c.streaming && is_aligned(target_ptr))
    return set<true>(c, target_ptr, gradient_ptr);
  if (c.overwrite) return set<false>(c, target_ptr, gradient_ptr);
  const Lanes scale = splat(c.scale);
  for_lanes(c.count, [&](auto access, std::int64_t e) {
    const Lanes sum = access.read(target_ptr + e);
    access.write(target_ptr + e, multiply_add(access.read(gradient_ptr + e), scale, sum));
  });
}

void accumulate(const AccumulateChunk& c) {
  with_type(c.gradient_dtype, const_cast<void*>(c.gradient_ptr), [&](const auto* gradient_ptr) {
    if (c.target_dtype == FLOAT32)
      accumulate_as(c, static_cast<float*>(c.target_ptr), gradient_ptr);
    else
      accumulate_as(c, static_cast<BFloat16*>(c.target_ptr), gradient_ptr);
  });
}

// gramian

// What a tile does beside its rows.
struct Work {
  int count;              // of elements, a multiple of LANES
  bool first;             // whether the sums start here
  const float* ahead[2];  // rows of the next block, to be fetched meanwhile
};

// Adds the products of rows a with rows b to their sums, sixteen for each; of the same rows only
// those of i ≤ j.
template <int A, int B, bool SAME>
void add_tile(const float* const* a, const float* const* b, const Work& work, float* const* sums) {
  Lanes total[A][B];
#pragma GCC unroll 4
  for (int i = 0; i < A; ++i)
#pragma GCC unroll 4
    for (int j = SAME ? i : 0; j < B; ++j) total[i][j] = splat(0.0f);
  const float* const ahead_0 = work.ahead[0];
  const float* const ahead_1 = work.ahead[1];
  for (int e = 0; e < work.count; e += LANES) {
    Lanes x[A], y[B];
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i) x[i] = load(a[i] + e);
    __builtin_prefetch(ahead_0 + e, READ, SECOND_CACHE);
    __builtin_prefetch(ahead_1 + e, READ, SECOND_CACHE);
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) y[j] = SAME ? x[j] : load(b[j] + e);
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i)
#pragma GCC unroll 4
      for (int j = SAME ? i : 0; j < B; ++j) total[i][j] = multiply_add(x[i], y[j], total[i][j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < A; ++i)
#pragma GCC unroll 4
    for (int j = SAME ? i : 0; j < B; ++j) {
      float* sum = sums[i] + j * LANES;
      store(sum, work.first ? total[i][j] : add(total[i][j], load(sum)));
    }
}

using AddTile = void (*)(const float* const*, const float* const*, const Work&, float* const*);

template <int A, int B>
inline AddTile tile_of(bool same) {
  if constexpr (A == B)
    if (same) return add_tile<A, B, true>;
  return add_tile<A, B, false>;
}

template <int A>
inline AddTile tile_with(int b, bool same) {
  if (b == 1) return tile_of<A, 1>(same);
  if (b == 2 || TILE == 2) return tile_of<A, 2>(same);
  if (b == 3) return tile_of<A, TILE == 2 ? 2 : 3>(same);
  return tile_of<A, TILE>(same);
}

inline AddTile tile_for(int a, int b, bool same) {
  if (a == 1) return tile_with<1>(b, same);
  if (a == 2 || TILE == 2) return tile_with<2>(b, same);
  if (a == 3) return tile_with<TILE == 2 ? 2 : 3>(b, same);
  return tile_with<TILE>(b, same);
}

// The memory of one call of `multiply`: sixteen sums of each product, the rows that are not read
// where they are, and pointers to all rows.
struct Scratch {
  ProductCounts counts;
  int block;      // elements
  float* sums;    // [products, LANES]
  float* staged;  // [rows, BLOCK + GAP]
  const float** rows;

  int row_count() const { return counts.rows + (counts.history ? counts.tasks : 0); }
  int products() const { return counts.total(); }
  float* staged_row(int row) const { return staged + row * (BLOCK + GAP); }

  // The sums of row i from column j on; j may be below i by less than a tile.
  float* sums_at(int i, int j) const {
    return sums + (i * counts.rows - i * (i - 1) / 2 + (j - i)) * LANES;
  }
  float* cross_at(int i, int j) const {
    return sums + (counts.pairs() + i * counts.tasks + j) * LANES;
  }
};

std::size_t scratch_size(const ProductCounts& counts) {
  const int rows = counts.rows + (counts.history ? counts.tasks : 0);
  return static_cast<std::size_t>(counts.total()) * LANES +
         static_cast<std::size_t>(rows) * (BLOCK + GAP + POINTER_FLOATS);
}

inline Scratch scratch_in(float* memory, const ProductCounts& counts) {
  Scratch s{counts, BLOCK, memory, nullptr, nullptr};
  if (s.row_count() <= FEW_ROWS) s.block = SHORT_BLOCK;
  s.staged = memory + s.products() * LANES;
  s.rows = reinterpret_cast<const float**>(s.staged_row(s.row_count()));
  return s;
}

// From the start of a block to that of the next one: segments begin at multiples of 32 elements.
inline int next_after(int count) { return (count + 31) / 32 * 32; }

// Points to `count` elements of a row: where they are, or copied as float32, masked and filled up
// with zeros to sixteen.
inline const float* row_at(const Scratch& s, int row, Dtype dtype, void* address,
                           const std::uint32_t* mask_ptr, std::int64_t offset, int count) {
  if (dtype == FLOAT32 && mask_ptr == nullptr && count % LANES == 0)
    return static_cast<const float*>(address);
  float* to = s.staged_row(row);
  with_type(dtype, address, [&](const auto* from) {
    for_lanes(count, [&](auto access, std::int64_t e) {
      Lanes lanes = access.read(from + e);
      __builtin_prefetch(from + e + next_after(count), READ, SECOND_CACHE);
      if (mask_ptr != nullptr) {
        const int left = count - static_cast<int>(e);
        lanes = selected(lanes, bits_at(mask_ptr, offset + e, left < LANES ? left : LANES));
      }
      store(to + e, lanes);
    });
  });
  return to;
}

// Adds the products of all rows over a block of elements.
inline void add_block(const ProductsChunk& c, const Scratch& s, std::int64_t offset, int count,
                      bool first) {
  const TaskGradients& g = *c.gradients;
  const int K = s.counts.tasks, R = s.counts.rows;
  const auto row = [&](int number, Dtype dtype, void* address) {
    s.rows[number] = row_at(s, number, dtype, address, g.mask_ptr, offset, count);
  };
  for (int k = 0; k < K; ++k) row(k, g.accumulators.dtype, element_of(g.accumulators, k, offset));
  if (R > K) row(K, FLOAT32, const_cast<float*>(c.momentum_ptr) + offset);
  if (s.counts.history)
    for (int k = 0; k < K; ++k) row(R + k, g.history.dtype, element_of(g.history, k, offset));
  const int padded = (count + LANES - 1) / LANES * LANES;
  // Each tile fetches its part of the next block's accumulators.
  const int across = (R + TILE - 1) / TILE,
            tiles = across * (across + 1) / 2 +
                    (s.counts.history ? ((K + TILE - 1) / TILE) * ((K + TILE - 1) / TILE) : 0);
  const bool fetches = g.accumulators.dtype == FLOAT32;
  int done = 0;
  const auto tile = [&](int i, int rows, int j, int until, const float* const* others, bool cross) {
    Work work{padded, first, {s.rows[i], s.rows[i]}};
    if (fetches)
      for (int n = 0, row = done * K / tiles; n < 2 && row < (done + 1) * K / tiles; ++n, ++row)
        work.ahead[n] =
            static_cast<const float*>(element_of(g.accumulators, row, offset + next_after(count)));
    ++done;
    const int a = rows - i < TILE ? rows - i : TILE, b = until - j < TILE ? until - j : TILE;
    float* sums[TILE];
    for (int k = 0; k < a; ++k) sums[k] = cross ? s.cross_at(i + k, j) : s.sums_at(i + k, j);
    tile_for(a, b, !cross && i == j)(s.rows + i, others + j, work, sums);
  };
  for (int i = 0; i < R; i += TILE)
    for (int j = i; j < R; j += TILE) tile(i, R, j, R, s.rows, false);
  if (s.counts.history)
    for (int i = 0; i < K; i += TILE)
      for (int j = 0; j < K; j += TILE) tile(i, K, j, K, s.rows + R, true);
}

void multiply(const ProductsChunk& c, float* scratch, double* products) {
  const int K = c.gradients->tasks;
  const Scratch s = scratch_in(
      scratch, {K, K + (c.momentum_ptr != nullptr), c.gradients->history.data_ptr != nullptr});
  for (int e = 0; e < c.count; e += s.block)
    add_block(c, s, c.start + e, c.count - e < s.block ? c.count - e : s.block, e == 0);
  for (int product = 0; product < s.products(); ++product)
    products[product] = sum_of(s.sums + product * LANES);
}

// combine

// Elements from a task's block to the one that is read after it: the next task's, or the first
// one's next.
struct Ahead {
  std::int64_t accumulator, history;
};

inline std::int64_t ahead_in(const Matrix& matrix, int task, int tasks, int count) {
  return task + 1 < tasks ? matrix.stride : next_after(count) - task * matrix.stride;
}

// Adds one task's accumulator, weighted, to the total, and stores it as the new history. What lies
// `ahead` of them is fetched meanwhile.
template <bool STREAMING, class A, class N>
inline void add_task(float* total, const TaskUse& use, const A* accumulator_ptr, N* history_ptr,
                     const Ahead& ahead, int count) {
  const Lanes weight = splat(use.weight);
  for_lanes(count, [&](auto access, std::int64_t e) {
    const Lanes values = access.read(accumulator_ptr + e);
    __builtin_prefetch(accumulator_ptr + e + ahead.accumulator);
    if (use.stored) {
      if (!STREAMING) __builtin_prefetch(history_ptr + e + ahead.history, WRITE);
      write<STREAMING>(access, history_ptr + e, values);
    }
    if (use.weighted) store(total + e, multiply_add(values, weight, load(total + e)));
  });
}

// Writes momentum and output of a block.
template <bool STREAMING, class O>
inline void write_block(const CombineChunk& c, const float* total, O* output_ptr, int block,
                        int count) {
  const std::uint32_t* mask_ptr = c.gradients->mask_ptr;
  float* momentum_ptr = c.momentum.buffer_ptr;
  const Lanes beta = splat(static_cast<float>(c.momentum.beta)), factor = splat(c.factor);
  for_lanes(count, [&](auto access, std::int64_t e) {
    Lanes values = load(total + e);
    float* kept_ptr = momentum_ptr == nullptr ? nullptr : momentum_ptr + c.start + block + e;
    if (kept_ptr != nullptr) values = multiply_add(access.read(kept_ptr), beta, values);
    if (mask_ptr != nullptr) {
      const int left = count - static_cast<int>(e);
      values =
          selected(values, bits_at(mask_ptr, c.start + block + e, left < LANES ? left : LANES));
    }
    if (kept_ptr != nullptr) access.write(kept_ptr, values);
    write<STREAMING>(access, output_ptr + e, multiply(values, factor));
  });
}

template <bool STREAMING>
inline void combine_blocks(const CombineChunk& c) {
  const TaskGradients& g = *c.gradients;
  alignas(64) float total[SHORT_BLOCK];
  for (int block = 0; block < c.count; block += SHORT_BLOCK) {
    const int count = c.count - block < SHORT_BLOCK ? c.count - block : SHORT_BLOCK;
    for (int e = 0; e < count; e += LANES) store(total + e, splat(0.0f));
    for (int k = 0; k < g.tasks; ++k) {
      const TaskUse& use = c.uses[k];
      if (!use.weighted && !use.stored) continue;
      const Ahead ahead{ahead_in(g.accumulators, k, g.tasks, count),
                        ahead_in(g.history, k, g.tasks, count)};
      const auto add = [&](const auto* accumulator_ptr) {
        with_type(
            g.history.dtype, element_of(g.history, k, c.start + block), [&](auto* history_ptr) {
              add_task<STREAMING>(total, use, accumulator_ptr, history_ptr, ahead, count);
            });
      };
      void* accumulator_ptr = element_of(g.accumulators, k, c.start + block);
      if (g.accumulators.dtype == FLOAT32)
        add(static_cast<const float*>(accumulator_ptr));
      else
        add(static_cast<const BFloat16*>(accumulator_ptr));
    }
    with_type(dtype_of(c.output), address_of(c.output), [&](auto* output_ptr) {
      auto* to = output_ptr + c.first + block;
      // In the place of an accumulator it is in the caches.
      const bool elsewhere =
          static_cast<void*>(to) != element_of(g.accumulators, 0, c.start + block);
      if (STREAMING && elsewhere && is_aligned(to))
        write_block<true>(c, total, to, block, count);
      else
        write_block<false>(c, total, to, block, count);
    });
  }
}

void combine(const CombineChunk& c) {
  const Matrix& history = c.gradients->history;
  if (c.streaming && is_aligned(element_of(history, 0, c.start)) && history.stride % 32 == 0) {
    combine_blocks<true>(c);
    STREAM_END();
  } else {
    combine_blocks<false>(c);
  }
}

// The functions above; the name is that of the variant.
constexpr Kernels table(const char* name, bool (*runs_here)()) {
  return {name, runs_here, accumulate, scratch_size, multiply, combine};
}
