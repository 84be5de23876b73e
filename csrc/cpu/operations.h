// The operations on a CPU: all chunks of all tensors, on several threads.
//
// Which thread takes which chunk is not fixed; the order of every sum is. So the bits do not depend
// on the number of threads.
#pragma once

#include <vector>

#include "../common/arbitrate.h"
#include "../common/types.h"

namespace gcond {
namespace cpu {

// How the segments of a layout are divided into chunks.
class Plan {
 public:
  Plan(const std::vector<std::int64_t>& offsets, const std::vector<std::int64_t>& sizes);

  Chunks chunks() const;
  std::int64_t elements() const { return elements_; }

  // Runs of neighbouring chunks, which a thread takes together: it reads on where it has stopped.
  int runs() const { return static_cast<int>(runs_.size()) - 1; }
  std::int32_t run_begin(int run) const { return runs_[run]; }

 private:
  std::vector<Segment> segments_;
  std::vector<ChunkEntry> entries_;
  std::vector<std::int32_t> first_, runs_;
  std::int64_t elements_ = 0;
};

// The name of the kernels in use: the fastest that run here, or those chosen.
const char* kernels_in_use();
// The names of all that run here, the fastest first.
std::vector<const char*> kernels_here();
// Chooses kernels by name; for tests.
void use_kernels(const char* name);

struct Accumulation {
  Matrix accumulator;
  std::vector<TensorPtr> gradients;  // [T]
  float scale;
  bool overwrite;
};

void accumulate(const Plan& plan, const Accumulation& accumulation, int threads);

struct GramianPtrs {
  double* total_ptr;             // [K, K]
  double* cross_ptr;             // [K, K], or null without history
  double* per_tensor_ptr;        // [T, R, R], R = K, or K + 1 with momentum
  double* cross_per_tensor_ptr;  // [T, K, K], or null without history
};

struct GramianArguments {
  TaskGradients gradients;
  const float* momentum_ptr;  // [N']; read where there is a momentum
  bool with_momentum;
  const double* history_scale_ptr;  // [K]; read where there is a history
  GramianPtrs results;
};

void gramian(const Plan& plan, const GramianArguments& arguments, int threads);

struct CombineArguments {
  TaskGradients gradients;
  std::vector<TensorPtr> outputs;  // [T]
  Momentum momentum;
  const double* weights_ptr;  // [K], or [T, K]
  std::int64_t stride;        // from one tensor's weights to the next one's: 0 or K
  const bool* finite_ptr;
  const double* per_tensor_ptr;  // [T, R, R]; null where no norm is needed
  double max_norm;
};

void combine(const Plan& plan, const CombineArguments& arguments, int threads);

// Resolves every entry of a batch.
void arbitrate(const ArbitrateArguments& arguments, int batch);

}  // namespace cpu
}  // namespace gcond
