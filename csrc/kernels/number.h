// Storage types and their arithmetic: every kernel loads into an accumulation type, computes there, and rounds once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../units.h"

// NFK_SHARED: a whole loop over a unit, which host code calls, so that 16 pairs of dtypes share its 4 instances.
#if defined(__CUDACC__)
#define NFK_INLINE __host__ __device__ __forceinline__
#define NFK_SHARED NFK_INLINE
#else
#define NFK_INLINE inline __attribute__((always_inline))
#define NFK_SHARED __attribute__((noinline))
#endif

namespace nfk {
namespace {  // internal linkage: each instruction-set build keeps its own copy, the linker must not merge them

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
NFK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The type that a storage type is computed in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// The type in which two storage types meet.
template <class A, class B>
using Wider = std::common_type_t<typename Accumulate<A>::type, typename Accumulate<B>::type>;

// How a storage type is read into its accumulation type and rounded back, to nearest even as torch does.
template <class T>
struct Storage {  // float and double hold what they compute
  static NFK_INLINE T load(T x) { return x; }
  static NFK_INLINE T store(T x) { return x; }
};

template <>
struct Storage<bfloat16> {
  static NFK_INLINE float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
  static NFK_INLINE bfloat16 store(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bfloat16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#endif
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  }
};

// One instruction on a GPU; elsewhere branch-free, so that compilers vectorize it.
template <>
struct Storage<float16> {
  // Exponent re-bias for normals, integer conversion for subnormals.
  static NFK_INLINE float load(float16 x) {
#if defined(__CUDA_ARCH__)
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
    return out;
#endif
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + 0x38000000u;  // (127 - 15) << 23
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : finite));
  }
  static NFK_INLINE float16 store(float x) {
#if defined(__CUDA_ARCH__)
    float16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#endif
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5, whose last place is 2^-24, makes the float adder round to float16's subnormal grid.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite))};
  }
};

template <class T>
NFK_INLINE typename Accumulate<T>::type load(T x) {
  return Storage<T>::load(x);
}
template <class T, class Acc>
NFK_INLINE T store(Acc x) {
  return Storage<T>::store(static_cast<typename Accumulate<T>::type>(x));
}

// Calls f with a value of the storage type that `dtype` names.
template <class F>
NFK_INLINE auto visit(DType dtype, F f) {
  switch (dtype) {
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
    default:
      return f(float{});
  }
}

// A NaN in x stays, as in torch.clamp; std::fmax drops it.
template <class T>
NFK_INLINE T at_least(T x, T lowest) {
  return x < lowest ? lowest : x;
}

// A NaN of either side stays.
template <class T>
NFK_INLINE T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

}  // namespace
}  // namespace nfk
