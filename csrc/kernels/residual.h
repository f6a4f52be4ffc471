// The end of a residual block and the start of the next one (Brock et al. 2021, section 3):
//   h = factor * f + bias + shortcut,  a = scale * act(h),
//   factor = alpha * skip_gain * keep * gate per sample and channel, bias per channel.
// Here are the loops over a piece of them, or over a run of one channel or pixel; x holds in the accumulation type what one
// loop leaves to the next.
#pragma once

#include "scaled_activation.h"

namespace nfk {
namespace {

// `factor` and `bias` are functions of the place in the run.
template <class Team, class T, class Factor, class Acc>
NFK_INLINE void read_scaled(const Team& team, const T* from, Factor factor, Acc* x, int64_t n) {
  team.each(n, [=](int64_t i) { x[i] = load(from[i]) * factor(i); });
}

template <class Team, class T, class Bias, class Acc>
NFK_INLINE void read_shifted(const Team& team, const T* from, Bias bias, Acc* x, int64_t n) {
  team.each(n, [=](int64_t i) { x[i] = load(from[i]) + bias(i); });
}

template <class Team, class T, class Factor, class Bias, class Acc>
NFK_INLINE void read_scaled_and_shifted(const Team& team, const T* from, Factor factor, Bias bias, Acc* x, int64_t n) {
  team.each(n, [=](int64_t i) { x[i] = load(from[i]) * factor(i) + bias(i); });
}

template <class Team, class In, class T>
NFK_INLINE void write_sum(const Team& team, const In* x, const T* shortcut, T* h, int64_t n) {
  team.each(n, [=](int64_t i) { h[i] = store<T>(load(x[i]) + load(shortcut[i])); });
}

// Gradient of h where the activation is its only use; `saved` is h, or ReLU's output.
template <Activation A, class T, class In>
struct ActivationGradient {
  using Acc = typename Accumulate<T>::type;
  const T* grad_a;
  const In* saved;
  Acc scale;
  NFK_INLINE Acc operator()(int64_t i) const {
    return Function<A>::template backward<T>(scale * load(grad_a[i]), load(saved[i]));
  }
};

// Gradient of h from both of its uses.
template <Activation A, class T>
struct StreamGradient {
  const T* grad_h;
  ActivationGradient<A, T, T> of_activation;
  NFK_INLINE auto operator()(int64_t i) const { return load(grad_h[i]) + of_activation(i); }
};

template <class Team, class Gradient, class Acc, class T>
NFK_INLINE void write_gradient(const Team& team, Gradient gradient, Acc* x, T* grad_shortcut, int64_t n) {
  team.each(n, [=](int64_t i) {
    const Acc grad = gradient(i);
    x[i] = grad;
    grad_shortcut[i] = store<T>(grad);
  });
}

// Stores an element of f's gradient and returns its share in factor's, so that one loop can sum these: of two, each would
// read or write one of f and grad_f, and memory serves both at a time faster.
template <class T, class Factor>
struct FactorGradient {
  using Acc = typename Accumulate<T>::type;
  const Acc* x;
  const T* f;
  Factor factor;
  T* grad_f;
  NFK_INLINE Acc operator()(int64_t i) const {
    grad_f[i] = store<T>(x[i] * factor(i));
    return x[i] * load(f[i]);
  }
};

template <class Team, class Acc, class Factor, class T>
NFK_INLINE void write_scaled(const Team& team, const Acc* x, Factor factor, T* to, int64_t n) {
  team.each(n, [=](int64_t i) { to[i] = store<T>(x[i] * factor(i)); });
}

}  // namespace
}  // namespace nfk
