// AGC's unit table in two halves: what stays from step to step, and where the gradients of a step lie.
#pragma once

#include <vector>

#include "units.h"

namespace nfk {

struct Addresses {
  std::vector<void*> of_tensor;
};

struct AgcTable {
  std::vector<AgcTensor> tensors;

  // A copy for gradients at these addresses: steps of several threads may share the table.
  std::vector<AgcTensor> with(const Addresses& grads) const {
    std::vector<AgcTensor> complete = tensors;
    for (size_t i = 0; i < complete.size(); ++i) complete[i].grad = grads.of_tensor[i];
    return complete;
  }
};

}  // namespace nfk
