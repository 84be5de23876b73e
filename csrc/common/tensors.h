// Reads tensors by DLPack's exchange of C functions, which torch offers since 2.10. It is a table
// of functions with a fixed layout: this module needs no header and no library of torch, and one
// build serves every version of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "types.h"

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

  void* data_ptr() const { return static_cast<char*>(data) + byte_offset; }
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

// Takes the functions of torch, from the capsule `torch.Tensor.__dlpack_c_exchange_api__`.
void use_exchange(const pybind11::capsule& capsule);

// The description of a tensor, which must outlive the call that it is read for.
dlpack::Tensor read(pybind11::handle tensor);

// The address of a tensor's elements; null for None.
template <class T>
T* ptr(pybind11::handle tensor) {
  return tensor.is_none() ? nullptr : static_cast<T*>(read(tensor).data_ptr());
}

// A tensor of up to two dimensions; only of a matrix is there a stride. Null for None.
Matrix matrix_of(pybind11::handle tensor);

// The addresses and dtypes of tensors or None, from a list or tuple.
std::vector<TensorPtr> tensor_ptrs(pybind11::handle tensors);

}  // namespace gcond
