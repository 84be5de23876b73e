#include "tensors.h"

#include <stdexcept>
#include <string>

namespace gcond {
namespace {

namespace py = pybind11;

const dlpack::Exchange* exchange = nullptr;

Dtype dtype_of(const dlpack::Tensor& tensor) {
  constexpr int FLOAT = 2, BFLOAT = 4;
  const int code = tensor.dtype.code, bits = tensor.dtype.bits;
  if (code == FLOAT && bits == 32) return FLOAT32;
  if (code == BFLOAT && bits == 16) return BFLOAT16;
  if (code == FLOAT && bits == 16) return FLOAT16;
  if (code == FLOAT && bits == 64) return FLOAT64;
  throw std::invalid_argument("a tensor of a type that no kernel reads: DLPack code " +
                              std::to_string(code) + ", " + std::to_string(bits) + " bits");
}

TensorPtr tensor_ptr(py::handle object) {
  if (object.is_none()) return static_cast<TensorPtr>(NO_TENSOR) << DTYPE_SHIFT;
  const dlpack::Tensor tensor = read(object);
  return reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) |
         static_cast<TensorPtr>(dtype_of(tensor)) << DTYPE_SHIFT;
}

}  // namespace

void use_exchange(const py::capsule& capsule) {
  const auto* offered = static_cast<const dlpack::Exchange*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (offered == nullptr) throw py::error_already_set();
  while (offered != nullptr && offered->version.major != 1) offered = offered->previous;
  if (offered == nullptr || offered->tensor_from_object == nullptr)
    throw std::runtime_error("torch offers no DLPack exchange of version 1 that reads tensors");
  exchange = offered;
}

dlpack::Tensor read(py::handle object) {
  if (exchange == nullptr) throw std::logic_error("use_exchange() has not been called");
  dlpack::Tensor tensor{};
  if (exchange->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  return tensor;
}

Matrix matrix_of(py::handle object) {
  if (object.is_none()) return {nullptr, FLOAT32, 0};
  const dlpack::Tensor tensor = read(object);
  return {tensor.data_ptr(), dtype_of(tensor), tensor.ndim == 2 ? tensor.shape[1] : 0};
}

std::vector<TensorPtr> tensor_ptrs(py::handle tensors) {
  const auto sequence = py::reinterpret_steal<py::object>(
      PySequence_Fast(tensors.ptr(), "tensors must be a list or a tuple"));
  if (!sequence) throw py::error_already_set();
  std::vector<TensorPtr> found(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(sequence.ptr())));
  PyObject** items = PySequence_Fast_ITEMS(sequence.ptr());
  for (std::size_t t = 0; t < found.size(); ++t) found[t] = tensor_ptr(items[t]);
  return found;
}

}  // namespace gcond
