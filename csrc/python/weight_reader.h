// The table of weight_standardize, read from Python's tensors in some 0.1 us each. nfnets_kernels/ops/weight_standardize.py
// checks and writes it where this declines, in some 5 us a weight.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "../weight_table.h"
#include "describe.h"

namespace nfk {

// Python lists of one entry per weight; all but `weights` and `scales` may be empty.
struct WeightLists {
  py::list weights;
  py::list gains;
  py::list scales;
  py::list outs;  // or, where there are gradients to write, those of the outputs
  py::list grad_weights;
  py::list grad_gains;
};

class WeightReader {
 public:
  // Nothing but objects of exactly these types is described: a subclass may show a tensor that it does not hold.
  WeightReader(Describe how, PyObject* tensor_type, PyObject* parameter_type)
      : how_(how), tensor_type_(tensor_type), parameter_type_(parameter_type) {}

  // Null unless everything is valid and the kernels can take it as it lies.
  std::unique_ptr<WeightTable> read(const WeightLists& lists) const {
    const size_t count = lists.weights.size();
    for (const auto* list : {&lists.gains, &lists.outs, &lists.grad_weights, &lists.grad_gains}) {
      if (list->size() != 0 && list->size() != count) return nullptr;
    }
    dlpack::Tensor first;
    if (count == 0 || lists.scales.size() != count || !get(lists.weights, 0, first)) return nullptr;
    auto table = std::make_unique<WeightTable>();
    table->tensors.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const auto row = row_of(lists, i, first.device);
      if (!row) return nullptr;
      table->tensors.push_back(*row);
    }
    return table;
  }

 private:
  enum class Order { contiguous, channels_last, other };

  // The list's tensor, if it is plain and has memory.
  bool get(const py::list& list, size_t i, dlpack::Tensor& tensor) const {
    PyObject* object = PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(i));
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return (type == tensor_type_ || type == parameter_type_) && describe(how_, object, tensor) && tensor.data &&
           tensor.byte_offset == 0;
  }

  static std::optional<DType> dtype_of(const dlpack::Tensor& tensor) {
    constexpr int kFloat = 2, kBfloat = 4;  // DLDataTypeCode
    const auto [code, bits, lanes] = tensor.dtype;
    if (lanes != 1) return std::nullopt;
    if (code == kBfloat && bits == 16) return DType::bfloat16;
    if (code != kFloat) return std::nullopt;
    if (bits == 16) return DType::float16;
    if (bits == 32) return DType::float32;
    return bits == 64 ? std::optional(DType::float64) : std::nullopt;
  }

  static int64_t elements(const dlpack::Tensor& tensor, int first_dim = 0) {
    int64_t count = 1;
    for (int dim = first_dim; dim < tensor.ndim; ++dim) count *= tensor.shape[dim];
    return count;
  }

  // Whether dims lie dense in this order, the innermost first; strides of dims of size 1 do not tell.
  template <class DimAt>
  static bool is_dense(const dlpack::Tensor& tensor, DimAt dim_at) {
    int64_t expected = 1;
    for (int i = 0; i < tensor.ndim; ++i) {
      const int dim = dim_at(i);
      if (tensor.shape[dim] == 1) continue;
      if (tensor.strides[dim] != expected) return false;
      expected *= tensor.shape[dim];
    }
    return true;
  }

  // As `is_channels_last` and `is_unit_dense` of nfnets_kernels/ops/library.py.
  static Order order_of(const dlpack::Tensor& tensor) {
    const int last = tensor.ndim - 1;
    if (is_dense(tensor, [=](int i) { return last - i; })) return Order::contiguous;
    if (tensor.ndim != 4 && tensor.ndim != 5) return Order::other;
    const auto channels_first = [=](int i) { return i == 0 ? 1 : i == last ? 0 : last + 1 - i; };
    return is_dense(tensor, channels_first) ? Order::channels_last : Order::other;
  }

  static bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
  }

  std::optional<WeightTensor> row_of(const WeightLists& lists, size_t i, const dlpack::Device& device) const {
    dlpack::Tensor weight;
    if (!get(lists.weights, i, weight) || weight.ndim < 2 || !(weight.device == device)) return std::nullopt;
    const auto dtype = dtype_of(weight);
    const Order order = order_of(weight);
    const int64_t length = elements(weight, 1);
    PyObject* scale = PyList_GET_ITEM(lists.scales.ptr(), static_cast<py::ssize_t>(i));
    if (!dtype || order == Order::other || length < 2 || weight.shape[0] == 0) return std::nullopt;
    if (!PyFloat_Check(scale) || !std::isfinite(PyFloat_AS_DOUBLE(scale))) return std::nullopt;
    WeightTensor row{};
    row.weight = weight.data;
    row.weight_dtype = row.out_dtype = *dtype;
    row.units = {weight.shape[0], length};
    row.columns = order == Order::channels_last ? weight.shape[1] : elements(weight, 2);
    row.scale = PyFloat_AS_DOUBLE(scale);
    return add_gain(row, lists, i, weight) && add_out(row, lists, i, weight) ? std::optional(row) : std::nullopt;
  }

  bool add_gain(WeightTensor& row, const WeightLists& lists, size_t i, const dlpack::Tensor& weight) const {
    const auto fits = [&](const py::list& list, dlpack::Tensor& tensor) {
      return get(list, i, tensor) && tensor.dtype == weight.dtype && tensor.device == weight.device &&
             elements(tensor) == row.units.count && order_of(tensor) == Order::contiguous;
    };
    dlpack::Tensor gain, grad_gain;
    if (lists.gains.size() == 0) return lists.grad_gains.size() == 0;
    if (!fits(lists.gains, gain)) return false;
    row.gain = gain.data;
    if (lists.grad_weights.size() == 0) return true;
    if (lists.grad_gains.size() == 0 || !fits(lists.grad_gains, grad_gain)) return false;
    row.grad_gain = grad_gain.data;
    return true;
  }

  bool add_out(WeightTensor& row, const WeightLists& lists, size_t i, const dlpack::Tensor& weight) const {
    if (lists.outs.size() == 0) return true;
    dlpack::Tensor out, grad_weight;
    if (!get(lists.outs, i, out) || !(out.device == weight.device) || !same_shape(out, weight)) return false;
    const auto dtype = dtype_of(out);
    const Order order = order_of(out), weight_order = order_of(weight);
    if (!dtype || order == Order::other) return false;
    row.out_dtype = *dtype;
    row.transposed = order != weight_order;
    if (lists.grad_weights.size() == 0) {
      row.out = out.data;
      return true;
    }
    if (!get(lists.grad_weights, i, grad_weight) || !(grad_weight.dtype == weight.dtype) ||
        !(grad_weight.device == weight.device) || !same_shape(grad_weight, weight) ||
        order_of(grad_weight) != weight_order) {
      return false;
    }
    row.grad_out = out.data;
    row.grad_weight = grad_weight.data;
    return true;
  }

  Describe how_;
  PyObject* tensor_type_;  // borrowed: torch.Tensor and torch.nn.Parameter outlive us
  PyObject* parameter_type_;
};

}  // namespace nfk
