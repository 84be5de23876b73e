// accumulate: adds the gradients of one task to its accumulator, all tensors in one launch.
#pragma once

#include "launch.cuh"

namespace gcond {

constexpr int ACCUMULATE_CHUNK = 4096;

struct AccumulateArguments {
  Matrix accumulator;  // [N'], float32 or bfloat16
  Chunks chunks;
  float scale;
  Matrix scale_tensor;  // [], or null: `scale` is used
  bool overwrite;
};

void accumulate(const Stream& stream, const AccumulateArguments& arguments,
                const TensorList& gradients);

// Raises CUDA's error where these kernels cannot run on the device.
void check_device(int device);

}  // namespace gcond
