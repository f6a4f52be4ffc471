// A unit table of what training does at every step, in two halves: what stays from step to step, and where the gradients of
// a step lie.
#pragma once

#include <vector>

#include "units.h"

namespace nfk {

struct Addresses {
  std::vector<void*> of_tensor;
};

template <class Tensor>
struct StepTable {
  std::vector<Tensor> tensors;

  // A copy for gradients at these addresses: steps of several threads may share the table.
  std::vector<Tensor> with(const Addresses& grads) const {
    std::vector<Tensor> complete = tensors;
    for (size_t i = 0; i < complete.size(); ++i) complete[i].grad = grads.of_tensor[i];
    return complete;
  }
};

using AgcTable = StepTable<AgcTensor>;
using SgdTable = StepTable<SgdTensor>;

}  // namespace nfk
