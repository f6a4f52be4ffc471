// Scaled weight standardization of one unit of N weights (Brock et al. 2021a, equation 1) and its gradient:
//   out = scale * gain * (w - mean) * r,  r = 1 / sqrt(denominator),  both forms of the denominator in `Inverse`.
#pragma once

#include "number.h"
#include "order.h"

namespace nfk {

enum class EpsForm : int { clamp = 0, add = 1 };

namespace {

template <class Acc>
struct Inverse {
  Acc r;
  bool depends_on_weight;  // false below the clamp, where the denominator is the constant eps

  NFK_INLINE Inverse(Acc squared_deviations, int64_t n, double eps, EpsForm form) {
    const Acc e = static_cast<Acc>(eps);
    const Acc denominator = form == EpsForm::clamp ? at_least(squared_deviations, e)
                                                   : squared_deviations + static_cast<Acc>(n) * e;
    r = static_cast<Acc>(1) / std::sqrt(denominator);
    depends_on_weight = form == EpsForm::add || !(squared_deviations < e);
  }
};

template <class Acc, class Team, class X>
NFK_SHARED Acc mean_of(const Team& team, const X& x, int64_t n) {
  return team.template sum<Acc>(x.range(), [&](auto i) { return static_cast<Acc>(load(x[i])); }) / static_cast<Acc>(n);
}

template <class Acc, class Team, class Weight>
NFK_SHARED Acc squared_deviations_of(const Team& team, const Weight& weight, Acc mean) {
  return team.template sum<Acc>(weight.range(), [&](auto i) {
    const Acc deviation = static_cast<Acc>(load(weight[i])) - mean;
    return deviation * deviation;
  });
}

// What one unit is standardized by; scale and gain are in the accumulation type of the weight.
template <class Acc>
struct Standard {
  Acc scale;
  Acc gain;
  double eps;
  EpsForm form;
  int64_t n;
};

// `order` pairs the elements of the output with those of the weight.
template <class Acc, class Team, class Weight, class Out, class Order>
NFK_INLINE void standardize_unit(const Team& team, const Weight& weight, Out& out, const Standard<Acc>& by, Order order) {
  using O = typename Out::value_type;
  const Acc mean = mean_of<Acc>(team, weight, by.n);
  const Inverse<Acc> inverse(squared_deviations_of(team, weight, mean), by.n, by.eps, by.form);
  const Acc factor = by.scale * by.gain * inverse.r;
  team.each(order, [&](auto to, auto from) {
    out[to] = store<O>((static_cast<Acc>(load(weight[from])) - mean) * factor);
  });
}

// `order` pairs the elements of the weight and of its gradient with those of the output's. Returns the gradient of the gain.
template <class Acc, class Team, class Weight, class GradOut, class GradWeight, class Order>
NFK_INLINE Acc standardize_unit_backward(const Team& team, const Weight& weight, const GradOut& grad_out,
                                         GradWeight& grad_weight, const Standard<Acc>& by, Order order) {
  using W = typename GradWeight::value_type;
  const Acc mean = mean_of<Acc>(team, weight, by.n);
  const Acc grad_mean = mean_of<Acc>(team, grad_out, by.n);
  const Inverse<Acc> inverse(squared_deviations_of(team, weight, mean), by.n, by.eps, by.form);
  const Acc projection = team.template sum<Acc>(order, [&](auto i, auto j) {
    return static_cast<Acc>(load(grad_out[j])) * (static_cast<Acc>(load(weight[i])) - mean);
  });

  const Acc factor = by.scale * by.gain * inverse.r;
  // d r / d w_i = -r^3 (w_i - mean)
  const Acc shrink = inverse.depends_on_weight ? inverse.r * inverse.r * projection : static_cast<Acc>(0);
  team.each(order, [&](auto i, auto j) {
    const Acc deviation = static_cast<Acc>(load(weight[i])) - mean;
    grad_weight[i] = store<W>(factor * (static_cast<Acc>(load(grad_out[j])) - grad_mean - deviation * shrink));
  });
  return by.scale * inverse.r * projection;
}

// The tensors' sides of unit `unit` of a table's row.
template <class W, class T>
NFK_INLINE Standard<typename Accumulate<W>::type> standard_of(const T& t, int64_t unit, int64_t n, double eps, EpsForm form) {
  using Acc = typename Accumulate<W>::type;
  const Acc gain = t.gain ? static_cast<Acc>(load(static_cast<const W*>(t.gain)[unit])) : static_cast<Acc>(1);
  return {static_cast<Acc>(t.scale), gain, eps, form, n};
}

}  // namespace
}  // namespace nfk
