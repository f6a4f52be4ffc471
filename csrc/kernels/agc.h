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

// The 2- or 1-norm, summed in Acc.
template <class Acc, class Team, class T>
NFK_INLINE double norm_in(const Team& team, const T* x, int64_t n, Norm norm) {
  if (norm == Norm::one) {
    return team.template sum<Acc>(n, [x](int64_t i) { return static_cast<Acc>(std::abs(load(x[i]))); });
  }
  return std::sqrt(static_cast<double>(team.template sum<Acc>(n, [x](int64_t i) {
    const Acc value = static_cast<Acc>(load(x[i]));
    return value * value;
  })));
}

template <class Team, class T>
NFK_SHARED double unit_norm(const Team& team, const T* x, int64_t n, const AgcConfig& config) {
  using Acc = typename Accumulate<T>::type;
  if (config.norm == Norm::two || config.norm == Norm::one) {
    const double norm = norm_in<Acc>(team, x, n, config.norm);
    // Squares of values above 1.8e19 overflow float32; the unit is then summed again in float64, which holds them.
    return std::isinf(norm) ? norm_in<double>(team, x, n, config.norm) : norm;
  }
  const auto magnitude = [x](int64_t i) { return std::abs(load(x[i])); };
  if (config.norm == Norm::infinity) return team.template max<Acc>(n, magnitude);
  const double p = config.p;
  const double sum = team.template sum<double>(n, [=](int64_t i) { return std::pow(static_cast<double>(magnitude(i)), p); });
  return std::pow(sum, 1.0 / p);
}

template <class Team, class W, class G>
NFK_INLINE void clip_unit(const Team& team, const W* weight, G* grad, int64_t n, const AgcConfig& config) {
  using Acc = typename Accumulate<G>::type;
  const double max_norm = config.clip_factor * at_least(unit_norm(team, weight, n, config), config.eps);
  const double grad_norm = unit_norm(team, static_cast<const G*>(grad), n, config);
  if (grad_norm < max_norm) return;  // false for a NaN norm, which must reach the gradient
  const double factor = max_norm / at_least(grad_norm, 1e-6);
  const Acc rounded = static_cast<Acc>(factor);
  if (std::isnormal(rounded)) {
    team.each(n, [=](int64_t i) { grad[i] = store<G>(load(grad[i]) * rounded); });
  } else {  // 0, NaN, or below 1.2e-38, where a float32 has few digits left
    team.each(n, [=](int64_t i) { grad[i] = store<G>(load(grad[i]) * factor); });
  }
}

}  // namespace
}  // namespace nfk
