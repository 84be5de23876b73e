#include "operations.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "../common/factors.h"
#include "kernels.h"
#include "threads.h"

namespace gcond {
namespace cpu {
namespace {

// Bytes that are worth a thread of their own.
constexpr std::int64_t BYTES_PER_THREAD = 1 << 18;

// Elements of a run of chunks.
constexpr std::int64_t RUN = 2 * CHUNK;

// What is more than this leaves the caches before it is read again: all that is written by combine;
// and an accumulator, for between its micro-batches lie backward passes.
constexpr std::int64_t CACHE_BYTES = 48 << 20, LARGE_ACCUMULATOR = 8 << 20;

#if defined(__x86_64__) && defined(__GNUC__)
const Kernels* const VARIANTS[] = {&AVX512, &AVX2, &PORTABLE};
#else
const Kernels* const VARIANTS[] = {&PORTABLE};
#endif

const Kernels*& kernels() {
  static const Kernels* chosen =
      *std::find_if(std::begin(VARIANTS), std::end(VARIANTS),
                    [](const Kernels* variant) { return variant->runs_here(); });
  return chosen;
}

int threads_for(std::int64_t bytes, int threads) {
  return static_cast<int>(std::min<std::int64_t>(threads, 1 + bytes / BYTES_PER_THREAD));
}

// Calls `task(number, chunk)` for all chunks, on several threads; the last run first if
// `backwards`.
template <class Task>
void for_chunks(const Plan& plan, int threads, bool backwards, const Task& task) {
  const Chunks chunks = plan.chunks();
  parallel(plan.runs(), threads, [&](int index) {
    const int run = backwards ? plan.runs() - 1 - index : index;
    for (std::int32_t number = plan.run_begin(run); number < plan.run_begin(run + 1); ++number)
      task(number, chunk_at(chunks, number));
  });
}

// Memory of a thread that stays from one call to the next, at a cache line.
float* scratch_of_thread(std::size_t floats) {
  constexpr std::size_t LINE = 64 / sizeof(float);
  thread_local std::vector<float> memory;
  if (memory.size() < floats + LINE) memory.resize(floats + LINE);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

// What the sums are multiplied by, in their order.
std::vector<double> product_scales(const GramianArguments& a, const ProductCounts& counts) {
  const int K = counts.tasks;
  const auto scale = [&](int row) { return row < K ? a.gradients.scale_ptr[row] : 1.0; };
  std::vector<double> scales;
  scales.reserve(counts.total());
  for (int i = 0; i < counts.rows; ++i)
    for (int j = i; j < counts.rows; ++j) scales.push_back(scale(i) * scale(j));
  if (counts.history)
    for (int i = 0; i < K; ++i)
      for (int j = 0; j < K; ++j) scales.push_back(scale(i) * a.history_scale_ptr[j]);
  return scales;
}

// Stores the sums of one tensor, or of all, as a Gramian [rows, rows] and a cross-Gramian [K, K].
void store_products(const ProductCounts& counts, const std::vector<double>& scales,
                    const double* sums, int rows, double* gramian_ptr, double* cross_ptr) {
  const double* scale = scales.data();
  for (int i = 0; i < counts.rows; ++i)
    for (int j = i; j < counts.rows; ++j, ++sums, ++scale)
      if (j < rows) gramian_ptr[i * rows + j] = gramian_ptr[j * rows + i] = weighted(*sums, *scale);
  if (!counts.history) return;
  for (int product = 0; product < counts.tasks * counts.tasks; ++product)
    cross_ptr[product] = weighted(sums[product], scale[product]);
}

// Finds what multiplies the output of each tensor, and counts its steps.
std::vector<double> output_factors(const CombineArguments& a, int tensors) {
  std::vector<double> factors(tensors, 1.0), squares(tensors);
  const bool finite = *a.finite_ptr;
  if (a.momentum.steps_ptr != nullptr || a.per_tensor_ptr != nullptr) {
    const FactorArguments f{a.gradients.tasks, tensors,        a.momentum,
                            a.per_tensor_ptr,  factors.data(), squares.data()};
    for (int t = 0; t < tensors; ++t) {
      const bool written = finite && dtype_of(a.outputs[t]) != NO_TENSOR;
      find_factor(f, a.weights_ptr + t * a.stride, t, written);
      count_step(f, t, written);
    }
  }
  double all = finite ? 1.0 : 0.0;
  if (finite && a.per_tensor_ptr != nullptr) all = clip_factor(squares.data(), tensors, a.max_norm);
  for (double& factor : factors) factor *= all;
  return factors;
}

}  // namespace

Plan::Plan(const std::vector<std::int64_t>& offsets, const std::vector<std::int64_t>& sizes) {
  first_.push_back(0);
  runs_.push_back(0);
  std::int64_t run = 0;
  for (std::size_t t = 0; t < sizes.size(); ++t) {
    segments_.push_back({offsets[t], sizes[t]});
    const auto chunks = static_cast<std::int32_t>((sizes[t] + CHUNK - 1) / CHUNK);
    for (std::int32_t index = 0; index < chunks; ++index) {
      entries_.push_back({static_cast<std::int32_t>(t), index});
      run += std::min<std::int64_t>(CHUNK, sizes[t] - std::int64_t{index} * CHUNK);
      if (run < RUN) continue;
      runs_.push_back(static_cast<std::int32_t>(entries_.size()));
      run = 0;
    }
    first_.push_back(static_cast<std::int32_t>(entries_.size()));
    elements_ += sizes[t];
  }
  if (run > 0) runs_.push_back(static_cast<std::int32_t>(entries_.size()));
}

Chunks Plan::chunks() const {
  return {segments_.data(),
          entries_.data(),
          first_.data(),
          static_cast<int>(segments_.size()),
          static_cast<int>(entries_.size()),
          CHUNK};
}

const char* kernels_in_use() { return kernels()->name; }

std::vector<const char*> kernels_here() {
  std::vector<const char*> names;
  for (const Kernels* variant : VARIANTS)
    if (variant->runs_here()) names.push_back(variant->name);
  return names;
}

void use_kernels(const char* name) {
  for (const Kernels* variant : VARIANTS)
    if (std::string(variant->name) == name && variant->runs_here()) {
      kernels() = variant;
      return;
    }
  throw std::invalid_argument("there are no kernels " + std::string(name) + " for this processor");
}

void accumulate(const Plan& plan, const Accumulation& a, int threads) {
  const Kernels& k = *kernels();
  const Dtype dtype = a.accumulator.dtype;
  const bool streaming = plan.elements() * size_of(dtype) > LARGE_ACCUMULATOR;
  threads = threads_for(plan.elements() * 12, threads);
  for_chunks(plan, threads, false, [&](int, const Chunk& chunk) {
    void* target_ptr = element_of(a.accumulator, 0, chunk.start());
    const TensorPtr gradient = a.gradients[chunk.tensor];
    const Dtype gradient_dtype = dtype_of(gradient);
    if (gradient_dtype != NO_TENSOR)
      k.accumulate({target_ptr, dtype,
                    element_of({address_of(gradient), gradient_dtype, 0}, 0, chunk.first),
                    gradient_dtype, chunk.count, a.scale, a.overwrite, streaming});
    else if (a.overwrite)
      std::memset(target_ptr, 0, static_cast<std::size_t>(chunk.count) * size_of(dtype));
  });
}

void gramian(const Plan& plan, const GramianArguments& a, int threads) {
  const Chunks chunks = plan.chunks();
  const Kernels& k = *kernels();
  const int K = a.gradients.tasks, R = K + (a.with_momentum ? 1 : 0);
  const ProductCounts counts{K, R, a.results.cross_ptr != nullptr};
  const std::size_t products = counts.total(), floats = k.scratch_size(counts);
  const std::unique_ptr<double[]> partials(new double[products * chunks.count]);
  threads = threads_for(plan.elements() * 4 * (counts.rows + K), threads);
  for_chunks(plan, threads, false, [&](int number, const Chunk& chunk) {
    k.multiply(
        {&a.gradients, a.with_momentum ? a.momentum_ptr : nullptr, chunk.start(), chunk.count},
        scratch_of_thread(floats), &partials[products * number]);
  });
  // The sums of each tensor, in the place of its first chunk's.
  const std::vector<double> zeros(products), scales = product_scales(a, counts);
  const auto sums_of = [&](int tensor) {
    const std::int32_t* first = chunks.first_ptr + tensor;
    return first[0] == first[1] ? zeros.data() : &partials[products * first[0]];
  };
  const std::int64_t summed = static_cast<std::int64_t>(products * chunks.count * sizeof(double));
  parallel(chunks.tensors, threads_for(summed, threads), [&](int tensor) {
    const std::int32_t* first = chunks.first_ptr + tensor;
    for (std::int32_t chunk = first[0] + 1; chunk < first[1]; ++chunk)
      for (std::size_t p = 0; p < products; ++p)
        partials[products * first[0] + p] += partials[products * chunk + p];
    const std::int64_t index = tensor;
    store_products(counts, scales, sums_of(tensor), R, a.results.per_tensor_ptr + index * R * R,
                   a.results.cross_per_tensor_ptr + index * K * K);
  });
  std::vector<double> total(products);
  for (int tensor = 0; tensor < chunks.tensors; ++tensor) {
    const double* sums = sums_of(tensor);
    for (std::size_t p = 0; p < products; ++p) total[p] += sums[p];
  }
  store_products(counts, scales, total.data(), K, a.results.total_ptr, a.results.cross_ptr);
}

void combine(const Plan& plan, const CombineArguments& a, int threads) {
  const Kernels& k = *kernels();
  const int tensors = static_cast<int>(a.outputs.size());
  const int K = a.gradients.tasks, vectors = a.stride == 0 ? 1 : tensors;
  const bool finite = *a.finite_ptr;
  const std::vector<double> factors = output_factors(a, tensors);
  std::vector<TaskUse> uses;
  for (int vector = 0; vector < vectors; ++vector)
    for (int task = 0; task < K; ++task)
      uses.push_back(
          use_of(a.gradients, a.momentum.beta, a.weights_ptr + vector * a.stride, finite, task));
  const Momentum momentum = finite ? a.momentum : Momentum{nullptr, nullptr, 0.0};
  const bool streaming = plan.elements() * (6 * K + 8) > CACHE_BYTES;
  threads = threads_for(plan.elements() * (6 * K + 8), threads);
  // Backwards: what gramian has read last is still in the caches.
  for_chunks(plan, threads, true, [&](int, const Chunk& chunk) {
    k.combine({&a.gradients, &uses[a.stride == 0 ? 0 : static_cast<std::size_t>(chunk.tensor) * K],
               momentum, a.outputs[chunk.tensor], chunk.first,
               static_cast<float>(factors[chunk.tensor]), chunk.start(), chunk.count, streaming});
  });
}

void arbitrate(const ArbitrateArguments& arguments, int batch) {
  std::vector<double> memory(scratch_size(arguments.tasks));
  for (int entry = 0; entry < batch; ++entry) arbitrate_entry(arguments, memory.data(), entry);
}

}  // namespace cpu
}  // namespace gcond
