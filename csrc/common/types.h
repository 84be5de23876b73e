// What the code for the CPU and the kernels for GPUs share: types of elements, tensors, segments.
//
// A function marked HD compiles for the GPU and for the host.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace gcond {

// The codes of gcond_kernels/ops/launch_tables.py.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3, NO_TENSOR = 7 };

// The address of a tensor, with its dtype in the upper four bits, which no address uses.
using TensorPtr = std::uint64_t;
constexpr int DTYPE_SHIFT = 60;

HD Dtype dtype_of(TensorPtr tensor) { return static_cast<Dtype>(tensor >> DTYPE_SHIFT); }

HD void* address_of(TensorPtr tensor) {
  return reinterpret_cast<void*>(tensor & ((TensorPtr(1) << DTYPE_SHIFT) - 1));
}

HD int size_of(Dtype dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

// Float32 or two-byte flat storage, [rows, stride]; the pointer is null where there is none.
struct Matrix {
  void* data_ptr;
  Dtype dtype;
  std::int64_t stride;  // in elements
};

// The element `offset` of a row; null where there is no storage.
HD void* element_of(const Matrix& matrix, std::int64_t row, std::int64_t offset) {
  if (matrix.data_ptr == nullptr) return nullptr;
  return static_cast<char*>(matrix.data_ptr) + (row * matrix.stride + offset) * size_of(matrix.dtype);
}

// The accumulated gradients of K tasks; see gcond_kernels/ops/types.py.
struct TaskGradients {
  int tasks;                      // K
  Matrix accumulators;            // [K, N'], float32 or bfloat16
  Matrix history;                 // [K, N'], float32, bfloat16 or float16; or null
  const std::uint32_t* mask_ptr;  // [N' / 32], or null: all elements are trainable
  const double* scale_ptr;        // [K]
};

struct Momentum {
  float* buffer_ptr;        // [N'], or null
  std::int64_t* steps_ptr;  // [T], or null
  double beta;              // 0 without momentum
};

// Where the segment of a tensor lies in flat storage.
struct Segment {
  std::int64_t offset, size;
};

// Which chunk of which tensor a block processes.
struct ChunkEntry {
  std::int32_t tensor, index;
};

// How the segments are divided into chunks, a block each.
struct Chunks {
  const Segment* segments_ptr;      // [T]
  const ChunkEntry* entries_ptr;    // [C]
  const std::int32_t* first_ptr;    // [T + 1], the first chunk of each tensor
  int tensors, count, length;       // T, C, and the elements of a chunk
};

struct Chunk {
  int tensor;
  int count;             // of elements
  std::int64_t segment;  // the offset of the tensor's segment in flat storage
  std::int64_t first;    // the chunk's first element within the segment

  HD std::int64_t start() const { return segment + first; }
};

HD Chunk chunk_at(const Chunks& chunks, int number) {
  const ChunkEntry entry = chunks.entries_ptr[number];
  const Segment segment = chunks.segments_ptr[entry.tensor];
  const std::int64_t first = static_cast<std::int64_t>(entry.index) * chunks.length;
  const std::int64_t left = segment.size - first;
  const int count = left < chunks.length ? static_cast<int>(left) : chunks.length;
  return {entry.tensor, count, segment.offset, first};
}

// The bits of the trainable mask from element `offset` on, the first in the lowest bit. Elements
// that are accessed together have theirs in one word.
HD std::uint32_t trainable_bits(const std::uint32_t* mask_ptr, std::int64_t offset) {
  constexpr int MASK_BITS = 32;
  const auto element = static_cast<std::uint64_t>(offset);
  return mask_ptr[element / MASK_BITS] >> (element % MASK_BITS);
}

HD bool is_trainable(std::uint32_t bits, int element) { return (bits >> element & 1u) != 0; }

}  // namespace gcond
