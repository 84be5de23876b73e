#include "gramian.cuh"

#include <algorithm>

namespace gcond {
namespace {

template <int K, bool MASKABLE>
__global__ void __launch_bounds__(THREADS, 1)
    products_kernel(const __grid_constant__ GramianArguments arguments) {
  sum_chunk_in_block<K, MASKABLE>(arguments, static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(THREADS)
    sum_kernel(const __grid_constant__ GramianArguments arguments) {
  sum_partials(arguments, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
}

template <int K, bool MASKABLE>
void sum_all_chunks(const Stream& stream, const GramianArguments& arguments) {
  const int chunks = arguments.chunks.count;
  if (stream.is_host())
    for (int chunk = 0; chunk < chunks; ++chunk) sum_chunk_in_block<K, MASKABLE>(arguments, chunk);
  else
    launch("gramian", products_kernel<K, MASKABLE>, stream, {chunks}, arguments);
}

// One block for every sum over all tensors, and enough that a warp has one tensor's sum to do.
int blocks_for_sums(const GramianArguments& arguments) {
  const std::int64_t products = product_count(arguments), sums = products * arguments.chunks.tensors;
  return static_cast<int>(products + std::min<std::int64_t>((sums + WARPS - 1) / WARPS, 4096));
}

}  // namespace

void gramian(const Stream& stream, const GramianArguments& arguments) {
  with_tasks(arguments.gradients.tasks, [&](auto tasks) {
    constexpr int K = decltype(tasks)::value;
    if (arguments.gradients.mask_ptr == nullptr)
      sum_all_chunks<K, false>(stream, arguments);
    else
      sum_all_chunks<K, true>(stream, arguments);
  });
  if (stream.is_host())
    sum_partials(arguments, 0, 1);
  else
    launch("gramian", sum_kernel, stream, {blocks_for_sums(arguments)}, arguments);
}

}  // namespace gcond
