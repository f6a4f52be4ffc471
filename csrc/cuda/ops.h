// The multi-tensor ops on an NVIDIA GPU. Tensors are described as in units.h; their pointers are device memory.
#pragma once

#include <string>
#include <vector>

#include "../kernels/sgd_agc.h"
#include "../kernels/weight_standardize.h"
#include "../units.h"

namespace nfk {
namespace cuda {

// Where kernels are queued: a device's index, and the caller's cudaStream_t on it.
struct Queue {
  int device;
  void* stream;
};

// Why no kernel of this library runs on a device, such as one that it holds no code for; empty: they do.
std::string obstacle(int device);

// Where a step's scalars lie, in device memory, which kernels read when they run; null: none.
struct SgdScalars {
  std::vector<const float*> lrs;  // of each parameter group; multiplies its learning rate
  const float* grad_scale;        // the loss scale, by which gradients are divided
  const float* found_inf;         // lets nothing happen unless it is 0
};

// Each queues one kernel per pair of dtypes and per table of tensors, allocates nothing and waits for nothing. Throws
// std::runtime_error, with op, grid and device in its message, where a launch fails. Tensors without elements are allowed.
void agc(const std::vector<AgcTensor>& tensors, const AgcConfig& config, Queue queue);
void sgd_agc(const std::vector<SgdTensor>& tensors, const std::vector<SgdConfig>& configs, const SgdScalars& scalars,
             Queue queue);
void weight_standardize(const std::vector<WeightTensor>& tensors, double eps, EpsForm form, Queue queue);
void weight_standardize_backward(const std::vector<WeightTensor>& tensors, double eps, EpsForm form, Queue queue);

}  // namespace cuda
}  // namespace nfk
