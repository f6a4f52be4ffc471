// scale * f(x) for one element, and its derivative. float32 uses branch-free polynomials that vectorize; float64 uses libm.
#pragma once

#include <type_traits>

#include "number.h"

namespace nfk {

// The codes of `nfnets_kernels.ops.scaled_activation.CPU_CODES`.
enum class Activation : int { relu = 0, gelu = 1, gelu_tanh = 2, silu = 3 };

namespace {

NFK_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) within 2 ulp, subnormal results flushed to 0: Cody-Waite reduction by ln 2 and a degree-6 Taylor polynomial on
// [-ln2/2, ln2/2] (remainder 1.2e-7 * 0.03). NaN passes through.
NFK_INLINE float exponential(float x) {
  const bool underflows = x < -87.33f, overflows = x > 88.72f;
  x = underflows || overflows ? 0.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold round(x / ln 2)
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float polynomial =
      1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
  const uint32_t exponent = (bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float finite = polynomial * bit_cast<float>(exponent);
  return underflows ? 0.0f : overflows ? INFINITY : finite;
}

template <class T>
NFK_INLINE T sigmoid(T x) {
  return static_cast<T>(1) / (static_cast<T>(1) + exponential(-x));
}

// sigmoid(z) and its derivative, from e = exp(-|z|): 1 - sigmoid(z) would cancel, and x magnify the error.
template <class T>
struct Gate {
  T value;
  T slope;

  explicit NFK_INLINE Gate(T z) {
    const T e = exponential(-std::abs(z));
    const T d = static_cast<T>(1) / (static_cast<T>(1) + e);
    value = z < static_cast<T>(0) ? e * d : d;
    slope = e * d * d;
  }
};

// The normal distribution function Phi and density phi, as torch.nn.functional.gelu(approximate="none") uses them.
struct Normal {
  template <class T>
  static NFK_INLINE T density(T x) {
    return static_cast<T>(0.3989422804014327) * exponential(static_cast<T>(-0.5) * x * x);
  }
  static NFK_INLINE double distribution(double x, double) { return 0.5 * std::erfc(x * -0.7071067811865476); }
  // Phi(-|x|) = exp(-x^2/2) u P(u), u = 1 / (1 + 0.21 |x|): P fitted to erfcx on 0 <= |x| <= 13.5, relative error 1.4e-8.
  // Through the tail function the negative side keeps its relative accuracy, which 1 + erf(x) cancels away.
  static NFK_INLINE float distribution(float x, float density) {
    const float u = 1.0f / (1.0f + 0.21f * std::abs(x));
    const float p =
        u * (0.08370769768953323f + u * (0.08512943238019943f + u * (0.06878984719514847f + u * (0.12635590136051178f +
        u * (-0.09724748134613037f + u * (0.35403624176979065f + u * (-0.3341919481754303f + u * (0.28545454144477844f +
        u * -0.07203421741724014f))))))));
    const float tail = density * 2.5066282746f * p;
    return x < 0.0f ? tail : 1.0f - tail;
  }
};

template <Activation A>
struct Function;

template <>
struct Function<Activation::relu> {
  template <class T>
  static NFK_INLINE T value(T x) {
    return x < static_cast<T>(0) ? static_cast<T>(0) : x;
  }
  template <class T>  // x may be the input or the output: both have the same sign
  static NFK_INLINE T backward(T grad, T x) {
    return x <= static_cast<T>(0) ? static_cast<T>(0) : grad;  // not a product: an infinite gradient is masked too
  }
};

template <>
struct Function<Activation::gelu> {
  template <class T>
  static NFK_INLINE T value(T x) {
    return x * Normal::distribution(x, Normal::density(x));
  }
  template <class T>
  static NFK_INLINE T backward(T grad, T x) {
    const T density = Normal::density(x);
    return grad * (Normal::distribution(x, density) + x * density);
  }
};

// 0.5 x (1 + tanh z) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3), without tanh's cancellation on the negative side.
template <>
struct Function<Activation::gelu_tanh> {
  template <class T>
  static NFK_INLINE T value(T x) {
    return x * sigmoid(static_cast<T>(1.5957691216057308) * (x + static_cast<T>(0.044715) * x * x * x));
  }
  // Far out the gate's slope is 0, and the bounded square keeps it from meeting an infinity.
  template <class T>
  static NFK_INLINE T backward(T grad, T x) {
    const T square = x * x > static_cast<T>(1e4) ? static_cast<T>(1e4) : x * x;
    const T z = static_cast<T>(1.5957691216057308) * x * (static_cast<T>(1) + static_cast<T>(0.044715) * square);
    const T slope = static_cast<T>(1.5957691216057308) * (static_cast<T>(1) + static_cast<T>(3 * 0.044715) * square);
    const Gate<T> gate(z);
    return grad * (gate.value + x * (slope * gate.slope));
  }
};

template <>
struct Function<Activation::silu> {
  template <class T>
  static NFK_INLINE T value(T x) {
    return x * sigmoid(x);
  }
  template <class T>
  static NFK_INLINE T backward(T grad, T x) {
    const Gate<T> gate(x);
    return grad * (gate.value + x * gate.slope);
  }
};

template <Activation A, class Team, class T>
NFK_INLINE void activate(const Team& team, const T* x, T* out, int64_t n, double scale) {
  using Acc = typename Accumulate<T>::type;
  const Acc s = static_cast<Acc>(scale);
  team.each(n, [=](int64_t i) { out[i] = store<T>(s * Function<A>::value(load(x[i]))); });
}

template <Activation A, class Team, class T>
NFK_INLINE void activate_backward(const Team& team, const T* grad, const T* x, T* out, int64_t n, double scale) {
  using Acc = typename Accumulate<T>::type;
  const Acc s = static_cast<Acc>(scale);
  team.each(n, [=](int64_t i) { out[i] = store<T>(Function<A>::backward(s * load(grad[i]), load(x[i]))); });
}

// Calls f with the activation as a compile-time constant.
template <class F>
NFK_INLINE void visit(Activation activation, F f) {
  switch (activation) {
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

}  // namespace
}  // namespace nfk
