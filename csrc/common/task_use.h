// What combine does with the accumulator of each task.
#pragma once

#include "types.h"

namespace gcond {

struct TaskUse {
  bool weighted, stored;
  float weight;
};

// Where a gradient was not finite nothing is read: zeros are written, momentum and history kept.
HD TaskUse use_of(const TaskGradients& gradients, double beta, const double* weights_ptr,
                  bool finite, int task) {
  const double scale = gradients.scale_ptr[task];
  const float weight = static_cast<float>(weights_ptr[task] * scale * (1.0 - beta));
  return {finite && weight != 0.0f, finite && scale != 0.0 && gradients.history.data_ptr != nullptr,
          weight};
}

}  // namespace gcond
