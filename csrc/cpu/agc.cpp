#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {

void agc(const AgcTensor& t, const AgcConfig& config, int64_t first, int64_t last) {
  const int64_t n = t.units.length;
  visit(t.weight_dtype, [&](auto w) {
    visit(t.grad_dtype, [&](auto g) {
      const auto* weight = static_cast<const decltype(w)*>(t.weight);
      auto* grad = static_cast<decltype(g)*>(t.grad);
      for (int64_t unit = first; unit < last; ++unit) clip_unit(Team{}, weight + unit * n, grad + unit * n, n, config);
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
