// The unit table: how every multi-tensor op sees its tensors. A tensor of `count` units is `count` dense runs of `length`
// elements, one behind the other; the order of the elements inside a run is the memory format's business.
#pragma once

#include <cstdint>

namespace nfk {

// The codes of `nfnets_kernels.backend.DTYPE_CODES`.
enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct Units {
  int64_t count;
  int64_t length;
};

// What clipping has done to a unit since the counts were set to 0.
struct UnitStatistics {
  float steps;
  float clipped;  // steps in which it was clipped
  float largest;  // ratio of gradient norm to parameter norm
};

struct AgcTensor {
  const void* weight;
  void* grad;
  UnitStatistics* statistics;  // one per unit; null: nothing is counted
  DType weight_dtype;
  DType grad_dtype;
  Units units;
};

struct SgdTensor {
  void* weight;
  const void* grad;
  void* momentum;  // of the weight's dtype; null: none
  void* average;   // exponential moving average of the weight, in its accumulation type; null: none
  UnitStatistics* statistics;
  DType weight_dtype;
  DType grad_dtype;
  Units units;
  int group;  // the parameter group whose configuration holds
};

// A weight of `rows x columns` elements per unit. `transposed`: the standardized weight stores a unit as columns x rows
// (an OIHW weight prepared for a channels_last convolution, or the reverse).
struct WeightTensor {
  const void* weight;
  const void* gain;  // one per unit, of the weight's dtype; null: 1
  void* out;         // forward: the standardized weight
  const void* grad_out;
  void* grad_weight;  // backward, in the weight's layout and dtype
  void* grad_gain;    // backward; null where gain is
  DType weight_dtype;
  DType out_dtype;  // of out and grad_out
  Units units;
  int64_t columns;  // rows = units.length / columns
  bool transposed;
  double scale;
};

struct ActivationTensor {
  const void* x;     // backward: the input, or ReLU's output
  const void* grad;  // backward: gradient of the output
  void* out;         // forward: the output; backward: gradient of the input
  DType dtype;
};

// (samples, channels, space) in contiguous order, or (samples, space, channels) in channels_last order.
struct ResidualTensor {
  const void* f;         // backward: needed for sums only
  const void* shortcut;  // forward; null where h is
  void* h;               // forward; may be f; null: not stored, and the activation sees factor * f + bias unrounded
  void* a;               // forward; may be f where h is not
  const void* grad_h;    // backward, like all below; null: 0, as it must be where bias is given
  const void* grad_a;
  const void* saved;  // h, or h without its bias where bias is given, or ReLU's output
  void* grad_shortcut;
  void* grad_f;         // null where factor is
  const void* factor;   // (samples, channels) in the accumulation type; null: 1
  void* sums;           // gradient of factor, one row of channels per block of pixels; may be null
  const void* bias;     // (channels) in the accumulation type; null: 0, or for ReLU's output
  void* bias_sums;      // as sums: gradient of bias
  DType dtype;
  int64_t samples;
  int64_t channels;
  int64_t space;
  bool channels_last;
  int64_t block_pixels;  // of a channels_last tensor, whose unit is a block of so many pixels of a sample
};

inline int64_t pixel_blocks(const ResidualTensor& t) { return (t.space + t.block_pixels - 1) / t.block_pixels; }

// Whether all channels are treated alike: then the tensor is one run of elements.
inline bool is_flat(const ResidualTensor& t) { return !t.factor && !t.bias && !t.bias_sums; }

// Every element of a flat tensor is a unit; else a channel of a sample, or a block of pixels where channels lie last.
inline Units residual_units(const ResidualTensor& t) {
  if (is_flat(t)) return {t.samples * t.channels * t.space, 1};
  if (!t.channels_last) return {t.samples * t.channels, t.space};
  return {t.samples * pixel_blocks(t), t.block_pixels * t.channels};
}

}  // namespace nfk
