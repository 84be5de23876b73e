// What all kernels share: types of elements, vectors of four, pieces of tensors.
//
// A function marked HD compiles for the GPU and for the host, where a driver runs the same pieces
// in the same order; tests on machines without a GPU execute it there. Products that are added
// are written fmaf, and nothing else is contracted: both sides round alike.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#define HD __host__ __device__ __forceinline__

namespace gcond {

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;

// Elements that a thread reads and writes at once: 16 bytes of float32, 8 of two-byte types. Then
// neighbouring threads touch neighbouring bytes, whatever types take part.
constexpr int VECTOR = 4;

// Tensors of one launch: their addresses travel with it, as 8 KB of arguments. No table is
// copied to the device beforehand, and a graph may capture tensors never seen before.
constexpr int MOST_TENSORS = 1000;

// Codes of the types, in step with gcond_kernels/tables.py.
enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3, NO_TENSOR = 7 };

// An address with the code of its type in the upper four bits, which no address uses.
using Packed = std::uint64_t;
constexpr int TYPE_SHIFT = 60;

HD Type type_of(Packed packed) { return static_cast<Type>(packed >> TYPE_SHIFT); }

HD void* address_of(Packed packed) {
  return reinterpret_cast<void*>(packed & ((Packed(1) << TYPE_SHIFT) - 1));
}

struct Addresses {
  Packed of[MOST_TENSORS];
};

// Where the segment of a tensor lies in every row of flat storage.
struct Segment {
  std::int64_t offset;
  std::int64_t size;
};

// A tensor, and which piece of it.
struct Chunk {
  std::int32_t tensor;
  std::int32_t piece;
};

// One piece: `count` elements of a tensor from `first` on.
struct Piece {
  int tensor;
  int count;
  std::int64_t offset;  // of the tensor's segment
  std::int64_t first;
};

HD Piece piece_of(const Segment* segments, const Chunk* chunks, int chunk, int length) {
  const Chunk found = chunks[chunk];
  const Segment segment = segments[found.tensor];
  const std::int64_t first = static_cast<std::int64_t>(found.piece) * length;
  const std::int64_t left = segment.size - first;
  return {found.tensor, left < length ? static_cast<int>(left) : length, segment.offset, first};
}

// A matrix of flat storage, [rows, stride]; null where there is none.
struct Rows {
  void* data;
  Type type;
  std::int64_t stride;  // in elements
};

HD float to_float(float value) { return value; }
HD float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
HD float to_float(__half value) { return __half2float(value); }
HD float to_float(double value) { return static_cast<float>(value); }

template <class T>
HD T from_float(float value);
template <>
HD float from_float<float>(float value) { return value; }
template <>
HD __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
HD __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
HD double from_float<double>(float value) { return value; }

// V elements that are read or written together.
template <class T, int V>
struct alignas(V * sizeof(T) > 16 ? 16 : V * sizeof(T)) Pack {
  T of[V];
};

// A GPU refuses a vector that does not begin where one may; the host, which would not, checks.
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

// Calls `run` with a null pointer of the type; nothing for NO_TENSOR.
template <class F>
HD void with_type(Type type, F run) {
  switch (type) {
    case FLOAT32: run(static_cast<float*>(nullptr)); break;
    case BFLOAT16: run(static_cast<__nv_bfloat16*>(nullptr)); break;
    case FLOAT16: run(static_cast<__half*>(nullptr)); break;
    case FLOAT64: run(static_cast<double*>(nullptr)); break;
    case NO_TENSOR: break;
  }
}

// Writes V values to elements `at` and on of a tensor.
template <int V>
HD void store_as(Type type, void* base, std::int64_t at, const Values<V>& values) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    store<V>(static_cast<T*>(base) + at, values);
  });
}

template <int V>
HD Values<V> load_as(Type type, const void* base, std::int64_t at) {
  Values<V> values{};
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    values = load<V>(static_cast<const T*>(base) + at);
  });
  return values;
}

