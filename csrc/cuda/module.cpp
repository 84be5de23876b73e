// The extension module gcond_kernels._cuda, which the Python files of this folder call. They have
// checked types, devices and shapes.
//
// A stream is a pair (device, handle): the number of a GPU and one of its streams, or (-1, 0) for
// the host. Every failure of CUDA is a RuntimeError with CUDA's own text.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/bindings.h"
#include "accumulate.cuh"
#include "resolve.cuh"

namespace gcond {
namespace {

namespace py = pybind11;

using StreamPair = std::pair<int, std::uintptr_t>;

Stream stream_of(const StreamPair& pair) { return {pair.first, pair.second}; }

// The tensors of one launch.
TensorList tensor_list(py::handle tensors) {
  const std::vector<TensorPtr> found = tensor_ptrs(tensors);
  if (found.size() > MAX_TENSORS)
    throw std::invalid_argument("at most " + std::to_string(MAX_TENSORS) +
                                " tensors in a launch, not " + std::to_string(found.size()));
  TensorList list;
  std::copy(found.begin(), found.end(), list.of);
  return list;
}

Chunks chunks_of(py::handle segments, py::handle entries, py::handle first, int tensors, int count,
                 int length) {
  return {ptr<const Segment>(segments), ptr<const ChunkEntry>(entries),
          ptr<const std::int32_t>(first), tensors, count, length};
}

ResolutionPtrs resolution_of(py::handle r) {
  const Matrix weights = matrix_of(field(r, "weights"));
  return {static_cast<const double*>(weights.data_ptr), weights.stride, field_ptr<const bool>(r, "finite"),
          field_ptr<const double>(r, "clip_factor")};
}

GramianArguments gramian_arguments(const Chunks& chunks, const TaskGradients& gradients,
                                   py::handle momentum, const double* history_scale_ptr,
                                   py::handle partials, py::handle gramians) {
  // Not by the pointer: that of an empty momentum is null.
  const int rows = gradients.tasks + (momentum.is_none() ? 0 : 1);
  return {chunks, gradients, ptr<const float>(momentum), rows, history_scale_ptr, ptr<float>(partials),
          field_ptr<double>(gramians, "total"), field_ptr<double>(gramians, "cross"),
          field_ptr<double>(gramians, "per_tensor"), field_ptr<double>(gramians, "cross_per_tensor")};
}

void accumulate_(const StreamPair& stream, py::handle accumulator, const TensorList& gradients,
                 const Chunks& chunks, py::handle scale, bool overwrite) {
  const bool is_number = PyFloat_Check(scale.ptr());
  accumulate(stream_of(stream),
             {matrix_of(accumulator), chunks, is_number ? scale.cast<float>() : 1.0f,
              matrix_of(is_number ? py::none() : scale), overwrite},
             gradients);
}

void gramian_(const StreamPair& stream, const Chunks& chunks, py::handle gradients,
              py::handle momentum, py::handle history_scale, py::handle partials,
              py::handle gramians) {
  gramian(stream_of(stream),
          gramian_arguments(chunks, task_gradients(gradients), momentum,
                            ptr<const double>(history_scale), partials, gramians));
}

void arbitrate_(const StreamPair& stream, py::handle gramian, py::handle cross, py::handle scale,
                py::handle state, py::handle settings, py::handle arbitration) {
  const dlpack::Tensor tensor = read(gramian);
  arbitrate(stream_of(stream),
            arbitrate_arguments(dimension(gramian, 1), ptr<const double>(gramian),
                                ptr<const double>(cross), ptr<const double>(scale), state, settings,
                                arbitration),
            tensor.ndim == 3 ? static_cast<int>(tensor.shape[0]) : 1);
}

void find_factors_(const StreamPair& stream, const TensorList& outputs, py::handle resolution,
                   py::handle momentum, py::handle per_tensor, py::handle factors,
                   py::handle squares) {
  find_factors(stream_of(stream),
               {dimension(field(resolution, "weights"), 1), dimension(factors, 1),
                momentum_of(momentum), ptr<const double>(per_tensor), ptr<double>(factors),
                ptr<double>(squares)},
               resolution_of(resolution), outputs);
}

void find_clip_factor_(const StreamPair& stream, py::handle squares, double max_norm,
                       py::handle factor) {
  find_clip_factor(stream_of(stream), ptr<const double>(squares), dimension(squares, 1), max_norm,
                   ptr<double>(factor));
}

void combine_(const StreamPair& stream, const Chunks& chunks, py::handle gradients,
              const TensorList& outputs, py::handle resolution, py::handle momentum,
              py::handle factors) {
  combine(stream_of(stream),
          {chunks, task_gradients(gradients), momentum_of(momentum), ptr<const double>(factors)},
          resolution_of(resolution), outputs);
}

void resolve_(const StreamPair& stream, const Chunks& chunks, py::handle task_gradients_,
              const TensorList& outputs, py::handle momentum_, py::handle max_norm,
              py::handle state, py::handle settings, py::handle results) {
  const bool needs_norms = !max_norm.is_none();
  const TaskGradients gradients = task_gradients(task_gradients_);
  const Momentum momentum = momentum_of(momentum_);
  ResolveArguments r;
  const bool with_momentum = needs_norms && !momentum_.is_none();
  r.gramian = gramian_arguments(chunks, gradients,
                                with_momentum ? field(momentum_, "buffer") : py::none(),
                                field_ptr<const double>(state, "history_scale"),
                                field(results, "partials"),
                                field(results, "gramians"));
  r.arbitrate = arbitrate_arguments(gradients.tasks, r.gramian.total_ptr, r.gramian.cross_ptr,
                                    gradients.scale_ptr, state, settings,
                                    field(results, "arbitration"));
  r.factors = {gradients.tasks, chunks.tensors, momentum,
               needs_norms ? r.gramian.per_tensor_ptr : nullptr, field_ptr<double>(results, "factors"),
               field_ptr<double>(results, "squares")};
  r.combine = {chunks, gradients, momentum, r.factors.factors_ptr};
  r.max_norm = needs_norms ? max_norm.cast<double>() : HUGE_VAL;
  resolve(stream_of(stream), r, outputs);
}

// CUDA's error where the kernels do not run on a device; empty where they do.
std::string device_problem(int device) {
  try {
    check_device(device);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace
}  // namespace gcond

PYBIND11_MODULE(_cuda, module) {
  using namespace gcond;
  module.doc() = "The kernels in CUDA C++, which run on the host too.";
  module.attr("MAX_TENSORS") = MAX_TENSORS;
  module.attr("MAX_TASKS") = MAX_TASKS;
  module.attr("MAX_TASKS_IN_REGISTERS") = MAX_TASKS_IN_REGISTERS;
  module.attr("ACCUMULATE_CHUNK") = ACCUMULATE_CHUNK;
  module.attr("COMBINE_CHUNK") = COMBINE_CHUNK;
  module.attr("ARCHITECTURES") = GCOND_ARCHITECTURES;

  py::class_<TensorList>(module, "TensorList").def(py::init(&tensor_list));
  py::class_<Chunks>(module, "Chunks").def(py::init(&chunks_of));

  module.def("use_exchange", &use_exchange);
  module.def("device_problem", &device_problem);
  module.def("accumulate", &accumulate_);
  module.def("gramian", &gramian_);
  module.def("arbitrate", &arbitrate_);
  module.def("find_factors", &find_factors_);
  module.def("find_clip_factor", &find_clip_factor_);
  module.def("combine", &combine_);
  module.def("resolve", &resolve_);
}
