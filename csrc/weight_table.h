// The unit table of weight_standardize.
#pragma once

#include <vector>

#include "units.h"

namespace nfk {

struct WeightTable {
  std::vector<WeightTensor> tensors;
};

}  // namespace nfk
