#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {
namespace {

template <class T>
Run<T> unit_of(void* tensor, int64_t unit, int64_t n) {
  return {static_cast<T*>(tensor) + unit * n, n};
}

template <class W, class G>
void step_unit(const SgdTensor& t, int64_t unit, const SgdConfig& config) {
  using Acc = Wider<W, G>;
  const int64_t n = t.units.length;
  Run<W> weight = unit_of<W>(t.weight, unit, n);
  const Run<const G> grad{static_cast<const G*>(t.grad) + unit * n, n};
  double factor = config.grad_factor;
  if (config.clips) {
    UnitStatistics* statistics = t.statistics ? t.statistics + unit : nullptr;
    const Run<const W> unchanged{weight.data, n};
    factor = clipped_factor(Team{}, unchanged, grad, statistics, config);
  }
  const Descent<Acc> step(config, factor);
  if (t.momentum) {
    Run<W> momentum = unit_of<W>(t.momentum, unit, n);
    descend_with_momentum(Team{}, weight, grad, momentum, step);
  } else {
    descend(Team{}, weight, grad, step);
  }
  if (t.average) {
    auto average = unit_of<typename Accumulate<W>::type>(t.average, unit, n);
    move_average(Team{}, weight, average, config.average_decay);
  }
}

}  // namespace

void sgd_agc(const SgdTensor& t, const SgdConfig& config, int64_t first, int64_t last) {
  visit(t.weight_dtype, [&](auto w) {
    visit(t.grad_dtype, [&](auto g) {
      for (int64_t unit = first; unit < last; ++unit) step_unit<decltype(w), decltype(g)>(t, unit, config);
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
