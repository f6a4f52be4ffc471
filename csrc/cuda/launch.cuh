// Tables of tensors by value in a kernel's arguments, and the launch of their blocks.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"
#include "team.cuh"

namespace nfk {
namespace cuda {
namespace {

// Bytes of a kernel's arguments: 32,764 on sm_70 and newer since CUDA 12.1.
constexpr size_t kArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;

struct Place {
  int tensor;
  int block;  // of this tensor
};

// Rows of tensors, each with the number `end` of the first block behind its own; Common is what they share.
template <class Row, class Common>
struct Table {
  static constexpr int kRows = (kArgumentBytes - sizeof(Common) - alignof(Row)) / sizeof(Row);

  Common common;
  int size;
  Row rows[kRows];

  // By bisection: 10 steps, 0.3 us of a block's life of some microseconds, where several blocks share a multiprocessor.
  __device__ Place find(int block) const {
    int low = 0, high = size - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (block < rows[middle].end) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return {low, low == 0 ? block : block - rows[low - 1].end};
  }
};

// Makes a device current, and the last one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (before_ != device_ && before_ >= 0) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int device_;
  int before_ = -1;
  cudaError_t status_;
};

// Throws std::runtime_error if the launch fails; nothing is waited for.
template <class Argument>
void launch(const char* op, void (*kernel)(Argument), int blocks, Queue queue, const std::decay_t<Argument>& argument) {
  const DeviceGuard guard(queue.device);
  cudaError_t status = guard.status();
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kBlock);
    config.stream = static_cast<cudaStream_t>(queue.stream);
    status = cudaLaunchKernelEx(&config, kernel, argument);
  }
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would see this error as its own
  throw std::runtime_error(std::string("CUDA kernel ") + op + " failed on device " + std::to_string(queue.device) +
                           " with a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(kBlock) +
                           " threads: " + cudaGetErrorString(status));
}

// Below 2^30, so that sums of a count and a block's units stay an int.
inline int checked_count(const char* op, Units units) {
  if (units.count > 1 << 30) throw std::length_error(std::string(op) + ": a tensor has more than 2^30 units");
  return static_cast<int>(units.count);
}

// Collects rows and launches their table when it is full.
template <class Row, class Common>
class Launcher {
 public:
  static_assert(sizeof(Table<Row, Common>) <= kArgumentBytes, "a table is a kernel's argument");
  using Kernel = void (*)(const Table<Row, Common> __grid_constant__);

  Launcher(const char* op, Kernel kernel, const Common& common, Queue queue) : op_(op), kernel_(kernel), queue_(queue) {
    table_.common = common;
    table_.size = 0;
  }

  void add(Row row, int64_t blocks) {
    if (table_.size == Table<Row, Common>::kRows || blocks > INT_MAX - end()) flush();
    row.end = end() + static_cast<int>(blocks);
    table_.rows[table_.size++] = row;
  }

  void flush() {
    if (table_.size > 0) launch(op_, kernel_, end(), queue_, table_);
    table_.size = 0;
  }

 private:
  int end() const { return table_.size == 0 ? 0 : table_.rows[table_.size - 1].end; }

  const char* op_;
  Kernel kernel_;
  Queue queue_;
  Table<Row, Common> table_;
};

// Calls f(value of the first dtype, value of the second, tensors of this pair) for the pairs that occur; dtypes_of(tensor)
// is a tensor's pair.
template <class Tensor, class DTypes, class F>
void each_pair_of_dtypes(const std::vector<Tensor>& tensors, DTypes dtypes_of, F f) {
  std::map<std::pair<DType, DType>, std::vector<const Tensor*>> pairs;
  for (const Tensor& tensor : tensors) {
    if (tensor.units.count > 0 && tensor.units.length > 0) pairs[dtypes_of(tensor)].push_back(&tensor);
  }
  for (const auto& pair : pairs) {
    visit(pair.first.first, [&](auto first) { visit(pair.first.second, [&](auto second) { f(first, second, pair.second); }); });
  }
}

// How a tensor's units are shared out, decided alike by the host, which counts blocks, and by the kernel.
enum class Share { warp, block, long_unit };

// `groups` that a thread holds: a unit of `n` elements in groups of `elements`, whose first may begin before it.
NFK_INLINE Share share_of(int64_t n, int elements, int groups, bool aligned) {
  const int64_t span = aligned ? n : n + elements - 1;
  if (span <= static_cast<int64_t>(kWarp) * elements * groups) return Share::warp;
  return span <= static_cast<int64_t>(kBlock) * elements * groups ? Share::block : Share::long_unit;
}

NFK_INLINE int64_t blocks_of(Share share, int64_t units) {
  return share == Share::warp ? (units + kWarps - 1) / kWarps : units;
}

// What a thread works on, and with whom. The unit may be one behind the last.
struct Work {
  Team team;
  int unit;

  __device__ Work(Share share, int block)
      : team(share == Share::warp ? Team::warp() : Team::block()),
        unit(share == Share::warp ? block * kWarps + static_cast<int>(threadIdx.x) / kWarp : block) {}
};

// Units of a single element that a block gets, and each of its threads one at a time.
constexpr int kSingles = 4 * kBlock;

inline int64_t blocks_of_singles(int64_t units) { return (units + kSingles - 1) / kSingles; }

// Calls f(unit) for those of a thread.
template <class F>
__device__ void each_single(int block, int units, F f) {
  for (int i = 0; i < kSingles / kBlock; ++i) {
    const int unit = block * kSingles + i * kBlock + threadIdx.x;
    if (unit < units) f(unit);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace nfk
