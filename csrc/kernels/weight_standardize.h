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

template <class Acc, class Team, class W>
NFK_SHARED Acc mean_of(const Team& team, const W* weight, int64_t n) {
  return team.template sum<Acc>(n, [=](int64_t i) { return static_cast<Acc>(load(weight[i])); }) / static_cast<Acc>(n);
}

template <class Acc, class Team, class W>
NFK_SHARED Acc squared_deviations_of(const Team& team, const W* weight, Acc mean, int64_t n) {
  return team.template sum<Acc>(n, [=](int64_t i) {
    const Acc deviation = static_cast<Acc>(load(weight[i])) - mean;
    return deviation * deviation;
  });
}

template <class Team, class W, class O, class Order>
NFK_INLINE void standardize_unit(const Team& team, const WeightTensor& t, int64_t unit, double eps, EpsForm form, W, O,
                                 Order order) {
  using Acc = typename Accumulate<W>::type;
  const int64_t n = t.units.length;
  const W* weight = static_cast<const W*>(t.weight) + unit * n;
  O* out = static_cast<O*>(t.out) + unit * n;
  const Acc mean = mean_of<Acc>(team, weight, n);
  const Inverse<Acc> inverse(squared_deviations_of(team, weight, mean, n), n, eps, form);
  const Acc gain = t.gain ? static_cast<Acc>(load(static_cast<const W*>(t.gain)[unit])) : static_cast<Acc>(1);
  const Acc factor = static_cast<Acc>(t.scale) * gain * inverse.r;
  team.each(order, [=](int64_t to, int64_t from) {
    out[to] = store<O>((static_cast<Acc>(load(weight[from])) - mean) * factor);
  });
}

template <class Team, class W, class O>
NFK_INLINE void standardize_unit(const Team& team, const WeightTensor& t, int64_t unit, double eps, EpsForm form, W w, O o) {
  const int64_t columns = t.columns, rows = t.units.length / columns;
  if (t.transposed) {
    standardize_unit(team, t, unit, eps, form, w, o, Transposed{columns, rows});
  } else {
    standardize_unit(team, t, unit, eps, form, w, o, Linear{t.units.length});
  }
}

template <class Team, class W, class O, class Order>
NFK_INLINE void standardize_unit_backward(const Team& team, const WeightTensor& t, int64_t unit, double eps, EpsForm form,
                                          W, O, Order order) {
  using Acc = typename Accumulate<W>::type;
  const int64_t n = t.units.length;
  const W* weight = static_cast<const W*>(t.weight) + unit * n;
  const O* grad_out = static_cast<const O*>(t.grad_out) + unit * n;
  W* grad_weight = static_cast<W*>(t.grad_weight) + unit * n;

  const Acc mean = mean_of<Acc>(team, weight, n);
  const Acc grad_mean = mean_of<Acc>(team, grad_out, n);
  const Inverse<Acc> inverse(squared_deviations_of(team, weight, mean, n), n, eps, form);
  const Acc projection = team.template sum<Acc>(order, [=](int64_t i, int64_t j) {
    return static_cast<Acc>(load(grad_out[j])) * (static_cast<Acc>(load(weight[i])) - mean);
  });

  const Acc scale = static_cast<Acc>(t.scale);
  const Acc gain = t.gain ? static_cast<Acc>(load(static_cast<const W*>(t.gain)[unit])) : static_cast<Acc>(1);
  if (t.grad_gain) static_cast<W*>(t.grad_gain)[unit] = store<W>(scale * inverse.r * projection);
  const Acc factor = scale * gain * inverse.r;
  // d r / d w_i = -r^3 (w_i - mean)
  const Acc shrink = inverse.depends_on_weight ? inverse.r * inverse.r * projection : static_cast<Acc>(0);
  team.each(order, [=](int64_t i, int64_t j) {
    const Acc deviation = static_cast<Acc>(load(weight[i])) - mean;
    grad_weight[i] = store<W>(factor * (static_cast<Acc>(load(grad_out[j])) - grad_mean - deviation * shrink));
  });
}

template <class Team, class W, class O>
NFK_INLINE void standardize_unit_backward(const Team& team, const WeightTensor& t, int64_t unit, double eps, EpsForm form,
                                          W w, O o) {
  const int64_t columns = t.columns, rows = t.units.length / columns;
  if (t.transposed) {
    standardize_unit_backward(team, t, unit, eps, form, w, o, Transposed{rows, columns});
  } else {
    standardize_unit_backward(team, t, unit, eps, form, w, o, Linear{t.units.length});
  }
}

}  // namespace
}  // namespace nfk
