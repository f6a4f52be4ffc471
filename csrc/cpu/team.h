// The Team of one: a single thread, vectorized. `omp simd` lets the compiler reorder the sums, nothing else.
#pragma once

#include <cstdint>

#include "../kernels/number.h"
#include "../kernels/order.h"

namespace nfk {
namespace {

struct Team {
  // Sums in 64 lanes, four AVX-512 vectors, hide the latency of the adder; reading the unit front to back keeps the
  // prefetcher on one stream, also from unit to unit.
  template <class Acc, class F>
  NFK_INLINE Acc sum(int64_t n, F f) const {
    constexpr int64_t kLanes = 64;
    Acc lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += f(i + lane);
    }
#pragma omp simd
    for (int64_t lane = 0; lane < n - i; ++lane) lanes[lane] += f(i + lane);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
#pragma omp simd
      for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
  }

  template <class Acc, class F>
  NFK_INLINE Acc sum(Linear order, F f) const {
    return sum<Acc>(order.n, [f](int64_t i) { return f(i, i); });
  }

  template <class Acc, class F>
  NFK_INLINE Acc sum(Transposed order, F f) const {
    Acc total = 0;
    for (int64_t column = 0; column < order.columns; ++column) {
      const int64_t rows = order.rows, columns = order.columns;
      total += sum<Acc>(rows, [=](int64_t row) { return f(row * columns + column, column * rows + row); });
    }
    return total;
  }

  // A NaN, once met, stays.
  template <class Acc, class F>
  NFK_INLINE Acc max(int64_t n, F f) const {
    Acc largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = larger(static_cast<Acc>(f(i)), largest);
    return largest;
  }

  // Calls f(value), by one thread for all.
  template <class T, class F>
  NFK_INLINE void update(T* value, F f) const {
    f(*value);
  }

  template <class F>
  NFK_INLINE void each(int64_t n, F f) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  template <class F>
  NFK_INLINE void each(Linear order, F f) const {
    each(order.n, [f](int64_t i) { f(i, i); });
  }

  template <class F>
  NFK_INLINE void each(Transposed order, F f) const {
    const int64_t rows = order.rows, columns = order.columns;
    for (int64_t row = 0; row < rows; ++row) {
      each(columns, [=](int64_t column) { f(row * columns + column, column * rows + row); });
    }
  }
};

}  // namespace
}  // namespace nfk
