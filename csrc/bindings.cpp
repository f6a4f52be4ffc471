// The pybind11 module nfnets_kernels._C. Python checks every argument (nfnets_kernels/ops); here pointers are trusted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "step_table.h"
#include "weight_table.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "python/snapshot.h"
#include "python/weight_reader.h"

namespace py = pybind11;

namespace {

using nfk::DType;
using Ints = std::vector<int64_t>;

void* pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<intptr_t>(address)); }

nfk::UnitStatistics* statistics_at(int64_t address) { return static_cast<nfk::UnitStatistics*>(pointer(address)); }

// Addresses of 0: none.
nfk::AgcTable agc_table(const Ints& weights, const Ints& counts, const Ints& lengths, const Ints& weight_dtypes,
                        const Ints& grad_dtypes, const Ints& statistics) {
  nfk::AgcTable table;
  for (size_t i = 0; i < weights.size(); ++i) {
    table.tensors.push_back({pointer(weights[i]), nullptr, statistics_at(statistics[i]),
                             static_cast<DType>(weight_dtypes[i]), static_cast<DType>(grad_dtypes[i]),
                             {counts[i], lengths[i]}});
  }
  return table;
}

nfk::SgdTable sgd_table(const Ints& weights, const Ints& momenta, const Ints& averages, const Ints& counts,
                        const Ints& lengths, const Ints& weight_dtypes, const Ints& grad_dtypes, const Ints& statistics,
                        const Ints& groups) {
  nfk::SgdTable table;
  for (size_t i = 0; i < weights.size(); ++i) {
    table.tensors.push_back({pointer(weights[i]), nullptr, pointer(momenta[i]), pointer(averages[i]),
                             statistics_at(statistics[i]), static_cast<DType>(weight_dtypes[i]),
                             static_cast<DType>(grad_dtypes[i]), {counts[i], lengths[i]},
                             static_cast<int>(groups[i])});
  }
  return table;
}

nfk::Addresses addresses(const Ints& values) {
  nfk::Addresses result;
  for (const int64_t value : values) result.of_tensor.push_back(pointer(value));
  return result;
}

Ints values(const nfk::Addresses& addresses) {
  Ints result;
  for (const void* address : addresses.of_tensor) result.push_back(reinterpret_cast<intptr_t>(address));
  return result;
}

void agc(const nfk::AgcTable& table, const nfk::Addresses& grads, double clip_factor, double eps, int norm, double p,
         int threads) {
  const nfk::AgcConfig config{clip_factor, eps, p, static_cast<nfk::Norm>(norm)};
  const std::vector<nfk::AgcTensor> tensors = table.with(grads);
  std::vector<nfk::cpu::Task> tasks;
  for (size_t i = 0; i < tensors.size(); ++i) nfk::cpu::append_tasks(tasks, i, tensors[i].units);
  const auto kernel = nfk::cpu::kernels().agc;
  nfk::cpu::run_tasks(tasks, threads, [&](const nfk::cpu::Task& task) {
    kernel(tensors[task.tensor], config, task.first, task.last);
  });
}

// clip_factor: None for gradients that are not clipped.
nfk::SgdConfig sgd_config(double lr, double momentum, double dampening, double weight_decay, double average_decay,
                          bool maximize, bool nesterov, std::optional<double> clip_factor, double eps) {
  const nfk::AgcConfig clip{clip_factor.value_or(0.0), eps, 2.0, nfk::Norm::two};
  return {lr, momentum, dampening, weight_decay, average_decay, maximize ? -1.0 : 1.0, nesterov,
          clip_factor.has_value(), clip};
}

// `value`, times the float32 at an address, if there is one.
double times(double value, int64_t address) {
  return address ? value * *static_cast<const float*>(pointer(address)) : value;
}

// As the CUDA kernels do it, the scalars are read when the step runs: learning rates, of which each multiplies its group's,
// the loss scale, and found_inf, which lets nothing happen unless it is 0. Addresses of 0: none.
void sgd_agc(const nfk::SgdTable& table, const nfk::Addresses& grads, std::vector<nfk::SgdConfig> configs,
             const Ints& lrs, int64_t grad_scale, int64_t found_inf, int threads) {
  if (found_inf && times(1.0, found_inf) != 0.0) return;
  for (size_t i = 0; i < configs.size(); ++i) {
    configs[i].lr = times(configs[i].lr, lrs[i]);
    configs[i].grad_factor /= times(1.0, grad_scale);
  }
  const std::vector<nfk::SgdTensor> tensors = table.with(grads);
  std::vector<nfk::cpu::Task> tasks;
  for (size_t i = 0; i < tensors.size(); ++i) nfk::cpu::append_tasks(tasks, i, tensors[i].units);
  const auto kernel = nfk::cpu::kernels().sgd_agc;
  nfk::cpu::run_tasks(tasks, threads, [&](const nfk::cpu::Task& task) {
    kernel(tensors[task.tensor], configs[tensors[task.tensor].group], task.first, task.last);
  });
}

// One row per weight: weight, gain, out, grad_out, grad_weight, grad_gain, weight dtype, out dtype, units, unit length,
// columns, transposed.
nfk::WeightTable weight_table(const std::vector<std::array<int64_t, 12>>& rows, const std::vector<double>& scales) {
  nfk::WeightTable table;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& row = rows[i];
    table.tensors.push_back({pointer(row[0]), pointer(row[1]), pointer(row[2]), pointer(row[3]), pointer(row[4]),
                             pointer(row[5]), static_cast<DType>(row[6]), static_cast<DType>(row[7]), {row[8], row[9]},
                             row[10], row[11] != 0, scales[i]});
  }
  return table;
}

