// Inner products of plain lists of tensors: gramian for tensors that lie anywhere.
#include "lists.cuh"

namespace gcond {
namespace {

constexpr int UNROLLED = 4;

template <int L>
struct ListProducts {
  float of[L * (L + 1) / 2];
};

// The vectors of one tensor, from `first` on.
template <int U, int V>
HD void load_vectors(Values<V> (&values)[U], Packed tensor, std::int64_t first,
                     const Vectors<U, V>& vectors) {
  with_type(type_of(tensor), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* from = static_cast<const T*>(address_of(tensor)) + first;
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (vectors.has(u)) values[u] = load<V>(from + vectors.begin(u));
  });
}

template <int L, int U, int V>
HD void add_products(ListProducts<L>& sums, const Packed (&tensors)[L], std::int64_t first,
                     const Vectors<U, V>& vectors) {
  Values<V> values[L][U]{};
#pragma unroll
  for (int l = 0; l < L; ++l) load_vectors<U, V>(values[l], tensors[l], first, vectors);
  int product = 0;
#pragma unroll
  for (int i = 0; i < L; ++i) {
#pragma unroll
    for (int j = i; j < L; ++j, ++product) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int e = 0; e < V; ++e)
          sums.of[product] = fmaf(values[i][u].of[e], values[j][u].of[e], sums.of[product]);
      }
    }
  }
}

// What one thread sums of a piece.
template <int L>
HD void sum_piece(ListProducts<L>& sums, const Gramian& g, const Addresses& addresses, int chunk,
                  int thread) {
  const Piece piece = piece_of(g.segments, g.chunks, chunk, g.length);
  Packed tensors[L];
  bool wide = true;
#pragma unroll
  for (int l = 0; l < L; ++l) {
    tensors[l] = addresses.of[l * g.tensors + piece.tensor];
    wide = wide && is_vector_boundary(address_of(tensors[l]));
  }
  const int whole = wide ? piece.count / VECTOR * VECTOR : 0;
  for_vectors<UNROLLED>(thread, whole, piece.count, [&](const auto& vectors) {
    add_products<L>(sums, tensors, piece.first, vectors);
  });
}

template <int L>
HD void list_products_of_chunk(const Gramian& g, const Addresses& addresses, int chunk) {
  constexpr int COUNT = L * (L + 1) / 2;
#ifdef __CUDA_ARCH__
  ListProducts<L> sums{};
  sum_piece<L>(sums, g, addresses, chunk, static_cast<int>(threadIdx.x));
  store_products<COUNT>(g, chunk, [&](int) { return sums.of; });
#else
  ListProducts<L> sums[THREADS]{};
  for (int thread = 0; thread < THREADS; ++thread)
    sum_piece<L>(sums[thread], g, addresses, chunk, thread);
  store_products<COUNT>(g, chunk, [&](int thread) { return sums[thread].of; });
#endif
}

template <int L>
__global__ void __launch_bounds__(THREADS, 1)
    list_products_kernel(const __grid_constant__ Gramian g,
                         const __grid_constant__ Addresses addresses) {
  list_products_of_chunk<L>(g, addresses, static_cast<int>(blockIdx.x));
}

template <int L>
void list_products(const Place& place, const Gramian& g, const Addresses& addresses) {
  if (!place.is_host()) {
    launch("inner products", list_products_kernel<L>, place, g.chunk_count, 0, false, g, addresses);
    return;
  }
  for (int chunk = 0; chunk < g.chunk_count; ++chunk)
    list_products_of_chunk<L>(g, addresses, chunk);
}

}  // namespace

void lists(const Place& place, const Gramian& arguments, const Addresses& addresses,
           const Totals& totals) {
  if (totals.tasks == 1)
    list_products<1>(place, arguments, addresses);
  else if (totals.tasks == 2)
    list_products<2>(place, arguments, addresses);
  else
    throw std::invalid_argument("inner products are of one list or two");
  add_up(place, arguments, totals);
}

}  // namespace gcond
