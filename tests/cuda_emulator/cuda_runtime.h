// A stand-in for CUDA's header of this name, with which g++ compiles csrc/cuda for the CPU. It has what our kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Blocks run one after the other, so that they can share one array; AddressSanitizer guards both of its ends.
#define __shared__ static
// Kernels take `const Params __grid_constant__ params`: by reference, up to 32 KB are not copied for every thread.
#define __grid_constant__ &

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that is running.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

struct cudaFuncAttributes {};
// cudaErrorNoKernelImageForDevice on all devices but the first.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)());

// Says what a check found where `error` is that of the calling thread's last launch.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);

namespace emulator {

// Where threads meet. Its default arguments are evaluated by the caller's caller: they name a line of the kernel.
struct Site {
  const char* function;
  const char* file;
  int line;
};

void meet_block(Site site);
void meet_warp(unsigned mask, Site site);
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, Site site);
unsigned lane();
void check_load(const void* address, size_t bytes);
void check_unwritten(const void* address, size_t bytes);
void check_store(const void* address, size_t bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes, const std::function<void()>& thread);

template <class T>
constexpr bool is_scalar = std::is_arithmetic_v<T> && !std::is_same_v<T, bool>;
template <class T>
constexpr bool is_vector = std::is_same_v<T, uint2> || std::is_same_v<T, uint4>;

template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, Site site) {
  static_assert(is_scalar<T> && sizeof(T) >= 4, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// By memcpy, as kernels see one address as elements of several types.
template <class T>
T load(const T* address) {
  static_assert(is_scalar<T> || is_vector<T>, "CUDA has no overload for this type");
  check_load(address, sizeof(T));
  T value;
  memcpy(&value, address, sizeof(T));
  return value;
}

template <class T>
void store(T* address, T value) {
  static_assert(is_scalar<T> || is_vector<T>, "CUDA has no overload for this type");
  check_store(address, sizeof(T));
  memcpy(address, &value, sizeof(T));
}

// Bytes of a kernel's parameters, each at a multiple of its alignment.
template <class... Parameters>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
  return bytes;
}

}  // namespace emulator

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::meet_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::meet_warp(mask, {"__syncwarp", file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, source_lane % 32u, {"__shfl_sync", file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, (emulator::lane() ^ lane_mask) % 32u, {"__shfl_xor_sync", file, line});
}

template <class T>
T __ldcg(const T* address) {
  return emulator::load(address);
}

template <class T>
void __stwb(T* address, T value) {
  emulator::store(address, value);
}

// Through a cache that does not see what the launch writes.
template <class T>
T __ldg(const T* address) {
  emulator::check_unwritten(address, sizeof(T));
  return __ldcg(address);
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  const auto thread = [&] { kernel(arguments...); };
  return emulator::launch(*config, emulator::parameter_bytes<std::remove_reference_t<Expected>...>(), std::ref(thread));
}
