#include "isa.h"

#include <stdexcept>

namespace nfk {
namespace cpu {
namespace {

#define NFK_KERNELS(isa)                                                                                   \
  {                                                                                                        \
    #isa, isa::agc, isa::sgd_agc, isa::weight_standardize, isa::weight_standardize_backward,               \
        isa::scaled_activation, isa::scaled_activation_backward, isa::residual, isa::residual_backward     \
  }

const Kernels baseline_kernels = NFK_KERNELS(baseline);
#if defined(NFK_WIDER_ISAS)
const Kernels avx2_kernels = NFK_KERNELS(avx2);
const Kernels avx512_kernels = NFK_KERNELS(avx512);

bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels* find(const std::string& isa) {
  const bool widest = isa == "auto";
#if defined(NFK_WIDER_ISAS)
  if ((widest || isa == "avx512") && runs_avx512()) return &avx512_kernels;
  if ((widest || isa == "avx2") && runs_avx2()) return &avx2_kernels;
#endif
  if (widest || isa == "baseline") return &baseline_kernels;
  throw std::invalid_argument("isa: '" + isa + "' is not one that this build has and this CPU runs");
}

const Kernels*& selected() {
  static const Kernels* current = find("auto");
  return current;
}

}  // namespace

const Kernels& kernels() { return *selected(); }

void select_isa(const std::string& isa) { selected() = find(isa); }

}  // namespace cpu
}  // namespace nfk
