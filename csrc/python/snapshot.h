// How parameters and their gradients lie at one time, and whether they still do: what a training loop asks at each step
// before it reuses what it collected.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../step_table.h"
#include "describe.h"

namespace nfk {

// A tensor's exact type and all that DLPack says but the address.
class Layout {
 public:
  Layout(py::handle object, const dlpack::Tensor& tensor)
      : type_(Py_TYPE(object.ptr())), device_(tensor.device), dtype_(tensor.dtype),
        sizes_(tensor.shape, tensor.shape + tensor.ndim), strides_(tensor.strides, tensor.strides + tensor.ndim) {}

  // Whether the object has this layout; then `address` is where it starts. Other types are never described: a subclass
  // may show a tensor that it does not hold.
  bool matches(py::handle object, Describe how, void*& address) const {
    dlpack::Tensor tensor;
    if (Py_TYPE(object.ptr()) != type_ || !describe(how, object, tensor)) return false;
    address = tensor.data;
    return tensor.byte_offset == 0 && tensor.device == device_ && tensor.dtype == dtype_ &&
           equal(sizes_, tensor.shape, tensor.ndim) && equal(strides_, tensor.strides, tensor.ndim);
  }

 private:
  static bool equal(const std::vector<int64_t>& known, const int64_t* values, int32_t count) {
    return known.size() == static_cast<size_t>(count) && std::equal(known.begin(), known.end(), values);
  }

  PyTypeObject* type_;  // borrowed: torch.Tensor and torch.nn.Parameter outlive us
  dlpack::Device device_;
  dlpack::DataType dtype_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> strides_;
};

class Snapshot {
 public:
  // Null where the API is none that we know, or cannot describe a tensor. A gradient, and a parameter that has one, is
  // exactly a torch.Tensor or torch.nn.Parameter.
  static std::unique_ptr<Snapshot> take(const py::list& parameters, const py::object& exchange_api) {
    const Describe how = describe_of(exchange_api);
    if (!how) return nullptr;
    std::unique_ptr<Snapshot> snapshot(new Snapshot(how));
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (!snapshot->add(parameters[i])) return nullptr;
    }
    return snapshot;
  }

  // The gradients that are not None, and their addresses; nothing where these are other parameters, a parameter's memory
  // or layout changed, or a gradient's layout did.
  std::optional<std::pair<py::list, Addresses>> gradients(const py::list& parameters) const {
    if (parameters.size() != entries_.size()) return std::nullopt;
    py::list grads(grad_count_);
    Addresses addresses;
    addresses.of_tensor.reserve(grad_count_);
    for (size_t i = 0; i < entries_.size(); ++i) {
      const py::object parameter = parameters[i];
      const Entry& entry = entries_[i];
      if (parameter.ptr() != entry.parameter) return std::nullopt;
      py::object grad = grad_of(parameter);
      if (grad.is_none() != !entry.layouts) return std::nullopt;
      if (!entry.layouts) continue;
      const auto& [of_parameter, of_grad] = *entry.layouts;
      void* address;
      if (!of_parameter.matches(parameter, how_, address) || address != entry.address) return std::nullopt;
      if (!of_grad.matches(grad, how_, address)) return std::nullopt;
      PyList_SET_ITEM(grads.ptr(), static_cast<py::ssize_t>(addresses.of_tensor.size()), grad.release().ptr());
      addresses.of_tensor.push_back(address);
    }
    return std::make_pair(std::move(grads), std::move(addresses));
  }

 private:
  struct Entry {
    PyObject* parameter;  // for its identity; borrowed, so that no cycle of references runs through here
    void* address;
    std::optional<std::pair<Layout, Layout>> layouts;  // of parameter and gradient, where there is one
  };

  explicit Snapshot(Describe how) : how_(how) {}

  static py::object grad_of(py::handle parameter) {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    PyObject* grad = PyObject_GetAttr(parameter.ptr(), name);
    if (!grad) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

  bool add(const py::object& parameter) {
    const py::object grad = grad_of(parameter);
    Entry entry{parameter.ptr(), nullptr, std::nullopt};
    if (!grad.is_none()) {
      dlpack::Tensor of_parameter, of_grad;
      if (!describe(how_, parameter, of_parameter) || !describe(how_, grad, of_grad)) return false;
      entry.address = of_parameter.data;
      entry.layouts.emplace(Layout(parameter, of_parameter), Layout(grad, of_grad));
      ++grad_count_;
    }
    entries_.push_back(std::move(entry));
    return true;
  }

  Describe how_;
  std::vector<Entry> entries_;
  size_t grad_count_ = 0;
};

}  // namespace nfk
