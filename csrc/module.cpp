// The extension module gcond_kernels._cuda: what the Python files of this folder call. They have
// made every check of types, devices and shapes.
//
// `device` is the number of a GPU, or -1 for the driver on the host; `stream` the handle of one of
// its streams. Tables (segments, chunks, first) are those of gcond_kernels/tables.py. Every failure
// of CUDA is a RuntimeError with CUDA's own words.
#include <pybind11/pybind11.h>

#include <limits>

#include "accumulate.cuh"
#include "graddrop.cuh"
#include "lists.cuh"
#include "resolve.cuh"
#include "tensors.h"

namespace gcond {
namespace {

namespace py = pybind11;

constexpr double NO_BOUND = std::numeric_limits<double>::infinity();

// How flat storage is cut into pieces.
struct Pieces {
  const Segment* segments;
  const Chunk* chunks;
  const std::int32_t* first;
  int tensors, count, length;

  Pieces(py::handle segments_, py::handle chunks_, py::handle first_, int tensors_, int count_,
         int length_)
      : segments(address<const Segment>(segments_)),
        chunks(address<const Chunk>(chunks_)),
        first(address<const std::int32_t>(first_)),
        tensors(tensors_),
        count(count_),
        length(length_) {}
};

Mask mask_of(py::handle words) { return address<const std::uint32_t>(words); }

void accumulate_(int device, std::uintptr_t stream, py::handle accumulator, const Addresses& gradients,
                 const Pieces& pieces, float scale, py::handle scale_tensor, bool overwrite) {
  const Rows target = rows_of(accumulator), factor = rows_of(scale_tensor);
  const Accumulate arguments{target.data, target.type, pieces.segments, pieces.chunks,
                             scale,       factor.data, factor.type,     overwrite};
  accumulate({device, stream}, arguments, gradients, pieces.count);
}

Gramian gramian_of(const Pieces& pieces, py::handle accumulators, py::handle history,
                   py::handle momentum, py::handle mask, py::handle partials) {
  return {rows_of(accumulators), rows_of(history), rows_of(momentum), mask_of(mask),
          pieces.segments,       pieces.chunks,    pieces.first,      pieces.tensors,
          pieces.count,          pieces.length,    address<float>(partials)};
}

Totals totals_of(int tasks, bool momentum, py::handle scale, py::handle history_scale,
                 py::handle total, py::handle cross, py::handle per_tensor, py::handle crosses) {
  return {address<const double>(scale),
          address<const double>(history_scale),
          address<double>(total),
          address<double>(cross),
          address<double>(per_tensor),
          address<double>(crosses),
          tasks,
          tasks + (momentum ? 1 : 0),
          tasks + 1};
}

void gramian_(int device, std::uintptr_t stream, const Pieces& pieces, int tasks,
              py::handle accumulators, py::handle history, py::handle momentum, py::handle mask,
              py::handle scale, py::handle history_scale, py::handle partials, py::handle total,
              py::handle cross, py::handle per_tensor, py::handle crosses) {
  gramian({device, stream}, gramian_of(pieces, accumulators, history, momentum, mask, partials),
          totals_of(tasks, !momentum.is_none(), scale, history_scale, total, cross, per_tensor,
                    crosses));
}

void lists_(int device, std::uintptr_t stream, const Pieces& pieces, int count,
            const Addresses& tensors, py::handle partials, py::handle total,
            py::handle per_tensor) {
  const auto none = py::none();
  Totals totals = totals_of(count, false, none, none, total, none, per_tensor, none);
  totals.stored = count;
  lists({device, stream}, gramian_of(pieces, none, none, none, none, partials), tensors, totals);
}

Settings settings_of(const py::sequence& thresholds, double remap_power, bool smooth,
                     int max_iterations, double tolerance, double stability_weight,
                     double strength_weight, double norm_ema_beta, double norm_ema_floor,
                     const py::object& norm_cap, bool resolved_history, double eps) {
  return {thresholds[0].cast<double>(),
          thresholds[1].cast<double>(),
          thresholds[2].cast<double>(),
          tolerance,
          remap_power,
          stability_weight,
          strength_weight,
          norm_ema_beta,
          norm_ema_floor,
          norm_cap.is_none() ? NO_BOUND : norm_cap.cast<double>(),
          eps,
          max_iterations,
          smooth,
          resolved_history};
}

State state_of(py::handle norm_ema, py::handle winners, py::handle history_gramian,
               py::handle history_rows, py::handle history_scale) {
  const dlpack::Tensor recent = read(winners);
  return {address<double>(norm_ema),
          address<std::int64_t>(winners),
          static_cast<int>(recent.shape[recent.ndim - 1]),
          address<double>(history_gramian),
          address<double>(history_rows),
          address<double>(history_scale)};
}

Decision decision_of(py::handle weights, py::handle rows, py::handle events, py::handle finite) {
  return {address<double>(weights), address<double>(rows), address<double>(events),
          address<bool>(finite)};
}

void arbitrate_(int device, std::uintptr_t stream, int batch, int tasks, py::handle gramian,
                py::handle cross, py::handle scale, const State& state, const Settings& settings,
                const Decision& decision) {
  arbitrate({device, stream},
            {tasks, address<const double>(gramian), address<const double>(cross),
             address<const double>(scale), state, settings, decision},
            batch);
}

Combine combine_of(const Pieces& pieces, int tasks, py::handle accumulators, py::handle history,
                   py::handle momentum, py::handle mask, py::handle scale, py::handle factors,
                   double beta, bool signs) {
  return {rows_of(accumulators),
          rows_of(history),
          rows_of(momentum),
          mask_of(mask),
          pieces.segments,
          pieces.chunks,
          pieces.length,
          tasks,
          address<const double>(scale),
          address<const double>(factors),
          beta,
          signs};
}

// Of weights [K] the stride from tensor to tensor is 0.
ResolvedAt resolved_at(py::handle weights, py::handle finite, py::handle clipping) {
  const Rows rows = rows_of(weights);
  return {static_cast<const double*>(rows.data), rows.stride, address<const bool>(finite),
          address<const double>(clipping)};
}

void combine_(int device, std::uintptr_t stream, const Pieces& pieces, int tasks,
              py::handle accumulators, py::handle history, py::handle momentum, py::handle mask,
              py::handle scale, py::handle factors, double beta, bool signs, py::handle weights,
              py::handle finite, py::handle clipping, const Addresses& outputs) {
  combine({device, stream},
          combine_of(pieces, tasks, accumulators, history, momentum, mask, scale, factors, beta,
                     signs),
          resolved_at(weights, finite, clipping), outputs, pieces.count);
}

Factors factors_of(int tasks, int tensors, int rows, py::handle per_tensor,
                   py::handle momentum_steps, py::handle parameter_norms, py::handle found,
                   py::handle squares, double beta, double trust_ratio_coef,
                   double trust_ratio_clip, bool norms) {
  return {address<const double>(per_tensor),
          address<std::int64_t>(momentum_steps),
          address<const double>(parameter_norms),
          address<double>(found),
          address<double>(squares),
          tasks,
          tensors,
          rows,
          beta,
          trust_ratio_coef,
          trust_ratio_clip,
          norms};
}

void factors_(int device, std::uintptr_t stream, const Factors& arguments, py::handle weights,
              py::handle finite, const Addresses& outputs) {
  factors({device, stream}, arguments, resolved_at(weights, finite, py::none()), outputs);
}

void clipping_(int device, std::uintptr_t stream, py::handle squares, int tensors, double max_norm,
               py::handle factor) {
  clipping({device, stream}, address<const double>(squares), tensors, max_norm,
           address<double>(factor));
}

void graddrop_(int device, std::uintptr_t stream, const Pieces& pieces, int tasks,
               py::handle accumulators, py::handle momentum, py::handle mask, py::handle scale,
               py::handle factors, double beta, float leak, std::uint64_t seed, py::handle draws,
               std::uint64_t first, py::handle finite, const Addresses& outputs) {
  graddrop({device, stream},
           {rows_of(accumulators), rows_of(momentum), mask_of(mask), pieces.segments,
            pieces.chunks, pieces.length, tasks, address<const double>(scale),
            address<const double>(factors), beta, leak, seed, address<const std::int64_t>(draws),
            first, address<const bool>(finite)},
           outputs, pieces.count);
}

void resolve_(int device, std::uintptr_t stream, const Pieces& pieces, int tasks,
              py::handle accumulators, py::handle history, py::handle momentum,
              bool momentum_products, py::handle mask, py::handle scale, py::handle partials,
              py::handle total, py::handle cross, py::handle per_tensor, py::handle crosses,
              const State& state, const Settings& settings, const Decision& decision,
              const Factors& factors, double beta, py::handle found_factors, py::object max_norm,
              bool signs, const Addresses& outputs) {
  const auto none = py::none();
  Resolve r{
      gramian_of(pieces, accumulators, history, momentum_products ? momentum : py::handle(none),
                 mask, partials),
      {},
      {tasks, address<const double>(total), address<const double>(cross),
       address<const double>(scale), state, settings, decision},
      combine_of(pieces, tasks, accumulators, history, momentum, mask, scale, found_factors, beta,
                 signs),
      factors,
      max_norm.is_none() ? NO_BOUND : max_norm.cast<double>()};
  r.totals = totals_of(tasks, momentum_products, scale, none, total, cross, per_tensor, crosses);
  r.totals.history_scale = state.history_scale;
  resolve({device, stream}, r, outputs);
}

// CUDA's answer to a kernel being prepared for a device: none where it can run there.
std::string problem_on(int device) {
  try {
    prepare({device, 0});
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace
}  // namespace gcond

PYBIND11_MODULE(_cuda, module) {
  using namespace gcond;
  module.doc() = "The kernels in CUDA C++, and the driver that runs them on the host.";
  module.attr("MOST_TENSORS") = MOST_TENSORS;
  module.attr("MOST_TASKS") = MOST_TASKS;
  module.attr("MOST_TASKS_IN_REGISTERS") = MOST_TASKS_IN_REGISTERS;
  module.attr("ACCUMULATE_CHUNK") = ACCUMULATE_CHUNK;
  module.attr("COMBINE_CHUNK") = COMBINE_CHUNK;
  module.attr("ARCHITECTURES") = GCOND_ARCHITECTURES;

  py::class_<Addresses>(module, "Addresses").def(py::init(&addresses_of));
  py::class_<Pieces>(module, "Pieces").def(
      py::init<py::handle, py::handle, py::handle, int, int, int>());
  py::class_<Settings>(module, "Settings").def(py::init(&settings_of),
      py::kw_only(), py::arg("thresholds"), py::arg("remap_power"), py::arg("smooth"),
      py::arg("max_iterations"), py::arg("tolerance"), py::arg("stability_weight"),
      py::arg("strength_weight"), py::arg("norm_ema_beta"), py::arg("norm_ema_floor"),
      py::arg("norm_cap"), py::arg("resolved_history"), py::arg("eps"));
  py::class_<State>(module, "State").def(py::init(&state_of),
      py::kw_only(), py::arg("norm_ema"), py::arg("winners"), py::arg("history_gramian"),
      py::arg("history_rows"), py::arg("history_scale"));
  py::class_<Decision>(module, "Decision").def(py::init(&decision_of));
  py::class_<Factors>(module, "Factors").def(py::init(&factors_of));

  module.def("use_exchange", &use_exchange);
  module.def("problem_on", &problem_on);
  module.def("accumulate", &accumulate_);
  module.def("gramian", &gramian_);
  module.def("lists", &lists_);
  module.def("arbitrate", &arbitrate_);
  module.def("factors", &factors_);
  module.def("clipping", &clipping_);
  module.def("combine", &combine_);
  module.def("graddrop", &graddrop_);
  module.def("resolve", &resolve_);
}
