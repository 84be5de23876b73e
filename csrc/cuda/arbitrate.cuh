// arbitrate: a block for every resolution of a batch.
#pragma once

#include "../common/arbitrate.h"
#include "launch.cuh"

namespace gcond {

// With more tasks the two matrices of a resolution exceed the block's shared memory.
constexpr int MAX_TASKS = 64;

// Resolves a batch, each entry by a block.
void arbitrate(const Stream& stream, const ArbitrateArguments& arguments, int batch);

}  // namespace gcond
