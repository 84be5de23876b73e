// Launching, and what CUDA answers.
#pragma once

#include <stdexcept>
#include <string>

#include "common.cuh"

namespace gcond {

// Where the work is done: a GPU and one of its streams, or the host (device -1).
struct Place {
  int device;
  std::uintptr_t stream;

  bool is_host() const { return device < 0; }
  cudaStream_t handle() const { return reinterpret_cast<cudaStream_t>(stream); }
};

inline void check(cudaError_t code, const std::string& what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this error again
  throw std::runtime_error("CUDA, " + what + ": " + cudaGetErrorString(code));
}

// Launches `blocks` blocks of THREADS; of a cooperative grid all run at the same time.
template <class... Arguments>
void launch(const char* what, void (*kernel)(Arguments...), const Place& place, int blocks,
            std::size_t shared_bytes, bool cooperative, const Arguments&... arguments) {
  if (blocks == 0) return;
  check(cudaSetDevice(place.device), what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(THREADS);
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = place.handle();
  configuration.attrs = cooperative ? &attribute : nullptr;
  configuration.numAttrs = cooperative ? 1 : 0;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernelExC(&configuration, reinterpret_cast<const void*>(kernel), pointers), what);
}

}  // namespace gcond
