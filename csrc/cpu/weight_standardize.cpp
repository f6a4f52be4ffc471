#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {

void weight_standardize(const WeightTensor& t, double eps, EpsForm form, int64_t first, int64_t last) {
  visit(t.weight_dtype, [&](auto w) {
    visit(t.out_dtype, [&](auto o) {
      for (int64_t unit = first; unit < last; ++unit) standardize_unit(Team{}, t, unit, eps, form, w, o);
    });
  });
}

void weight_standardize_backward(const WeightTensor& t, double eps, EpsForm form, int64_t first, int64_t last) {
  visit(t.weight_dtype, [&](auto w) {
    visit(t.out_dtype, [&](auto o) {
      for (int64_t unit = first; unit < last; ++unit) standardize_unit_backward(Team{}, t, unit, eps, form, w, o);
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
