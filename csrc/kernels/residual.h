// The end of a residual block and the start of the next one, on one run of elements (Brock et al. 2021, section 3):
//   h = factor * f + shortcut,  a = scale * act(h),  factor = alpha * skip_gain * keep * gate per sample and channel.
#pragma once

#include "scaled_activation.h"

namespace nfk {
namespace {

// How `factor` varies along a run. In contiguous order a run is one channel, in channels_last order one pixel.
struct One {
  NFK_INLINE float operator()(int64_t) const { return 1.0f; }
};
template <class Acc>
struct PerRun {
  Acc value;
  NFK_INLINE Acc operator()(int64_t) const { return value; }
};
template <class Acc>
struct PerElement {
  const Acc* values;
  NFK_INLINE Acc operator()(int64_t i) const { return values[i]; }
};

// The activation sees h as stored, so that a backward pass that recomputes from h agrees with it. Two loops, over pieces that
// stay in the first-level cache: GCC does not vectorize one loop with two outputs of bfloat16.
template <Activation A, class Team, class T, class Factor>
NFK_INLINE void residual_run(const Team& team, const T* f, const T* shortcut, T* h, T* a, int64_t n, double scale,
                             Factor factor) {
  using Acc = typename Accumulate<T>::type;
  constexpr int64_t kPiece = 2048;
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t length = n - start < kPiece ? n - start : kPiece;
    team.each(length, [=](int64_t j) {
      const int64_t i = start + j;
      h[i] = store<T>(load(f[i]) * static_cast<Acc>(factor(i)) + load(shortcut[i]));
    });
    activate<A>(team, h + start, a + start, length, scale);
  }
}

// Gradient of h from both of its uses; `saved` is h, or ReLU's output.
template <Activation A, class T>
struct StreamGradient {
  using Acc = typename Accumulate<T>::type;
  const T* grad_h;
  const T* grad_a;
  const T* saved;
  Acc scale;
  NFK_INLINE Acc operator()(int64_t i) const {
    return load(grad_h[i]) + Function<A>::backward(scale * load(grad_a[i]), load(saved[i]));
  }
};

template <class Team, class T, class Gradient>
NFK_INLINE void residual_backward_run(const Team& team, Gradient gradient, T* grad_shortcut, int64_t n) {
  team.each(n, [=](int64_t i) { grad_shortcut[i] = store<T>(gradient(i)); });
}

template <class Team, class T, class Gradient, class Factor>
NFK_INLINE void residual_backward_run(const Team& team, Gradient gradient, T* grad_shortcut, T* grad_f, int64_t n,
                                      Factor factor) {
  team.each(n, [=](int64_t i) {
    const auto grad = gradient(i);
    grad_shortcut[i] = store<T>(grad);
    grad_f[i] = store<T>(grad * factor(i));
  });
}

}  // namespace
}  // namespace nfk
