// The pybind11 module nfnets_kernels._cuda. Python checks every argument (nfnets_kernels/ops); here pointers are trusted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../step_table.h"
#include "../weight_table.h"
#include "ops.h"

namespace py = pybind11;

namespace {

using Ints = std::vector<int64_t>;

void* pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<intptr_t>(address)); }

const float* scalar(int64_t address) { return static_cast<const float*>(pointer(address)); }

void agc(const nfk::AgcTable& table, const nfk::Addresses& grads, double clip_factor, double eps, int norm, double p,
         int device, int64_t stream) {
  nfk::cuda::agc(table.with(grads), {clip_factor, eps, p, static_cast<nfk::Norm>(norm)}, {device, pointer(stream)});
}

// Addresses of 0: none.
void sgd_agc(const nfk::SgdTable& table, const nfk::Addresses& grads, const std::vector<nfk::SgdConfig>& configs,
             const Ints& lrs, int64_t grad_scale, int64_t found_inf, int device, int64_t stream) {
  nfk::cuda::SgdScalars scalars{{}, scalar(grad_scale), scalar(found_inf)};
  for (const int64_t lr : lrs) scalars.lrs.push_back(scalar(lr));
  nfk::cuda::sgd_agc(table.with(grads), configs, scalars, {device, pointer(stream)});
}

void weight_standardize(const nfk::WeightTable& table, double eps, int eps_form, bool backward, int device,
                        int64_t stream) {
  const auto run = backward ? nfk::cuda::weight_standardize_backward : nfk::cuda::weight_standardize;
  run(table.tensors, eps, static_cast<nfk::EpsForm>(eps_form), {device, pointer(stream)});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::module_::import("nfnets_kernels._C");  // has the classes of these functions' arguments
  m.def("agc", &agc, release_gil());
  m.def("sgd_agc", &sgd_agc, release_gil());
  m.def("weight_standardize", &weight_standardize, release_gil());
  m.def("obstacle", &nfk::cuda::obstacle, release_gil());
}
