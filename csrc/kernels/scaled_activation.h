// scale * f(x) for one element, and its derivative. float32 uses branch-free polynomials that vectorize; float64 uses libm.
#pragma once

#include <type_traits>

#include "number.h"

namespace nfk {

// The codes of `nfnets_kernels.ops.scaled_activation.CPU_CODES`.
enum class Activation : int { relu = 0, gelu = 1, gelu_tanh = 2, silu = 3 };

namespace {

NFK_INLINE float polynomial(float, float constant) { return constant; }
template <class... Rest>
NFK_INLINE float polynomial(float x, float constant, Rest... rest) {
  return constant + x * polynomial(x, rest...);
}

// The approximations below, as exact as the type T that a result is stored in can show. Half an ulp of 16 bits is a relative
// 2^-12 or more: with an error below 2^-16, two terms fewer of each exponential and three of each tail, a GELU of bfloat16
// in the cache takes a tenth less forward and 3% less backward (AVX-512).
template <class T>
struct Fit {
  // exp(r) on [-ln2/2, ln2/2], relative error 2.6e-6.
  static NFK_INLINE float exponential(float r) {
    return polynomial(r, 0.99999928f, 0.99996340f, 0.50004357f, 0.16790909f, 0.041458610f);
  }
  // The remainder of x after n ln 2.
  static NFK_INLINE float reduce(float x, float n) { return x - n * 0.69314718f; }
  // exp(x^2/2) Phi(-x) / u on 0 <= x <= 13.3, where u = 1 / (1 + kBend x): relative error 1.3e-5, but 2.7e-7 of Phi(-x),
  // which almost cancels in GELU's derivative where that changes its sign.
  static constexpr float kBend = 0.3f;
  static NFK_INLINE float tail(float u) {
    return polynomial(u, 0.12012104f, 0.11312720f, 0.14712785f, -0.023299539f, 0.22233301f, -0.079409830f);
  }
};

template <>
struct Fit<float> {
  // Taylor's polynomial of degree 6: remainder 1.2e-7 * 0.03.
  static NFK_INLINE float exponential(float r) {
    return polynomial(r, 1.0f, 1.0f, 0.5f, 1.66666667e-1f, 4.16666667e-2f, 8.33333333e-3f, 1.38888889e-3f);
  }
  // Cody and Waite's ln 2 in two pieces, the product with the first of which is exact.
  static NFK_INLINE float reduce(float x, float n) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; }
  // Relative error 1.4e-8.
  static constexpr float kBend = 0.21f;
  static NFK_INLINE float tail(float u) {
    return polynomial(u, 0.08370769768953323f, 0.08512943238019943f, 0.06878984719514847f, 0.12635590136051178f,
                      -0.09724748134613037f, 0.35403624176979065f, -0.3341919481754303f, 0.28545454144477844f,
                      -0.07203421741724014f);
  }
};

// exp(x) for x <= 0, float32 within 2 ulp; below the smallest normal number 0, or a subnormal one. NaN passes through.
template <class T>
NFK_INLINE double exponential(double x) {
  return std::exp(x);
}
template <class T>
NFK_INLINE float exponential(float x) {
  x = at_least(x, -88.0f);  // gives 2^-127, whose exponent field is 0's
  const float shifted = x * 1.44269504f + 12583039.0f;  // 1.5 * 2^23 + 127: the low bits hold round(x / ln 2) + 127
  const float n = shifted - 12583039.0f;
  const float power = bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  return Fit<T>::exponential(Fit<T>::reduce(x, n)) * power;
}

// sigmoid(z) and its derivative, from e = exp(-|z|): 1 - sigmoid(z) would cancel, and x magnify the error.
template <class T>
struct Gate {
  using Acc = typename Accumulate<T>::type;
  Acc value;
  Acc slope;

  explicit NFK_INLINE Gate(Acc z) {
    const Acc e = exponential<T>(-std::abs(z));
    const Acc d = static_cast<Acc>(1) / (static_cast<Acc>(1) + e);
    value = z < static_cast<Acc>(0) ? e * d : d;
    slope = e * d * d;
  }
};

// The normal distribution function Phi and density phi, as torch.nn.functional.gelu(approximate="none") uses them.
// Through its tail Phi(-|x|) the negative side keeps its relative accuracy, which 1 + erf(x) cancels away.
template <class T>
struct Normal {
  float distribution;
  float density;

