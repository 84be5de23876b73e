// What all kernels share: conversions of elements, vectors of four, chunks of tensors.
//
// A function marked HD compiles for the GPU and for the host, where it processes the same chunks in
// the same order: tests on machines without a GPU execute it there. Products that are added are
// written fmaf, and nothing else is contracted: both sides round to the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "../common/block.h"
#include "../common/types.h"

namespace gcond {

// Elements that a thread reads and writes at once: 16 bytes of float32, 8 of two-byte types. Then
// neighbouring threads access neighbouring bytes, whatever the types.
constexpr int VECTOR = 4;

// Tensors of one launch. Their addresses are 8 KB of its arguments: no table is copied to the device
// before, and a CUDA graph may capture tensors that no launch has had before.
constexpr int MAX_TENSORS = 1000;

struct TensorList {
  TensorPtr of[MAX_TENSORS];
};

HD float to_float(float value) { return value; }
HD float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
HD float to_float(__half value) { return __half2float(value); }
HD float to_float(double value) { return static_cast<float>(value); }

template <class T>
HD T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(value);
  else
    return value;
}

// V elements that are read or written together.
template <class T, int V>
struct alignas(V * sizeof(T) > 16 ? 16 : V * sizeof(T)) Pack {
  T of[V];
};

// A GPU faults on a misaligned vector; the host, which would not, checks.
template <class P>
HD void check_alignment(const void* address) {
#ifndef __CUDA_ARCH__
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(P) != 0)
    throw std::logic_error("a vector at an address that is not a multiple of its size");
#endif
}

template <int V>
struct Values {
  float of[V];
};

template <int V, class T>
HD Values<V> load(const T* from) {
  check_alignment<Pack<T, V>>(from);
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
  Values<V> values;
#pragma unroll
  for (int e = 0; e < V; ++e) values.of[e] = to_float(pack.of[e]);
  return values;
}

template <int V, class T>
HD void store(T* to, const Values<V>& values) {
  check_alignment<Pack<T, V>>(to);
  Pack<T, V> pack;
#pragma unroll
  for (int e = 0; e < V; ++e) pack.of[e] = from_float<T>(values.of[e]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Calls `run` with the address as a pointer of the dtype; not for NO_TENSOR.
template <class F>
HD void with_dtype(Dtype dtype, void* address, F run) {
  switch (dtype) {
    case FLOAT32: run(static_cast<float*>(address)); break;
    case BFLOAT16: run(static_cast<__nv_bfloat16*>(address)); break;
    case FLOAT16: run(static_cast<__half*>(address)); break;
    case FLOAT64: run(static_cast<double*>(address)); break;
    case NO_TENSOR: break;
  }
}

// Writes V values from element `offset` of a tensor on.
template <int V>
HD void store_as(Dtype dtype, void* address, std::int64_t offset, const Values<V>& values) {
  with_dtype(dtype, address, [&](auto* to) { store<V>(to + offset, values); });
}

// Elements of flat storage as they lie in memory, 2 or 4 bytes each. Loads of many accumulators are
// in flight at once where none is converted before the last has been issued; a branch on the dtype
// between two of them would wait for the first.
template <int V>
struct Raw {
  static_assert(V == 1 || V == 4, "one element, or a vector");
  std::uint32_t of[V];
};

template <int V>
HD Raw<V> load_raw(const void* base, bool two_bytes, std::int64_t offset) {
  Raw<V> raw{};
  if (two_bytes) {
    const auto* from = static_cast<const std::uint16_t*>(base) + offset;
    if constexpr (V == 1) {
      raw.of[0] = *from;
    } else {
      check_alignment<Pack<std::uint32_t, 2>>(from);
      const auto pairs = *reinterpret_cast<const Pack<std::uint32_t, 2>*>(from);
      raw.of[0] = pairs.of[0];
      raw.of[1] = pairs.of[1];
    }
  } else {
    const auto* from = static_cast<const std::uint32_t*>(base) + offset;
    check_alignment<Pack<std::uint32_t, V>>(from);
    const auto pack = *reinterpret_cast<const Pack<std::uint32_t, V>*>(from);
#pragma unroll
    for (int e = 0; e < V; ++e) raw.of[e] = pack.of[e];
  }
  return raw;
}

HD float bits_to_float(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HD float half_bits_to_float(std::uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}

template <int V>
HD Values<V> converted(const Raw<V>& raw, Dtype dtype) {
  Values<V> values;
  const auto half = [&](int e) {  // the lower half of a pair comes first
    const std::uint32_t pair = raw.of[V == 1 ? 0 : e / 2];
    return e % 2 ? pair >> 16 : pair & 0xffff;
  };
  if (dtype == FLOAT32) {
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] = bits_to_float(raw.of[e]);
  } else if (dtype == BFLOAT16) {
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] = bits_to_float(half(e) << 16);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] = half_bits_to_float(half(e));
  }
  return values;
}

// V elements as they lie in memory: all bits of the trainable ones set, all others clear.
template <int V>
HD Raw<V> bit_mask(std::uint32_t trainable, bool two_bytes) {
  Raw<V> mask{};
  const auto all = [&](int e) { return is_trainable(trainable, e) ? ~std::uint32_t{0} : 0; };
  if (V == 1 || !two_bytes) {
#pragma unroll
    for (int e = 0; e < V; ++e) mask.of[e] = all(e);
  } else {
#pragma unroll
    for (int e = 0; e < V; e += 2) mask.of[e / 2] = (all(e) & 0xffff) | all(e + 1) << 16;
  }
  return mask;
}

// Selected, not multiplied: what is not trainable may be NaN. Without any bit it is 0 in every type.
template <int V>
HD void apply_mask(Raw<V>& raw, const Raw<V>& mask) {
#pragma unroll
  for (int e = 0; e < V; ++e) raw.of[e] &= mask.of[e];
}

// The vectors of a thread in a chunk: U of V elements, THREADS vectors apart; those from `end` on do
// not exist. All are loaded before the first is used.
template <int U, int V>
struct Vectors {
  int offset, end;

  HD int begin(int u) const { return offset + u * THREADS * V; }
  HD bool has(int u) const { return U == 1 || begin(u) < end; }
};

// Calls `run` for all vectors of a thread in a chunk of `count` elements: vectors of four where they
// are aligned, and what is left element by element.
template <int U, class F>
HD void for_vectors(int thread, bool aligned, int count, F run) {
  const int vectorized = aligned ? count / VECTOR * VECTOR : 0;
  for (int e = thread * VECTOR; e < vectorized; e += U * THREADS * VECTOR)
    run(Vectors<U, VECTOR>{e, vectorized});
  for (int e = vectorized + thread; e < count; e += U * THREADS) run(Vectors<U, 1>{e, count});
}

// Whether elements from here on may be accessed as vectors, of whatever type.
HD bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// The same for all rows of a matrix, from an offset on.
HD bool is_aligned(const Matrix& matrix, std::int64_t offset) {
  return matrix.data_ptr == nullptr ||
         (is_aligned(matrix.data_ptr) && matrix.stride % 8 == 0 && offset % 8 == 0);
}

}  // namespace gcond
