// The elements of a unit, and the order in which a Team visits them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "number.h"

namespace nfk {
namespace {

// n elements one behind the other in memory.
template <class T>
struct Run {
  using value_type = std::remove_const_t<T>;

  T* data;
  int64_t n;

  NFK_INLINE T& operator[](int64_t i) const { return data[i]; }
  NFK_INLINE int64_t range() const { return n; }
};

// Two sides of a unit that are laid out alike, or transposed against each other: element i of the first side is element j
// of the second.
struct Linear {  // i = j = 0 .. n-1
  int64_t n;
};

struct Transposed {  // i = row * columns + column, j = column * rows + row
  int64_t rows;
  int64_t columns;
};

}  // namespace
}  // namespace nfk
