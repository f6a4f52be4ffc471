#include "isa.h"
#include "team.h"

namespace nfk {
namespace cpu {
namespace NFK_ISA {

void scaled_activation(const ActivationTensor& t, Activation activation, double scale, int64_t first, int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* x = static_cast<const T*>(t.x) + first;
      activate<decltype(a)::value>(Team{}, x, static_cast<T*>(t.out) + first, last - first, scale);
    });
  });
}

void scaled_activation_backward(const ActivationTensor& t, Activation activation, double scale, int64_t first,
                                int64_t last) {
  visit(activation, [&](auto a) {
    visit(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* x = static_cast<const T*>(t.x) + first;
      const T* grad = static_cast<const T*>(t.grad) + first;
      activate_backward<decltype(a)::value>(Team{}, grad, x, static_cast<T*>(t.out) + first, last - first, scale);
    });
  });
}

}  // namespace NFK_ISA
}  // namespace cpu
}  // namespace nfk
