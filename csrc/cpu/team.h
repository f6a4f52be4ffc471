// The Team of one: a single thread, vectorized. `omp simd` lets the compiler reorder the sums, nothing else.
#pragma once

#include <cstdint>

#include "../kernels/number.h"
#include "../kernels/order.h"

namespace nfk {
namespace {

struct Team {
  // Four sums over four quarters hide the latency of the adder (4 cycles on current x86).
  template <class Acc, class F>
  NFK_INLINE Acc sum(int64_t n, F f) const {
    const int64_t quarter = n / 4;
    Acc a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < quarter; ++i) {
      a += f(i);
      b += f(i + quarter);
      c += f(i + 2 * quarter);
      d += f(i + 3 * quarter);
    }
    for (int64_t i = 4 * quarter; i < n; ++i) a += f(i);
    return (a + b) + (c + d);
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
    for (int64_t i = 0; i < n; ++i) {
      const Acc value = f(i);
      largest = value > largest || value != value ? value : largest;
    }
    return largest;
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
