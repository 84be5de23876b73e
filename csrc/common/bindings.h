// Reads the argument objects of Python. Where a C++ structure has the name of a class of
// gcond_kernels/ops/types.py it is read from such an object.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "arbitrate.h"
#include "tensors.h"

namespace gcond {

namespace py = pybind11;

inline py::object field(py::handle object, const char* name) { return object.attr(name); }

// The address of a field that is a tensor or None.
template <class T>
T* field_ptr(py::handle object, const char* name) {
  return ptr<T>(field(object, name));
}

// A dimension of a tensor, counted from the last, which is 1.
inline int dimension(py::handle tensor, int from_last) {
  const dlpack::Tensor read_tensor = read(tensor);
  return static_cast<int>(read_tensor.shape[read_tensor.ndim - from_last]);
}

inline TaskGradients task_gradients(py::handle g) {
  return {dimension(field(g, "accumulators"), 2), matrix_of(field(g, "accumulators")),
          matrix_of(field(g, "history")), field_ptr<const std::uint32_t>(g, "mask"),
          field_ptr<const double>(g, "scale")};
}

inline Momentum momentum_of(py::handle m) {
  if (m.is_none()) return {nullptr, nullptr, 0.0};
  return {field_ptr<float>(m, "buffer"), field_ptr<std::int64_t>(m, "steps"),
          field(m, "beta").cast<double>()};
}

inline Settings settings_of(py::handle s, int max_iterations) {
  const auto number = [&](const char* name) { return field(s, name).cast<double>(); };
  const py::tuple thresholds = field(s, "thresholds"), weights = field(s, "tie_breaking_weights");
  Settings settings;
  settings.critical = thresholds[0].cast<double>();
  settings.main = thresholds[1].cast<double>();
  settings.weak = thresholds[2].cast<double>();
  settings.remap_power = number("remap_power");
  settings.tolerance = number("tolerance");
  settings.stability_weight = weights[0].cast<double>();
  settings.strength_weight = weights[1].cast<double>();
  settings.norm_ema_beta = number("norm_ema_beta");
  settings.norm_ema_floor = number("norm_ema_floor");
  settings.norm_cap = field(s, "norm_cap").is_none() ? HUGE_VAL : number("norm_cap");
  settings.eps = number("eps");
  settings.max_iterations = max_iterations;
  settings.smooth = field(s, "arbitration").cast<std::string>() == "smooth";
  settings.resolved_history = field(s, "history").cast<std::string>() == "resolved";
  return settings;
}

inline ArbitrationState state_of(py::handle s) {
  return {field_ptr<double>(s, "norm_ema"),
          field_ptr<std::int64_t>(s, "winners"),
          dimension(field(s, "winners"), 1),
          field_ptr<double>(s, "history_gramian"),
          field_ptr<double>(s, "history_coefficients"),
          field_ptr<double>(s, "history_scale")};
}

inline Arbitration arbitration_of(py::handle a) {
  return {field_ptr<double>(a, "weights"), field_ptr<double>(a, "coefficients"),
          field_ptr<double>(a, "events"), field_ptr<bool>(a, "finite")};
}

// What arbitration needs; the Gramians need not be filled yet.
inline ArbitrateArguments arbitrate_arguments(int tasks, const double* gramian_ptr,
                                              const double* cross_ptr, const double* scale_ptr,
                                              py::handle state, py::handle settings,
                                              py::handle arbitration) {
  const int max_iterations = dimension(field(arbitration, "events"), 2);
  return {tasks,
          gramian_ptr,
          cross_ptr,
          scale_ptr,
          state_of(state),
          settings_of(settings, max_iterations),
          arbitration_of(arbitration)};
}

}  // namespace gcond
