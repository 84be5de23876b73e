#include "arbitrate.cuh"

#include <vector>

namespace gcond {
namespace {

HD void arbitrate_alone(const Arbitrate& arguments, void* memory) {
  const Scratch scratch = scratch_in(memory, arguments.tasks);
  arbitrate_in(arguments, scratch, true);
  keep_state(arguments, scratch);
}

__global__ void __launch_bounds__(THREADS, 1)
    arbitrate_kernel(const __grid_constant__ Arbitrate arguments) {
  extern __shared__ double memory[];
  arbitrate_alone(arguments, memory);
}

}  // namespace

void arbitrate(const Place& place, const Arbitrate& arguments) {
  const int doubles = scratch_doubles(arguments.tasks);
  if (place.is_host()) {
    std::vector<double> memory(doubles);
    arbitrate_alone(arguments, memory.data());
    return;
  }
  check(cudaSetDevice(place.device), "arbitrate");
  check(cudaFuncSetAttribute(arbitrate_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             doubles * static_cast<int>(sizeof(double))),
        "arbitrate");
  launch("arbitrate", arbitrate_kernel, place, 1, doubles * sizeof(double), false,
         arguments);
}

}  // namespace gcond
