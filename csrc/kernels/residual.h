// The end of a residual block and the start of the next one, on one run of elements (Brock et al. 2021, section 3):
//   h = factor * f + bias + shortcut,  a = scale * act(h),
//   factor = alpha * skip_gain * keep * gate per sample and channel, bias per channel.
#pragma once

#include "scaled_activation.h"

namespace nfk {
namespace {

// How `factor` and `bias` vary along a run. In contiguous order a run is one channel, in channels_last order one pixel.
struct One {
  NFK_INLINE float operator()(int64_t) const { return 1.0f; }
};
template <class Acc>
struct PerRun {
  Acc value;
  explicit NFK_INLINE PerRun(const Acc* values) : value(*values) {}
  NFK_INLINE Acc operator()(int64_t) const { return value; }
};
template <class Acc>
struct PerElement {
  const Acc* values;
  explicit NFK_INLINE PerElement(const Acc* first) : values(first) {}
  NFK_INLINE Acc operator()(int64_t i) const { return values[i]; }
};

// The branch from f's elements: without a bias no 0 is added, which would cost a rounding.
template <class Factor>
struct Scaled {
  Factor factor;
  template <class Acc>
  NFK_INLINE Acc operator()(Acc x, int64_t i) const {
    return x * static_cast<Acc>(factor(i));
  }
};
template <class Factor, class Bias>
struct Shifted {
  Factor factor;
  Bias bias;
  template <class Acc>
  NFK_INLINE Acc operator()(Acc x, int64_t i) const {
    return x * static_cast<Acc>(factor(i)) + bias(i);
  }
};

// The activation sees h as stored, so that a backward pass that recomputes from h agrees with it. Two loops, over pieces that
// stay in the first-level cache: GCC does not vectorize one loop with two outputs of bfloat16.
template <Activation A, class Team, class T, class Branch>
NFK_INLINE void residual_run(const Team& team, const T* f, const T* shortcut, T* h, T* a, int64_t n, double scale,
                             Branch branch) {
  constexpr int64_t kPiece = 2048;
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t length = n - start < kPiece ? n - start : kPiece;
    team.each(length, [=](int64_t j) {
      const int64_t i = start + j;
      h[i] = store<T>(branch(load(f[i]), i) + load(shortcut[i]));
    });
    activate<A>(team, h + start, a + start, length, scale);
  }
}

// Gradient of h where the activation is its only use; `saved` is h, or ReLU's output.
template <Activation A, class T>
struct ActivationGradient {
  using Acc = typename Accumulate<T>::type;
  const T* grad_a;
  const T* saved;
  Acc scale;
  NFK_INLINE Acc operator()(int64_t i) const { return Function<A>::backward(scale * load(grad_a[i]), load(saved[i])); }
  ActivationGradient from(int64_t offset) const { return {grad_a + offset, saved + offset, scale}; }
};

// Gradient of h from both of its uses.
template <Activation A, class T>
struct StreamGradient {
  using Acc = typename Accumulate<T>::type;
  const T* grad_h;
  ActivationGradient<A, T> of_activation;
  NFK_INLINE Acc operator()(int64_t i) const { return load(grad_h[i]) + of_activation(i); }
  StreamGradient from(int64_t offset) const { return {grad_h + offset, of_activation.from(offset)}; }
};

// Store an element of the gradients and return h's, so that one loop can sum it too.
template <class T, class Gradient>
struct StoreShortcut {
  Gradient gradient;
  T* grad_shortcut;
  NFK_INLINE typename Accumulate<T>::type operator()(int64_t i) const {
    const auto grad = gradient(i);
    grad_shortcut[i] = store<T>(grad);
    return grad;
  }
};
template <class T, class Gradient, class Factor>
struct StoreBoth {
  Gradient gradient;
  Factor factor;
  T* grad_shortcut;
  T* grad_f;
  NFK_INLINE typename Accumulate<T>::type operator()(int64_t i) const {
    const auto grad = gradient(i);
    grad_shortcut[i] = store<T>(grad);
    grad_f[i] = store<T>(grad * factor(i));
    return grad;
  }
};

}  // namespace
}  // namespace nfk