// Null where the table has to be made row by row; types: torch.Tensor and torch.nn.Parameter.
std::unique_ptr<nfk::WeightTable> read_weights(const py::object& exchange_api, const py::tuple& types,
                                               const py::list& weights, const py::list& gains, const py::list& scales,
                                               const py::list& outs, const py::list& grad_weights,
                                               const py::list& grad_gains) {
  const nfk::Describe how = nfk::describe_of(exchange_api);
  if (!how) return nullptr;
  const nfk::WeightReader reader(how, PyTuple_GET_ITEM(types.ptr(), 0), PyTuple_GET_ITEM(types.ptr(), 1));
  return reader.read({weights, gains, scales, outs, grad_weights, grad_gains});
}

void weight_standardize(const nfk::WeightTable& table, double eps, int eps_form, bool backward, int threads) {
  const auto& tensors = table.tensors;
  std::vector<nfk::cpu::Task> tasks;
  for (size_t i = 0; i < tensors.size(); ++i) nfk::cpu::append_tasks(tasks, i, tensors[i].units);
  const auto form = static_cast<nfk::EpsForm>(eps_form);
  const auto& kernels = nfk::cpu::kernels();
  const auto kernel = backward ? kernels.weight_standardize_backward : kernels.weight_standardize;
  nfk::cpu::run_tasks(tasks, threads, [&](const nfk::cpu::Task& task) {
    kernel(tensors[task.tensor], eps, form, task.first, task.last);
  });
}

// grad = 0: forward.
void scaled_activation(int64_t x, int64_t grad, int64_t out, int dtype, int64_t elements, int activation, double scale,
                       int threads) {
  const nfk::ActivationTensor tensor{pointer(x), pointer(grad), pointer(out), static_cast<DType>(dtype)};
  std::vector<nfk::cpu::Task> tasks;
  nfk::cpu::append_tasks(tasks, 0, {elements, 1});
  const auto& kernels = nfk::cpu::kernels();
  const auto kernel = grad ? kernels.scaled_activation_backward : kernels.scaled_activation;
  nfk::cpu::run_tasks(tasks, threads, [&](const nfk::cpu::Task& task) {
    kernel(tensor, static_cast<nfk::Activation>(activation), scale, task.first, task.last);
  });
}

// Addresses in the order of ResidualTensor, 0 for what is absent; grad_shortcut = 0: forward.
void residual(const std::array<int64_t, 13>& p, int dtype, int64_t samples, int64_t channels, int64_t space,
              bool channels_last, int64_t block_pixels, int activation, double scale, int threads) {
  const nfk::ResidualTensor tensor{pointer(p[0]),  pointer(p[1]),  pointer(p[2]),  pointer(p[3]),
                                   pointer(p[4]),  pointer(p[5]),  pointer(p[6]),  pointer(p[7]),
                                   pointer(p[8]),  pointer(p[9]),  pointer(p[10]), pointer(p[11]),
                                   pointer(p[12]), static_cast<DType>(dtype),      samples,
                                   channels,       space,          channels_last,  block_pixels};
  std::vector<nfk::cpu::Task> tasks;
  nfk::cpu::append_tasks(tasks, 0, nfk::residual_units(tensor));
  const auto& kernels = nfk::cpu::kernels();
  const auto kernel = tensor.grad_shortcut ? kernels.residual_backward : kernels.residual;
  nfk::cpu::run_tasks(tasks, threads, [&](const nfk::cpu::Task& task) {
    kernel(tensor, static_cast<nfk::Activation>(activation), scale, task.first, task.last);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  // These classes serve nfnets_kernels._cuda too.
  py::class_<nfk::Addresses>(m, "Addresses")
      .def(py::init(&addresses))
      .def("__iter__", [](const nfk::Addresses& self) { return py::iter(py::cast(values(self))); });
  py::implicitly_convertible<py::list, nfk::Addresses>();
  py::class_<nfk::AgcTable>(m, "AgcTable").def(py::init(&agc_table));
  py::class_<nfk::SgdTable>(m, "SgdTable").def(py::init(&sgd_table));
  py::class_<nfk::SgdConfig>(m, "SgdConfig").def(py::init(&sgd_config), py::kw_only(), py::arg("lr"),
                                                 py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"),
                                                 py::arg("average_decay"), py::arg("maximize"), py::arg("nesterov"),
                                                 py::arg("clip_factor"), py::arg("eps"));
  py::class_<nfk::WeightTable>(m, "WeightTable").def(py::init(&weight_table)).def_static("read", &read_weights);
  py::class_<nfk::Snapshot>(m, "Snapshot")
      .def_static("take", &nfk::Snapshot::take)
      .def("gradients", &nfk::Snapshot::gradients);
  m.def("agc", &agc, release_gil());
  m.def("sgd_agc", &sgd_agc, release_gil());
  m.def("weight_standardize", &weight_standardize, release_gil());
  m.def("scaled_activation", &scaled_activation, release_gil());
  m.def("residual", &residual, release_gil());
  m.def("isa", [] { return nfk::cpu::kernels().isa; });
  m.def("select_isa", &nfk::cpu::select_isa);
  m.attr("cuda_build") = NFK_CUDA_BUILD;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