// Elements of a row of flat storage as they lie in memory: 2 or 4 bytes each. Loads of many rows
// are on their way at once where none of them is converted before the last has been issued; a
// branch on the type between two of them would wait for the first.
template <int V>
struct Raw {
  static_assert(V == 1 || V == 4, "one element, or a vector");
  std::uint32_t of[V];
};

template <int V>
HD Raw<V> load_raw(const void* base, bool two_bytes, std::int64_t at) {
  Raw<V> raw{};
  if (two_bytes) {
    const auto* from = static_cast<const std::uint16_t*>(base) + at;
    if constexpr (V == 1) {
      raw.of[0] = *from;
    } else {
      check_alignment<Pack<std::uint32_t, 2>>(from);
      const auto pairs = *reinterpret_cast<const Pack<std::uint32_t, 2>*>(from);
      raw.of[0] = pairs.of[0];
      raw.of[1] = pairs.of[1];
    }
  } else {
    const auto* from = static_cast<const std::uint32_t*>(base) + at;
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
HD Values<V> converted(const Raw<V>& raw, Type type) {
  Values<V> values;
  const auto half = [&](int e) {  // the lower half of a pair comes first
    const std::uint32_t pair = raw.of[V == 1 ? 0 : e / 2];
    return e % 2 ? pair >> 16 : pair & 0xffff;
  };
  if (type == FLOAT32) {
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] = bits_to_float(raw.of[e]);
  } else if (type == BFLOAT16) {
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] = bits_to_float(half(e) << 16);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) values.of[e] = half_bits_to_float(half(e));
  }
  return values;
}

// A bit for every element of a row, of those from element `at` on in the lowest bits: 1 where it is
// trained. Elements that are accessed together have theirs in one word.
using Mask = const std::uint32_t*;
constexpr int MASK_BITS = 32;

HD std::uint32_t trained(Mask mask, std::int64_t at) {
  const auto element = static_cast<std::uint64_t>(at);
  return mask[element / MASK_BITS] >> (element % MASK_BITS);
}

HD bool is_trained(std::uint32_t bits, int element) { return (bits >> element & 1u) != 0; }

// All bits of those of V elements that are trained, as they lie in memory, and none of the others.
template <int V>
HD Raw<V> trained_bits(std::uint32_t bits, bool two_bytes) {
  Raw<V> kept{};
  const auto all = [&](int e) { return is_trained(bits, e) ? ~std::uint32_t{0} : 0; };
  if (V == 1 || !two_bytes) {
#pragma unroll
    for (int e = 0; e < V; ++e) kept.of[e] = all(e);
  } else {
#pragma unroll
    for (int e = 0; e < V; e += 2) kept.of[e / 2] = (all(e) & 0xffff) | all(e + 1) << 16;
  }
  return kept;
}

// Selected, not multiplied: what is not trained may be NaN. Without any bit it is 0 in every type.
template <int V>
HD void keep_bits(Raw<V>& raw, const Raw<V>& kept) {
#pragma unroll
  for (int e = 0; e < V; ++e) raw.of[e] &= kept.of[e];
}

// Where the vectors of a thread begin in a piece: U of V elements, THREADS vectors apart. Those
// from `end` on are not there; all that are there are loaded before the first is used.
template <int U, int V>
struct Vectors {
  static constexpr int STEP = THREADS * V;
  int at, end;

  HD int begin(int u) const { return at + u * STEP; }
  HD bool has(int u) const { return U == 1 || begin(u) < end; }
};

// Calls `run` for all vectors of a thread in a piece: whole ones of the first `whole` elements, and
// the elements after them one by one.
template <int U, class F>
HD void for_vectors(int thread, int whole, int count, F run) {
  for (int at = thread * VECTOR; at < whole; at += U * THREADS * VECTOR)
    run(Vectors<U, VECTOR>{at, whole});
  for (int at = whole + thread; at < count; at += U * THREADS) run(Vectors<U, 1>{at, count});
}

// Whether elements from here on may be accessed as vectors, of whatever type.
HD bool is_vector_boundary(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

}  // namespace gcond
