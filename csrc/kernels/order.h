// The order in which a Team visits a unit whose two sides are laid out alike (Linear) or transposed against each other.
// Element i of the first side is element j of the second.
#pragma once

#include <cstdint>

namespace nfk {
namespace {

struct Linear {  // i = j = 0 .. n-1
  int64_t n;
};

struct Transposed {  // i = row * columns + column, j = column * rows + row
  int64_t rows;
  int64_t columns;
};

}  // namespace
}  // namespace nfk
