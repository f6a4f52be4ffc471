// What we read of DLPack's C exchange API, through which a tensor library describes its tensors to others in some 30 ns:
// no call through Python, no header of that library. DLPack fixes these layouts for all of version 1.
#pragma once

#include <cstdint>

namespace nfk {
namespace dlpack {

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  const int64_t* shape;    // of ndim sizes; may be null for ndim = 0, as strides
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Header {
  uint32_t major;
  uint32_t minor;
  const Header* previous;  // the same library's API of an older version, or null
};

struct ExchangeApi {
  Header header;
  void (*unread[3])();
  // Fills `out`, which borrows from the Python object. -1: it cannot be described, and a Python exception is set. May be
  // null.
  int (*describe)(void* object, Tensor* out);
};

constexpr char kCapsuleName[] = "dlpack_exchange_api";

// What describes tensors in the newest API of our major version, or null.
inline decltype(ExchangeApi::describe) find_describe(const Header* newest) {
  for (const Header* header = newest; header; header = header->previous) {
    if (header->major == 1) return reinterpret_cast<const ExchangeApi*>(header)->describe;
  }
  return nullptr;
}

}  // namespace dlpack
}  // namespace nfk
