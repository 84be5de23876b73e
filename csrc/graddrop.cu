#include "graddrop.cuh"

#include "gramian.cuh"

namespace gcond {
namespace {

template <int K>
__global__ void __launch_bounds__(THREADS)
    graddrop_kernel(const __grid_constant__ Graddrop arguments,
                    const __grid_constant__ Addresses outputs) {
  graddrop_chunk<K>(arguments, outputs, static_cast<int>(blockIdx.x),
                    static_cast<int>(threadIdx.x));
}

template <int K>
void graddrop_of(const Place& place, const Graddrop& arguments, const Addresses& outputs,
                 int chunks) {
  if (!place.is_host()) {
    launch("graddrop", graddrop_kernel<K>, place, chunks, 0, false, arguments, outputs);
    return;
  }
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int thread = 0; thread < THREADS; ++thread)
      graddrop_chunk<K>(arguments, outputs, chunk, thread);
}

}  // namespace

void graddrop(const Place& place, const Graddrop& arguments, const Addresses& outputs, int chunks) {
  if (arguments.tasks > MOST_TASKS_IN_REGISTERS) {
    graddrop_of<0>(place, arguments, outputs, chunks);
    return;
  }
  with_tasks(arguments.tasks, [&](auto tasks) {
    graddrop_of<decltype(tasks)::value>(place, arguments, outputs, chunks);
  });
}

}  // namespace gcond
