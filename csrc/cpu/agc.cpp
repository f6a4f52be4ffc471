#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {

void agc(const AgcTensor& t, const AgcConfig& config, int64_t first, int64_t last) {
  const int64_t n = t.units.length;
  visit(t.weight_dtype, [&](auto w) {
    visit(t.grad_dtype, [&](auto g) {
      using W = const decltype(w);
      using G = decltype(g);
      for (int64_t unit = first; unit < last; ++unit) {
        const Run<W> weight{static_cast<W*>(t.weight) + unit * n, n};
        UnitStatistics* statistics = t.statistics ? t.statistics + unit : nullptr;
        clip_unit(Team{}, weight, Run<G>{static_cast<G*>(t.grad) + unit * n, n}, statistics, config);
      }
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
