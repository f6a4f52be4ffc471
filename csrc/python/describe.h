// Tensors as they lie in memory, asked of DLPack's exchange API.
#pragma once

#include <pybind11/pybind11.h>

#include "../dlpack.h"

namespace nfk {

namespace py = pybind11;
using Describe = decltype(dlpack::ExchangeApi::describe);

// Null where the API is none that we know, or cannot describe a tensor.
inline Describe describe_of(const py::object& exchange_api) {
  if (!PyCapsule_IsValid(exchange_api.ptr(), dlpack::kCapsuleName)) return nullptr;
  const void* api = PyCapsule_GetPointer(exchange_api.ptr(), dlpack::kCapsuleName);
  return dlpack::find_describe(static_cast<const dlpack::Header*>(api));
}

// False for what is sparse, quantized, on a device that DLPack does not know, ...
inline bool describe(Describe how, py::handle object, dlpack::Tensor& tensor) {
  if (how(object.ptr(), &tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

inline bool operator==(const dlpack::Device& a, const dlpack::Device& b) {
  return a.type == b.type && a.index == b.index;
}

inline bool operator==(const dlpack::DataType& a, const dlpack::DataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

}  // namespace nfk
