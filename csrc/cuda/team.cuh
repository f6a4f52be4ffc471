// Threads that share a unit: a warp, or all four warps of a block. Sums run over a thread's own elements and then over the
// threads in a fixed order, so that results are the same from run to run.
#pragma once

#include <cuda_runtime.h>

#include "../kernels/order.h"
#include "vectorize.cuh"

namespace nfk {
namespace cuda {
namespace {

constexpr int kWarp = 32;
// Four warps: the longest unit of the ResNets and NFNets, 4,608 float32, is then 36 elements, or 36 registers, a thread.
constexpr int kBlock = 128;
constexpr int kWarps = kBlock / kWarp;

struct Add {
  template <class Acc>
  NFK_INLINE Acc operator()(Acc a, Acc b) const {
    return a + b;
  }
};

struct Largest {
  template <class Acc>
  NFK_INLINE Acc operator()(Acc a, Acc b) const {
    return larger(b, a);
  }
};

template <class T, class F>
__device__ void rewrite(T* value, F f) {
  T changed = *value;
  f(changed);
  write(value, changed);
}

struct Team {
  int threads;  // kWarp or kBlock
  int thread;

  __device__ static Team warp() { return {kWarp, static_cast<int>(threadIdx.x) % kWarp}; }
  __device__ static Team block() { return {kBlock, static_cast<int>(threadIdx.x)}; }

  __device__ void wait() const {
    if (threads == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // f of all threads' values, in every thread.
  template <class Acc, class F>
  __device__ Acc combine(Acc value, F f) const {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return threads == kWarp ? value : combine_warps(value, f);
  }

  template <class Acc, class F>
  __device__ Acc sum(int64_t n, F f) const {
    return combine(strided(static_cast<Acc>(0), n, f, Add{}), Add{});
  }
  template <class Acc, class F>
  __device__ Acc sum(Linear order, F f) const {
    return sum<Acc>(order.n, [&](int64_t i) { return f(i, i); });
  }
  template <class Acc, class F>
  __device__ Acc sum(Transposed order, F f) const {
    return sum<Acc>(order.rows * order.columns, [&](int64_t i) { return f(i, across(order, i)); });
  }
  template <class Acc, class F>
  __device__ Acc max(int64_t n, F f) const {
    return combine(strided(static_cast<Acc>(0), n, f, Largest{}), Largest{});
  }
  template <class F>
  __device__ void each(int64_t n, F f) const {
    for (int64_t i = thread; i < n; i += threads) f(i);
  }
  template <class F>
  __device__ void each(Linear order, F f) const {
    each(order.n, [&](int64_t i) { f(i, i); });
  }
  template <class F>
  __device__ void each(Transposed order, F f) const {
    each(order.rows * order.columns, [&](int64_t i) { f(i, across(order, i)); });
  }

  // Calls f(value), by one thread for all.
  template <class T, class F>
  __device__ void update(T* value, F f) const {
    if (thread == 0) rewrite(value, f);
  }

  // The same for a unit whose elements have been dealt out.
  template <class Acc, class D, class F>
  __device__ Acc sum(Slots<D> slots, F f) const {
    Acc total = 0;
    slots.each([&](Slot slot) { total += f(slot); });
    return combine(total, Add{});
  }
  template <class Acc, class Order, class F, class = typename Order::SlotsOfFirst>
  __device__ Acc sum(Order order, F f) const {
    Acc total = 0;
    order.each([&](Slot slot, auto other) { total += f(slot, other); });
    return combine(total, Add{});
  }
  template <class Acc, class D, class F>
  __device__ Acc max(Slots<D> slots, F f) const {
    Acc largest = 0;
    slots.each([&](Slot slot) { largest = Largest{}(largest, f(slot)); });
    return combine(largest, Largest{});
  }
  template <class Dealt, class F, class = typename Dealt::SlotsOfFirst>
  __device__ void each(Dealt dealt, F f) const {
    dealt.each(f);
  }

 private:
  template <class Acc, class F>
  __device__ Acc combine_warps(Acc value, F f) const {
    __shared__ Acc of_warp[kWarps];
    __syncthreads();  // everyone has read the last call's
    if (thread % kWarp == 0) of_warp[thread / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = f(value, of_warp[warp]);
    return value;
  }

  template <class Acc, class F, class Join>
  __device__ Acc strided(Acc total, int64_t n, F f, Join join) const {
#pragma unroll 4
    for (int64_t i = thread; i < n; i += threads) total = join(total, f(i));
    return total;
  }

  __device__ static int64_t across(Transposed order, int64_t i) {
    return i % order.columns * order.rows + i / order.columns;
  }
};

struct OneThread {  // a Team for units of one element
  template <class Acc, class F>
  __device__ Acc sum(int64_t, F f) const {
    return f(0);
  }
  template <class Acc, class F>
  __device__ Acc max(int64_t, F f) const {
    return f(0);
  }
  template <class F>
  __device__ void each(int64_t, F f) const {
    f(0);
  }
  template <class T, class F>
  __device__ void update(T* value, F f) const {
    rewrite(value, f);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace nfk
