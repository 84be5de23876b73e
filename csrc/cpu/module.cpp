// The extension module gcond_kernels._cpu, which the Python files of this folder call. They have
// checked types, devices and shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../common/bindings.h"
#include "operations.h"

namespace gcond {
namespace cpu {
namespace {

// The time in which other threads of Python may run.
using Released = py::gil_scoped_release;

void accumulate_(const Plan& plan, py::handle accumulator, py::handle gradients, float scale,
                 bool overwrite, int threads) {
  const Accumulation arguments{matrix_of(accumulator), tensor_ptrs(gradients), scale, overwrite};
  const Released released;
  accumulate(plan, arguments, threads);
}

GramianArguments gramian_arguments(py::handle gradients, py::handle momentum,
                                   const double* history_scale_ptr, py::handle gramians) {
  return {
      task_gradients(gradients),
      ptr<const float>(momentum),
      !momentum.is_none(),
      history_scale_ptr,
      {field_ptr<double>(gramians, "total"), field_ptr<double>(gramians, "cross"),
       field_ptr<double>(gramians, "per_tensor"), field_ptr<double>(gramians, "cross_per_tensor")}};
}

void gramian_(const Plan& plan, py::handle gradients, py::handle momentum, py::handle history_scale,
              py::handle gramians, int threads) {
  const GramianArguments arguments =
      gramian_arguments(gradients, momentum, ptr<const double>(history_scale), gramians);
  const Released released;
  gramian(plan, arguments, threads);
}

void arbitrate_(py::handle gramian, py::handle cross, py::handle scale, py::handle state,
                py::handle settings, py::handle arbitration) {
  const dlpack::Tensor tensor = read(gramian);
  const ArbitrateArguments arguments = arbitrate_arguments(
      dimension(gramian, 1), ptr<const double>(gramian), ptr<const double>(cross),
      ptr<const double>(scale), state, settings, arbitration);
  const int batch = tensor.ndim == 3 ? static_cast<int>(tensor.shape[0]) : 1;
  const Released released;
  arbitrate(arguments, batch);
}

void combine_(const Plan& plan, py::handle gradients, py::handle outputs, py::handle weights,
              py::handle finite, py::handle momentum, py::handle rescale, int threads) {
  const Matrix w = matrix_of(weights);
  const bool rescaled = !rescale.is_none();
  const CombineArguments arguments{
      task_gradients(gradients),
      tensor_ptrs(outputs),
      momentum_of(momentum),
      static_cast<const double*>(w.data_ptr),
      w.stride,
      ptr<const bool>(finite),
      rescaled ? field_ptr<const double>(rescale, "per_tensor") : nullptr,
      rescaled ? field(rescale, "max_norm").cast<double>() : HUGE_VAL};
  const Released released;
  combine(plan, arguments, threads);
}

void resolve_(const Plan& plan, py::handle gradients, py::handle outputs, py::handle momentum,
              py::handle max_norm, py::handle state, py::handle settings, py::handle results,
              int threads) {
  const bool clipped = !max_norm.is_none();
  const py::object gramians = field(results, "gramians"),
                   arbitration = field(results, "arbitration");
  const bool with_momentum = clipped && !momentum.is_none();
  const GramianArguments g =
      gramian_arguments(gradients, with_momentum ? field(momentum, "buffer") : py::none(),
                        field_ptr<const double>(state, "history_scale"), gramians);
  const ArbitrateArguments a =
      arbitrate_arguments(g.gradients.tasks, g.results.total_ptr, g.results.cross_ptr,
                          g.gradients.scale_ptr, state, settings, arbitration);
  const CombineArguments c{g.gradients,
                           tensor_ptrs(outputs),
                           momentum_of(momentum),
                           a.result.weights_ptr,
                           0,
                           a.result.finite_ptr,
                           clipped ? g.results.per_tensor_ptr : nullptr,
                           clipped ? max_norm.cast<double>() : HUGE_VAL};
  const Released released;
  gramian(plan, g, threads);
  arbitrate(a, 1);
  combine(plan, c, threads);
}

}  // namespace
}  // namespace cpu
}  // namespace gcond

PYBIND11_MODULE(_cpu, module) {
  using namespace gcond::cpu;
  module.doc() = "The kernels in C++ for CPUs.";
  // Compared by csrc/cpu/__init__.py; another number with every change of the functions below.
  module.attr("INTERFACE") = 1;
  pybind11::class_<Plan>(module, "Plan")
      .def(pybind11::init<const std::vector<std::int64_t>&, const std::vector<std::int64_t>&>());
  module.def("use_exchange", &gcond::use_exchange);
  module.def("kernels_in_use", &kernels_in_use);
  module.def("kernels_here", &kernels_here);
  module.def("use_kernels", &use_kernels);
  module.def("accumulate", &accumulate_);
  module.def("gramian", &gramian_);
  module.def("arbitrate", &arbitrate_);
  module.def("combine", &combine_);
  module.def("resolve", &resolve_);
}
