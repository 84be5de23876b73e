#include "arbitrate.cuh"

#include <vector>

namespace gcond {
namespace {

__global__ void __launch_bounds__(THREADS, 1)
    arbitrate_kernel(const __grid_constant__ ArbitrateArguments arguments) {
  extern __shared__ double memory[];
  arbitrate_entry(arguments, memory, static_cast<int>(blockIdx.x));
}

}  // namespace

void arbitrate(const Stream& stream, const ArbitrateArguments& arguments, int batch) {
  const int size = scratch_size(arguments.tasks), bytes = size * static_cast<int>(sizeof(double));
  if (stream.is_host()) {
    std::vector<double> memory(size);
    for (int entry = 0; entry < batch; ++entry) arbitrate_entry(arguments, memory.data(), entry);
    return;
  }
  check(cudaSetDevice(stream.device), "arbitrate");
  check(cudaFuncSetAttribute(arbitrate_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "arbitrate");
  launch("arbitrate", arbitrate_kernel, stream, {batch, static_cast<std::size_t>(bytes)}, arguments);
}

}  // namespace gcond
