// The CPU kernels are compiled once per instruction set (setup.py passes NFK_ISA and the matching flags) into namespaces of
// that name, and chosen when the program runs. Nothing in those files may have external linkage but the functions declared
// here: the linker would merge an inline function of the AVX-512 build with the baseline's, and crash an older CPU.
#pragma once

#include <cstdint>
#include <string>

#include "../kernels/agc.h"
#include "../kernels/residual.h"
#include "../kernels/scaled_activation.h"
#include "../kernels/sgd_agc.h"
#include "../kernels/weight_standardize.h"
#include "../units.h"

// A build for the sanitizers has the baseline alone: all sets compile one source.
#if defined(__x86_64__) && !defined(NFK_BASELINE_ONLY)
#define NFK_WIDER_ISAS
#endif

namespace nfk {
namespace cpu {

// Each kernel works on the units (for activations: the elements) first .. last-1.
#define NFK_DECLARE_KERNELS(isa)                                                                                       \
  namespace isa {                                                                                                      \
  void agc(const AgcTensor&, const AgcConfig&, int64_t first, int64_t last);                                           \
  void sgd_agc(const SgdTensor&, const SgdConfig&, int64_t first, int64_t last);                                       \
  void weight_standardize(const WeightTensor&, double eps, EpsForm, int64_t first, int64_t last);                      \
  void weight_standardize_backward(const WeightTensor&, double eps, EpsForm, int64_t first, int64_t last);             \
  void scaled_activation(const ActivationTensor&, Activation, double scale, int64_t first, int64_t last);              \
  void scaled_activation_backward(const ActivationTensor&, Activation, double scale, int64_t first, int64_t last);     \
  void residual(const ResidualTensor&, Activation, double scale, int64_t first, int64_t last);                         \
  void residual_backward(const ResidualTensor&, Activation, double scale, int64_t first, int64_t last);                \
  }

NFK_DECLARE_KERNELS(baseline)
#if defined(NFK_WIDER_ISAS)
NFK_DECLARE_KERNELS(avx2)
NFK_DECLARE_KERNELS(avx512)
#endif

struct Kernels {
  const char* isa;
  decltype(&baseline::agc) agc;
  decltype(&baseline::sgd_agc) sgd_agc;
  decltype(&baseline::weight_standardize) weight_standardize;
  decltype(&baseline::weight_standardize_backward) weight_standardize_backward;
  decltype(&baseline::scaled_activation) scaled_activation;
  decltype(&baseline::scaled_activation_backward) scaled_activation_backward;
  decltype(&baseline::residual) residual;
  decltype(&baseline::residual_backward) residual_backward;
};

// The widest set that this CPU runs, unless select_isa chose another.
const Kernels& kernels();

// Throws std::invalid_argument for a name that was not built or that this CPU cannot run; "auto" is the widest.
void select_isa(const std::string& isa);

}  // namespace cpu
}  // namespace nfk
