// What multiplies the outputs of combine: bias correction and clipping, on T numbers.
#pragma once

#include <cmath>

#include "block.h"

namespace gcond {

// What multiplies the new momentum of each tensor.
struct FactorArguments {
  int tasks, tensors;  // K, T
  Momentum momentum;
  const double* per_tensor_ptr;  // [T, R, R], R as in gramian; null where no norm is needed
  double* factors_ptr;           // [T], written
  double* squares_ptr;           // [T], written where norms are needed: ‖m̂‖², 0 where unwritten
};

// 1 / (1 - β^t). A tensor that never had a gradient has t = 0 and is not written: any factor does.
HD double bias_correction(std::int64_t steps, double beta) {
  double power = 1.0, square = beta;  // by squaring: the same bits on every processor
  for (std::int64_t left = steps > 1 ? steps : 1; left > 0; left /= 2) {
    if (left % 2 == 1) power *= square;
    square *= square;
  }
  return 1.0 / (1.0 - power);
}

// ‖m‖² of a tensor without a pass over memory: vᵀ G v with v = (1-β) w, and β for the old momentum.
HD double squared_norm(const FactorArguments& f, const double* weights_ptr, int tensor) {
  const int R = f.tasks + (f.momentum.steps_ptr != nullptr);
  const double beta = f.momentum.beta;
  const double* gramian_ptr = f.per_tensor_ptr + static_cast<std::int64_t>(tensor) * R * R;
  const auto v = [&](int row) { return row < f.tasks ? (1.0 - beta) * weights_ptr[row] : beta; };
  double square = 0.0;
  for (int i = 0; i < R; ++i) {
    double sum = 0.0;
    for (int j = 0; j < R; ++j) sum += gramian_ptr[i * R + j] * v(j);
    square += sum * v(i);
  }
  return square > 0.0 ? square : 0.0;
}

// Finds the factor of one tensor, with its weights [K] where norms are needed. `written`: it has
// an output, and all gradients are finite.
HD void find_factor(const FactorArguments& f, const double* weights_ptr, int tensor, bool written) {
  double factor = 1.0;
  if (f.momentum.steps_ptr != nullptr)
    factor = bias_correction(f.momentum.steps_ptr[tensor] + (written ? 1 : 0), f.momentum.beta);
  if (f.per_tensor_ptr != nullptr) {
    const double square = squared_norm(f, weights_ptr, tensor) * factor * factor;
    f.squares_ptr[tensor] = written ? square : 0.0;
  }
  f.factors_ptr[tensor] = factor;
}

HD void count_step(const FactorArguments& f, int tensor, bool written) {
  if (written && f.momentum.steps_ptr != nullptr) ++f.momentum.steps_ptr[tensor];
}

// min(1, max_norm / ‖m̂‖) over all tensors together; every thread of the block has it.
HD double clip_factor(const double* squares_ptr, int tensors, double max_norm) {
  const double square = block_sum<double>([&](int thread) {
    double sum = 0.0;
    for (int tensor = thread; tensor < tensors; tensor += THREADS) sum += squares_ptr[tensor];
    return sum;
  });
  const double norm = sqrt(square);
  return norm > max_norm ? max_norm / norm : 1.0;
}

}  // namespace gcond
