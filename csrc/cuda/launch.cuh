// Launches kernels, or runs the same code on the host, and reports CUDA's errors.
#pragma once

#include <stdexcept>
#include <string>

#include "vectors.cuh"

namespace gcond {

// A stream of a GPU, or the host (device -1).
struct Stream {
  int device;
  std::uintptr_t handle;

  bool is_host() const { return device < 0; }
};

inline void check(cudaError_t code, const std::string& what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this error again
  throw std::runtime_error("CUDA, " + what + ": " + cudaGetErrorString(code));
}

struct Grid {
  int blocks;  // of THREADS
  std::size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks run at the same time
};

template <class... Arguments>
void launch(const char* what, void (*kernel)(Arguments...), const Stream& stream, const Grid& grid,
            const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  check(cudaSetDevice(stream.device), what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  configuration.blockDim = dim3(THREADS);
  configuration.dynamicSmemBytes = grid.shared_bytes;
  configuration.stream = reinterpret_cast<cudaStream_t>(stream.handle);
  configuration.attrs = &attribute;
  configuration.numAttrs = grid.cooperative ? 1 : 0;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernelExC(&configuration, reinterpret_cast<const void*>(kernel), pointers), what);
}

// Calls `run(chunk, thread)` for every thread of every chunk.
template <class F>
void for_threads_on_host(int chunks, F run) {
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int thread = 0; thread < THREADS; ++thread) run(chunk, thread);
}

}  // namespace gcond
