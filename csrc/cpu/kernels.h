// What the vector code does: one chunk of one tensor at a time, on one thread. There is one table
// of these functions for each kind of processor that it was compiled for.
#pragma once

#include "../common/products.h"
#include "../common/task_use.h"
#include "../common/types.h"

namespace gcond {
namespace cpu {

// Elements that are summed in float32, in sixteen lanes; their sums are added up in float64.
constexpr int CHUNK = 1 << 14;

// Elements of one task's gradient, for its accumulator.
struct AccumulateChunk {
  void* target_ptr;
  Dtype target_dtype;  // FLOAT32 or BFLOAT16
  const void* gradient_ptr;
  Dtype gradient_dtype;
  std::int64_t count;
  float scale;
  bool overwrite;
  bool streaming;  // whether all that is written exceeds the caches
};

// Elements from `start` on in flat storage, of all tasks.
struct ProductsChunk {
  const TaskGradients* gradients;
  const float* momentum_ptr;  // [N'], or null
  std::int64_t start;
  int count;
};

struct CombineChunk {
  const TaskGradients* gradients;
  const TaskUse* uses;  // [K]
  Momentum momentum;    // its buffer is null where it is not to change
  TensorPtr output;
  std::int64_t first;  // element of the chunk, in the output
  float factor;
  std::int64_t start;
  int count;
  bool streaming;  // as above
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*accumulate)(const AccumulateChunk& chunk);
  // Floats of memory that `multiply` works in, for so many tasks.
  std::size_t (*scratch_size)(const ProductCounts& counts);
  // Stores the products in the order of ProductCounts.
  void (*multiply)(const ProductsChunk& chunk, float* scratch, double* products);
  void (*combine)(const CombineChunk& chunk);
};

// The variants, the fastest first; the last one runs everywhere.
extern const Kernels AVX512, AVX2, PORTABLE;

}  // namespace cpu
}  // namespace gcond
