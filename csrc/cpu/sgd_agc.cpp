#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {
namespace {

// Of a tensor that may be null: none.
template <class T, class Void>
Run<T> unit_of(Void* tensor, int64_t unit, int64_t n) {
  return {tensor ? static_cast<T*>(tensor) + unit * n : nullptr, n};
}

template <class W, class G>
void step_unit(const SgdTensor& t, int64_t unit, const SgdConfig& config) {
  const int64_t n = t.units.length;
  const Run<W> weight = unit_of<W>(t.weight, unit, n);
  const auto grad = unit_of<const G>(t.grad, unit, n);
  auto momentum = unit_of<W>(t.momentum, unit, n);
  auto average = unit_of<typename Accumulate<W>::type>(t.average, unit, n);
  UnitStatistics* statistics = t.statistics ? t.statistics + unit : nullptr;
  const auto step = descent_of(Team{}, Run<const W>{weight.data, n}, grad, statistics, config);
  step_elements(t, Team{}, weight, grad, momentum, average, step, config.average_decay);
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