  explicit NFK_INLINE Normal(float x) {
    const float e = exponential<T>(-0.5f * x * x);
    const float u = 1.0f / (1.0f + Fit<T>::kBend * std::abs(x));
    const float tail = e * (u * Fit<T>::tail(u));
    distribution = x < 0.0f ? tail : 1.0f - tail;
    density = 0.39894228f * e;
  }
};
template <>
struct Normal<double> {
  double distribution;
  double density;

  explicit NFK_INLINE Normal(double x)
      : distribution(0.5 * std::erfc(x * -0.7071067811865476)), density(0.3989422804014327 * std::exp(-0.5 * x * x)) {}
};

// value<T> and backward<T> compute in T's accumulation type what is to be stored as T.
template <Activation A>
struct Function;

template <>
struct Function<Activation::relu> {
  template <class T, class Acc>
  static NFK_INLINE Acc value(Acc x) {
    return x < static_cast<Acc>(0) ? static_cast<Acc>(0) : x;
  }
  template <class T, class Acc>  // x may be the input or the output: both have the same sign
  static NFK_INLINE Acc backward(Acc grad, Acc x) {
    return x <= static_cast<Acc>(0) ? static_cast<Acc>(0) : grad;  // not a product: an infinite gradient is masked too
  }
};

template <>
struct Function<Activation::gelu> {
  template <class T, class Acc>
  static NFK_INLINE Acc value(Acc x) {
    return x * Normal<T>(x).distribution;
  }
  template <class T, class Acc>
  static NFK_INLINE Acc backward(Acc grad, Acc x) {
    const Normal<T> normal(x);
    return grad * (normal.distribution + x * normal.density);
  }
};

// 0.5 x (1 + tanh z) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3), without tanh's cancellation on the negative side.
template <>
struct Function<Activation::gelu_tanh> {
  template <class T, class Acc>
  static NFK_INLINE Acc value(Acc x) {
    const Acc cubic = x + static_cast<Acc>(0.044715) * x * x * x;
    return x * Gate<T>(static_cast<Acc>(1.5957691216057308) * cubic).value;
  }
  // Far out the gate's slope is 0, and the bounded square keeps it from meeting an infinity.
  template <class T, class Acc>
  static NFK_INLINE Acc backward(Acc grad, Acc x) {
    const Acc square = x * x > static_cast<Acc>(1e4) ? static_cast<Acc>(1e4) : x * x;
    const Acc z = static_cast<Acc>(1.5957691216057308) * x * (static_cast<Acc>(1) + static_cast<Acc>(0.044715) * square);
    const Acc slope = static_cast<Acc>(1.5957691216057308) * (static_cast<Acc>(1) + static_cast<Acc>(3 * 0.044715) * square);
    const Gate<T> gate(z);
    return grad * (gate.value + x * (slope * gate.slope));
  }
};

template <>
struct Function<Activation::silu> {
  template <class T, class Acc>
  static NFK_INLINE Acc value(Acc x) {
    return x * Gate<T>(x).value;
  }
  template <class T, class Acc>
  static NFK_INLINE Acc backward(Acc grad, Acc x) {
    const Gate<T> gate(x);
    return grad * (gate.value + x * gate.slope);
  }
};

// x may be of the output's type T or of the type that T is computed in.
template <Activation A, class Team, class In, class T>
NFK_INLINE void activate(const Team& team, const In* x, T* out, int64_t n, double scale) {
  const auto s = static_cast<typename Accumulate<T>::type>(scale);
  team.each(n, [=](int64_t i) { out[i] = store<T>(s * Function<A>::template value<T>(load(x[i]))); });
}

template <Activation A, class Team, class T>
NFK_INLINE void activate_backward(const Team& team, const T* grad, const T* x, T* out, int64_t n, double scale) {
  const auto s = static_cast<typename Accumulate<T>::type>(scale);
  team.each(n, [=](int64_t i) { out[i] = store<T>(Function<A>::template backward<T>(s * load(grad[i]), load(x[i]))); });
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
