// Tensors as the caller's framework hands them over: by DLPack's exchange of C functions, which
// torch offers since 2.10. It is a table of functions with a fixed layout, so that this module
// needs no header and no library of torch, and one build serves every version of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common.cuh"

namespace gcond {

// The layouts of DLPack 1.x (https://dmlc.github.io/dlpack/latest/c_api.html), as far as they are
// read here.
namespace dlpack {

struct Tensor {
  void* data;
  struct {
    std::int32_t type, id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct Exchange {
  struct {
    std::uint32_t major, minor;
  } version;
  Exchange* previous;
  void* allocate;
  void* owned_from_object;
  void* object_from_owned;
  int (*tensor_from_object)(void* object, Tensor* tensor);
  void* current_stream;
};

}  // namespace dlpack

// The functions of torch, from the capsule `torch.Tensor.__dlpack_c_exchange_api__`.
void use_exchange(const pybind11::capsule& capsule);

// What is at hand of one tensor. It must outlive the call that it is read for.
dlpack::Tensor read(pybind11::handle tensor);
Type type_of(const dlpack::Tensor& tensor);

// Where the elements of a tensor lie; null for None.
void* data_of(pybind11::handle tensor);

template <class T>
T* address(pybind11::handle tensor) {
  return static_cast<T*>(data_of(tensor));
}

// A matrix [rows, elements] or a row, whose stride is 0; null for None.
Rows rows_of(pybind11::handle tensor);

// The addresses and types of up to MOST_TENSORS tensors or None, from a list or tuple.
Addresses addresses_of(pybind11::handle tensors);

}  // namespace gcond
