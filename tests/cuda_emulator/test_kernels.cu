// Small kernels for tests of the emulator itself: one that is right, and one with each fault that it has to find.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr unsigned kAll = 0xffffffffu, kWarp = 32;
constexpr int kSlots = 32;

struct Params {
  const float* in;
  float* out;
  int64_t n;
};

template <class T>
__device__ T warp_sum(T value) {
  for (int lane_mask = kWarp / 2; lane_mask > 0; lane_mask /= 2) value += __shfl_xor_sync(kAll, value, lane_mask);
  return value;
}

// All threads get the sum of `value` over the block.
__device__ float block_sum(float value) {
  __shared__ float partial[kWarp];
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? partial[lane] : 0.0f);
  __syncthreads();
  return value;
}

// Block i writes the sum of row i of n elements.
__global__ void __launch_bounds__(1024) sum_rows(const Params __grid_constant__ params) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < params.n; i += blockDim.x) sum += __ldg(params.in + blockIdx.x * params.n + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) __stwb(params.out + blockIdx.x, sum);
}

// Four elements per thread, and vectors of two at the end.
__global__ void copy_vectors(const Params __grid_constant__ params) {
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  if (i + 4 <= params.n) {
    __stwb(reinterpret_cast<uint4*>(params.out + i), __ldg(reinterpret_cast<const uint4*>(params.in + i)));
  } else if (i + 2 <= params.n) {
    __stwb(reinterpret_cast<uint2*>(params.out + i), __ldg(reinterpret_cast<const uint2*>(params.in + i)));
  }
}

// Thread i writes what each type of shuffle brings it from lane i ^ 1 and from lane 5, as a sum.
__global__ void shuffle_types(const Params __grid_constant__ params) {
  const int lane = threadIdx.x % kWarp;
  const double wide = __shfl_xor_sync(kAll, lane + 0.5, 1) + __shfl_sync(kAll, lane + 0x1p-30, 5);
  const int negative = __shfl_xor_sync(kAll, -lane, 1) + __shfl_sync(kAll, -lane, 5);
  const unsigned large = __shfl_xor_sync(kAll, ~0u - lane, 1) - __shfl_sync(kAll, ~0u, 5);
  __syncwarp();
  const bool exact = wide == (lane ^ 1) + 5.5 + 0x1p-30 && large == 0u - (lane ^ 1);
  __stwb(params.out + threadIdx.x, exact ? static_cast<float>(negative) : -1000.0f);
}

// Twenty shuffles per thread, for a benchmark.
__global__ void shuffle_often(const Params __grid_constant__ params) {
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < 4; ++i) value = warp_sum(value) / kWarp;
  __stwb(params.out + blockIdx.x * blockDim.x + threadIdx.x, value);
}

__global__ void write_twice(const Params __grid_constant__ params) {
  __stwb(params.out + (threadIdx.x == 7 ? 6 : threadIdx.x), 1.0f);
}

__global__ void read_what_was_written(const Params __grid_constant__ params) {
  if (threadIdx.x == 0) __stwb(params.out, 1.0f);
  __syncthreads();
  if (threadIdx.x == 33) __stwb(params.out + 1, __ldg(params.out));
}

// Thread 0 tells the others a number, but nobody waits until it is there.
__global__ void tell_without_barrier(const Params __grid_constant__ params) {
  __shared__ float told;
  if (threadIdx.x == 0) told = __ldg(params.in);
  __stwb(params.out + threadIdx.x, told);
}

// Thread 0 does not wait until the others have read the first number.
__global__ void tell_the_next_too_soon(const Params __grid_constant__ params) {
  __shared__ float told;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) told = __ldg(params.in + i);
    __syncthreads();
    __stwb(params.out + i * blockDim.x + threadIdx.x, told);
  }
}

// Every lane takes over the number of its neighbour without waiting for it.
__global__ void pass_on_without_barrier(const Params __grid_constant__ params) {
  __shared__ float numbers[kWarp];
  numbers[threadIdx.x] = __ldg(params.in + threadIdx.x);
  __stwb(params.out + threadIdx.x, numbers[(threadIdx.x + params.n) % kWarp]);
}

__global__ void end_before_barrier(const Params) {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void part_at_two_barriers(const Params) {
  if (threadIdx.x < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_warp_at_barrier(const Params __grid_constant__ params) {
  if (threadIdx.x % kWarp < 16) {
    __syncthreads();
  } else {
    __stwb(params.out + threadIdx.x, warp_sum(1.0f));
  }
}

__global__ void end_before_shuffle(const Params __grid_constant__ params) {
  if (threadIdx.x % kWarp == 31) return;
  __stwb(params.out + threadIdx.x, warp_sum(1.0f));
}

__global__ void shuffle_in_two_branches(const Params __grid_constant__ params) {
  float value = 1.0f;
  if (threadIdx.x % 2) {
    value = __shfl_xor_sync(kAll, value, 2);
  } else {
    value = __shfl_xor_sync(kAll, value, 2);
  }
  __stwb(params.out + threadIdx.x, value);
}

__global__ void shuffle_half_a_warp(const Params __grid_constant__ params) {
  if (threadIdx.x < 16) __stwb(params.out + threadIdx.x, __shfl_xor_sync(0xffffu, 1.0f, 1));
}

__global__ void read_missing_lane(const Params __grid_constant__ params) {
  __stwb(params.out + threadIdx.x, __shfl_sync(kAll, 1.0f, 31));
}

template <class T>
__device__ T* slots() {
  __shared__ T shared[kSlots];
  return shared;
}

__global__ void overflow_shared(const Params __grid_constant__ params) {
  slots<float>()[threadIdx.x + params.n] = 1.0f;
  __syncthreads();
  __stwb(params.out + threadIdx.x, slots<float>()[threadIdx.x]);
}

__global__ void shift(const Params __grid_constant__ params) {
  __stwb(params.out + threadIdx.x, static_cast<float>(1 << params.n));
}

template <size_t n>
struct Bytes {
  char bytes[n];
};

__global__ void take_4096_bytes(const Bytes<4096> __grid_constant__) {}
__global__ void take_32764_bytes(const Bytes<32764> __grid_constant__) {}
__global__ void take_32768_bytes(const Bytes<32763> __grid_constant__, int) {}

// Message of the error, or null.
template <class... Expected, class... Actual>
const char* launch(unsigned grid, unsigned block, void (*kernel)(Expected...), const Actual&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define RUN(kernel)                                                                                           \
  EXPORT const char* run_##kernel(unsigned grid, unsigned block, const float* in, float* out, int64_t n) { \
    return launch(grid, block, kernel, Params{in, out, n});                                                   \
  }

RUN(sum_rows)
RUN(copy_vectors)
RUN(shuffle_types)
RUN(shuffle_often)
RUN(write_twice)
RUN(read_what_was_written)
RUN(tell_without_barrier)
RUN(tell_the_next_too_soon)
RUN(pass_on_without_barrier)
RUN(end_before_barrier)
RUN(part_at_two_barriers)
RUN(half_a_warp_at_barrier)
RUN(end_before_shuffle)
RUN(shuffle_in_two_branches)
RUN(shuffle_half_a_warp)
RUN(read_missing_lane)
RUN(overflow_shared)
RUN(shift)

EXPORT const char* run_take_4096_bytes() { return launch(1, 1, take_4096_bytes, Bytes<4096>{}); }
EXPORT const char* run_take_32764_bytes() { return launch(1, 1, take_32764_bytes, Bytes<32764>{}); }
EXPORT const char* run_take_32768_bytes() { return launch(1, 1, take_32768_bytes, Bytes<32763>{}, 0); }
