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
  arbitrate_alone(entry_of(arguments, static_cast<int>(blockIdx.x)), memory);
}

}  // namespace

void arbitrate(const Place& place, const Arbitrate& arguments, int batch) {
  const int doubles = scratch_doubles(arguments.tasks);
  if (place.is_host()) {
    std::vector<double> memory(doubles);
    for (int entry = 0; entry < batch; ++entry)
      arbitrate_alone(entry_of(arguments, entry), memory.data());
    return;
  }
  check(cudaSetDevice(place.device), "arbitrate");
  check(cudaFuncSetAttribute(arbitrate_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             doubles * static_cast<int>(sizeof(double))),
        "arbitrate");
  launch("arbitrate", arbitrate_kernel, place, batch, doubles * sizeof(double), false,
         arguments);
}

}  // namespace gcond
