#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {
namespace {

template <class T, class Data>
Run<T> unit_of(Data* data, const WeightTensor& t, int64_t unit) {
  return {static_cast<T*>(data) + unit * t.units.length, t.units.length};
}

template <class W, class O>
void forward(const WeightTensor& t, double eps, EpsForm form, int64_t unit) {
  const auto weight = unit_of<const W>(t.weight, t, unit);
  const auto out = unit_of<O>(t.out, t, unit);
  const auto by = standard_of<W>(t, unit, weight.n, eps, form);
  if (t.transposed) {
    standardize_unit(Team{}, weight, out, by, Transposed{t.columns, weight.n / t.columns});
  } else {
    standardize_unit(Team{}, weight, out, by, Linear{weight.n});
  }
}

template <class W, class O>
void backward(const WeightTensor& t, double eps, EpsForm form, int64_t unit) {
  const auto weight = unit_of<const W>(t.weight, t, unit);
  const auto grad_out = unit_of<const O>(t.grad_out, t, unit);
  const auto grad_weight = unit_of<W>(t.grad_weight, t, unit);
  const auto by = standard_of<W>(t, unit, weight.n, eps, form);
  const auto grad_gain =
      t.transposed ? standardize_unit_backward(Team{}, weight, grad_out, grad_weight, by,
                                               Transposed{weight.n / t.columns, t.columns})
                   : standardize_unit_backward(Team{}, weight, grad_out, grad_weight, by, Linear{weight.n});
  if (t.grad_gain) static_cast<W*>(t.grad_gain)[unit] = store<W>(grad_gain);
}

}  // namespace

void weight_standardize(const WeightTensor& t, double eps, EpsForm form, int64_t first, int64_t last) {
  visit(t.weight_dtype, [&](auto w) {
    visit(t.out_dtype, [&](auto o) {
      for (int64_t unit = first; unit < last; ++unit) forward<decltype(w), decltype(o)>(t, eps, form, unit);
    });
  });
}

void weight_standardize_backward(const WeightTensor& t, double eps, EpsForm form, int64_t first, int64_t last) {
  visit(t.weight_dtype, [&](auto w) {
    visit(t.out_dtype, [&](auto o) {
      for (int64_t unit = first; unit < last; ++unit) backward<decltype(w), decltype(o)>(t, eps, form, unit);
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
