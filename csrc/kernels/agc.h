// Adaptive gradient clipping of one unit (Brock et al. 2021, section 4.1, equation 3).
#pragma once

#include "number.h"
#include "order.h"

namespace nfk {

enum class Norm : int { two = 0, one = 1, infinity = 2, p = 3 };

struct AgcConfig {
  double clip_factor;
  double eps;
  double p;  // read where norm is Norm::p
  Norm norm;
};

namespace {

// Whether a unit is clipped, and by which factor.
template <class Acc>
struct Decision {
  Acc factor;
  Acc ratio;  // of gradient norm to parameter norm
  bool clips;
  bool exact;  // whether Acc held everything on the way; float64 always does

  NFK_INLINE Decision(Acc weight_norm, Acc grad_norm, const AgcConfig& config) {
    const Acc bound = at_least(weight_norm, static_cast<Acc>(config.eps));
    const Acc max_norm = static_cast<Acc>(config.clip_factor) * bound;
    clips = !(grad_norm < max_norm);  // true for a NaN norm, which must reach the gradient
    factor = max_norm / at_least(grad_norm, static_cast<Acc>(1e-6));
    ratio = grad_norm == 0 ? grad_norm : grad_norm / bound;  // also where eps = 0 lets the bound be 0
    exact = std::is_same<Acc, double>::value || holds(weight_norm, grad_norm, bound, max_norm);
  }

 private:
  // Squares of values above 1.8e19 overflow float32; those of norms below 1e-16, and factors below 1.2e-38, lose digits.
  NFK_INLINE bool holds(Acc weight_norm, Acc grad_norm, Acc bound, Acc max_norm) const {
    const Acc least = static_cast<Acc>(1e-16);
    if (std::isinf(weight_norm) || std::isinf(grad_norm) || !(bound > least && max_norm > least)) return false;
    return !clips || std::isnormal(factor);
  }
};

// The 1-, 2- or maximum norm, in Acc.
template <class Acc, class Team, class X>
NFK_SHARED Acc unit_norm(const Team& team, const X& x, Norm norm) {
  const auto magnitude = [&](auto i) { return std::abs(static_cast<Acc>(load(x[i]))); };
  if (norm == Norm::one) return team.template sum<Acc>(x.range(), magnitude);
  if (norm == Norm::infinity) return team.template max<Acc>(x.range(), magnitude);
  return std::sqrt(team.template sum<Acc>(x.range(), [&](auto i) {
    const Acc value = static_cast<Acc>(load(x[i]));
    return value * value;
  }));
}

// Any p-norm: in float32 an exponential loses digits in proportion to its argument.
template <class Team, class X>
NFK_SHARED double power_norm(const Team& team, const X& x, double p) {
  const double sum = team.template sum<double>(x.range(), [&](auto i) {
    return std::pow(std::abs(static_cast<double>(load(x[i]))), p);
  });
  return std::pow(sum, 1.0 / p);
}

template <class Acc, class Team, class Grad>
NFK_INLINE void scale_unit(const Team& team, Grad& grad, Acc factor) {
  using G = typename Grad::value_type;
  team.each(grad.range(), [&](auto i) { grad[i] = store<G>(load(grad[i]) * factor); });
}

// By a 1-, 2- or maximum norm, of the gradient times `grad_scale`.
template <class Acc, class Team, class Weight, class Grad>
NFK_INLINE Decision<Acc> decide(const Team& team, const Weight& weight, const Grad& grad, const AgcConfig& config,
                                double grad_scale = 1.0) {
  const Acc weight_norm = unit_norm<Acc>(team, weight, config.norm);
  return Decision<Acc>(weight_norm, static_cast<Acc>(grad_scale) * unit_norm<Acc>(team, grad, config.norm), config);
}

// `statistics` may be null.
template <class Team, class Acc>
NFK_INLINE void count(const Team& team, UnitStatistics* statistics, const Decision<Acc>& decision) {
  if (!statistics) return;
  team.update(statistics, [&](UnitStatistics& counted) {
    counted.steps += 1.0f;
    counted.clipped += decision.clips ? 1.0f : 0.0f;
    counted.largest = larger(static_cast<float>(decision.ratio), counted.largest);
  });
}

template <class Team, class Grad, class Acc>
NFK_INLINE void apply(const Team& team, Grad& grad, UnitStatistics* statistics, const Decision<Acc>& decision) {
  if (decision.clips) scale_unit(team, grad, decision.factor);
  count(team, statistics, decision);
}

// Clips by any norm, once more in float64 where float32 does not hold what is on the way.
template <class Team, class Weight, class Grad>
NFK_INLINE void clip_unit(const Team& team, const Weight& weight, Grad grad, UnitStatistics* statistics,
                          const AgcConfig& config) {
  using Acc = Wider<typename Weight::value_type, typename Grad::value_type>;
  if (config.norm == Norm::p) {
    const double weight_norm = power_norm(team, weight, config.p);
    apply(team, grad, statistics, Decision<double>(weight_norm, power_norm(team, grad, config.p), config));
    return;
  }
  const auto decision = decide<Acc>(team, weight, grad, config);
  if (decision.exact) {
    apply(team, grad, statistics, decision);
  } else {
    apply(team, grad, statistics, decide<double>(team, weight, grad, config));
  }
}

}  // namespace
}  // namespace nfk
