// accumulate: the gradients of one task are added to its accumulator, all of them in one launch.
#pragma once

#include "common.cuh"
#include "launch.cuh"

namespace gcond {

struct Accumulate {
  void* accumulator;  // [N'], float32 or bfloat16
  Type type;
  const Segment* segments;  // [T]
  const Chunk* chunks;      // [C], pieces of ACCUMULATE_CHUNK elements
  float scale;
  const void* scale_tensor;  // [], or null: `scale` is it
  Type scale_type;
  bool overwrite;
};

constexpr int ACCUMULATE_CHUNK = 4096;

void accumulate(const Place& place, const Accumulate& arguments, const Addresses& gradients,
                int chunks);

// Raises CUDA's error where these kernels cannot run on the device.
void prepare(const Place& place);

}  // namespace gcond
