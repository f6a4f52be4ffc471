// One step of stochastic gradient descent of one unit, its gradient clipped on the way: clip, decay, momentum, update,
// average. Decay comes after clipping, as in the authors' optimizer (deepmind-research, nfnets/optim.py, SGD_AGC).
#pragma once

#include "agc.h"

namespace nfk {

// Of a parameter group.
struct SgdConfig {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double average_decay;
  double grad_factor;  // 1 / loss scale; negative where the objective is maximized
  bool nesterov;
  bool clips;
  AgcConfig clip;  // read where clips; its norm is Norm::two
};

namespace {

// What a step does to an element, in Acc.
template <class Acc>
struct Descent {
  Acc scale;   // what the gradient is multiplied by
  Acc factor;  // and by again
  Acc weight_decay;
  Acc momentum;
  Acc share;  // of the new direction in the momentum
  Acc lr;
  bool nesterov;

  NFK_INLINE Descent(const SgdConfig& config, double factor)
      : scale(std::abs(factor) < kTiny ? static_cast<Acc>(0x1p-100) : 1),
        factor(static_cast<Acc>(std::abs(factor) < kTiny ? factor * 0x1p100 : factor)),
        weight_decay(static_cast<Acc>(config.weight_decay)), momentum(static_cast<Acc>(config.momentum)),
        share(static_cast<Acc>(1.0 - config.dampening)), lr(static_cast<Acc>(config.lr)), nesterov(config.nesterov) {}

  NFK_INLINE Acc direction(Acc w, Acc g) const { return g * scale * factor + weight_decay * w; }

 private:
  // Gradients near float32's end have factors below its beginning.
  static constexpr double kTiny = 1e-30;
};

template <class Acc, class Team, class Weight, class Grad>
NFK_INLINE void descend(const Team& team, Weight& weight, const Grad& grad, const Descent<Acc> step) {
  using W = typename Weight::value_type;
  team.each(weight.range(), [&](auto i) {
    const Acc w = load(weight[i]);
    weight[i] = store<W>(w - step.lr * step.direction(w, load(grad[i])));
  });
}

template <class Acc, class Team, class Weight, class Grad, class Momentum>
NFK_INLINE void descend_with_momentum(const Team& team, Weight& weight, const Grad& grad, Momentum& momentum,
                                      const Descent<Acc> step) {
  using W = typename Weight::value_type;
  using M = typename Momentum::value_type;
  team.each(weight.range(), [&](auto i) {
    const Acc w = load(weight[i]);
    const Acc d = step.direction(w, load(grad[i]));
    const Acc m = step.momentum * load(momentum[i]) + step.share * d;
    momentum[i] = store<M>(m);
    weight[i] = store<W>(w - step.lr * (step.nesterov ? d + step.momentum * m : m));
  });
}

// Of the weights as they are stored: 16-bit ones have been rounded.
template <class Team, class Weight, class Average>
NFK_INLINE void move_average(const Team& team, const Weight& weight, Average& average, double decay) {
  using Acc = typename Average::value_type;
  const Acc share = static_cast<Acc>(1.0 - decay);
  team.each(weight.range(), [&](auto i) {
    const Acc before = load(average[i]);
    average[i] = store<Acc>(before + share * (static_cast<Acc>(load(weight[i])) - before));
  });
}

template <class Team, class Acc>
NFK_INLINE double counted_factor(const Team& team, UnitStatistics* statistics, const Decision<Acc>& decision,
                                 const SgdConfig& config) {
  count(team, statistics, decision);
  return decision.clips ? config.grad_factor * static_cast<double>(decision.factor) : config.grad_factor;
}

// What the gradient, as it is stored, is multiplied by; from float64 where float32 does not hold what is on the way.
template <class Team, class Weight, class Grad>
NFK_INLINE double clipped_factor(const Team& team, const Weight& weight, const Grad& grad, UnitStatistics* statistics,
                                 const SgdConfig& config) {
  using Acc = Wider<typename Weight::value_type, typename Grad::value_type>;
  const double scale = std::abs(config.grad_factor);
  const auto decision = decide<Acc>(team, weight, grad, config.clip, scale);
  if (decision.exact) return counted_factor(team, statistics, decision, config);
  return counted_factor(team, statistics, decide<double>(team, weight, grad, config.clip, scale), config);
}

// Clips or not.
template <class Team, class Weight, class Grad>
NFK_INLINE auto descent_of(const Team& team, const Weight& weight, const Grad& grad, UnitStatistics* statistics,
                           const SgdConfig& config) {
  const double factor = config.clips ? clipped_factor(team, weight, grad, statistics, config) : config.grad_factor;
  return Descent<Wider<typename Weight::value_type, typename Grad::value_type>>(config, factor);
}

// With momentum and average or not: what the tensor `t` has.
template <class Acc, class Tensor, class Team, class Weight, class Grad, class Momentum, class Average>
NFK_INLINE void step_elements(const Tensor& t, const Team& team, Weight weight, const Grad& grad, Momentum& momentum,
                              Average& average, const Descent<Acc>& step, double average_decay) {
  if (t.momentum) {
    descend_with_momentum(team, weight, grad, momentum, step);
  } else {
    descend(team, weight, grad, step);
  }
  if (t.average) move_average(team, weight, average, average_decay);
}

}  // namespace
}  // namespace nfk
