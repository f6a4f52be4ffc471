// Adaptive gradient clipping of one unit (Brock et al. 2021, section 4.1, equation 3).
#pragma once

#include "number.h"

namespace nfk {

enum class Norm : int { two = 0, one = 1, infinity = 2, p = 3 };

struct AgcConfig {
  double clip_factor;
  double eps;
  double p;  // read where norm is Norm::p
  Norm norm;
};

namespace {

template <class Acc, class Team, class T>
NFK_INLINE Acc two_norm(const Team& team, const T* x, int64_t n) {
  return std::sqrt(team.template sum<Acc>(n, [x](int64_t i) {
    const Acc value = static_cast<Acc>(load(x[i]));
    return value * value;
  }));
}

template <class Team, class T>
NFK_SHARED typename Accumulate<T>::type unit_norm(const Team& team, const T* x, int64_t n, const AgcConfig& config) {
  using Acc = typename Accumulate<T>::type;
  if (config.norm == Norm::two) {
    const Acc norm = two_norm<Acc>(team, x, n);
    // Squares of values above 1.8e19 overflow float32; the unit is then summed again in float64, which holds them.
    return std::isinf(norm) ? static_cast<Acc>(two_norm<double>(team, x, n)) : norm;
  }
  const auto magnitude = [x](int64_t i) { return std::abs(load(x[i])); };
  if (config.norm == Norm::one) return team.template sum<Acc>(n, magnitude);
  if (config.norm == Norm::infinity) return team.template max<Acc>(n, magnitude);
  const double p = config.p;
  const double sum = team.template sum<double>(n, [=](int64_t i) { return std::pow(static_cast<double>(magnitude(i)), p); });
  return static_cast<Acc>(std::pow(sum, 1.0 / p));
}

template <class Team, class W, class G>
NFK_INLINE void clip_unit(const Team& team, const W* weight, G* grad, int64_t n, const AgcConfig& config) {
  using Acc = typename Accumulate<G>::type;
  const Acc weight_norm = static_cast<Acc>(unit_norm(team, weight, n, config));
  const Acc grad_norm = unit_norm(team, static_cast<const G*>(grad), n, config);
  const Acc max_norm = static_cast<Acc>(config.clip_factor) * at_least(weight_norm, static_cast<Acc>(config.eps));
  if (grad_norm < max_norm) return;  // false for a NaN norm, which must reach the gradient
  const Acc factor = max_norm / at_least(grad_norm, static_cast<Acc>(1e-6));
  team.each(n, [=](int64_t i) { grad[i] = store<G>(load(grad[i]) * factor); });
}

}  // namespace
}  // namespace nfk
