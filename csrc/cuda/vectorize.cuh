// How a team reads and writes a unit: in 16-byte pieces where memory is aligned to them, element by element where not.
#pragma once

#include <cuda_runtime.h>

#include "../kernels/number.h"

namespace nfk {
namespace cuda {
namespace {

constexpr int kPiece = 16;  // bytes of the widest access of a thread

NFK_INLINE int misalignment(const void* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kPiece);
}

__device__ inline void write(double* p, double value) { __stwb(p, value); }
__device__ inline void write(float* p, float value) { __stwb(p, value); }
__device__ inline void write(bfloat16* p, bfloat16 value) { __stwb(&p->bits, value.bits); }
__device__ inline void write(float16* p, float16 value) { __stwb(&p->bits, value.bits); }
__device__ inline void write(UnitStatistics* p, UnitStatistics value) {
  write(&p->steps, value.steps);
  write(&p->clipped, value.clipped);
  write(&p->largest, value.largest);
}

// A unit where it lies in global memory.
template <class T>
struct Element {
  T* p;
  __device__ void operator=(T value) const { write(p, value); }
};
template <class T>
__device__ typename Accumulate<T>::type load(Element<T> element) {
  return nfk::load(*element.p);
}

template <class T>
struct Global {
  using value_type = T;
  T* data;
  int64_t n;
  __device__ Element<T> operator[](int64_t i) const { return {data + i}; }
  __device__ int64_t range() const { return n; }
};
template <class T>
struct Global<const T> {
  using value_type = T;
  const T* data;
  int64_t n;
  __device__ T operator[](int64_t i) const { return data[i]; }
  __device__ int64_t range() const { return n; }
};

// The element-th element of the group-th group that a thread holds of a unit.
struct Slot {
  int group;
  int element;
};

// How units are dealt out to the threads of a team: thread t gets the groups number t, t + threads, ... Loops over groups
// and elements are unrolled, so that what a thread holds stays in registers.
template <int kElements_, int kGroups_>
struct Deal {
  static constexpr int kElements = kElements_;  // of a group
  static constexpr int kGroups = kGroups_;      // of a thread
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Elements of a group that is whole pieces of two types.
template <class A, class B>
constexpr int kElements = kPiece / smaller(sizeof(A), sizeof(B));

template <class D>
struct Slots {
  using Dealt = D;
  using SlotsOfFirst = Slots;

  int first;   // index in the unit of the thread's first element; negative where the first group begins before the unit
  int stride;  // from group to group
  int n;

  // `head`: elements of the first group that lie before the unit.
  __device__ static Slots of(int thread, int threads, int head, int64_t n) {
    return {thread * D::kElements - head, threads * D::kElements, static_cast<int>(n)};
  }
  __device__ int start(int group) const { return first + group * stride; }
  __device__ bool has(int index) const { return static_cast<unsigned>(index) < static_cast<unsigned>(n); }
  __device__ bool whole(int index) const { return index >= 0 && index + D::kElements <= n; }

  // The groups from `group` on.
  template <class Part>
  __device__ Slots<Part> from(int group) const {
    return {start(group), stride, n};
  }

  // Calls f(group, index of its first element) for the groups that hold something of the unit.
  template <class F>
  __device__ void each_group(F f) const {
#pragma unroll
    for (int group = 0; group < D::kGroups; ++group) {
      if (start(group) >= n) break;
      f(group, start(group));
    }
  }

  template <class F>
  __device__ void each(F f) const {
    each_group([&](int group, int index) {
#pragma unroll
      for (int element = 0; element < D::kElements; ++element) {
        if (has(index + element)) f(Slot{group, element});
      }
    });
  }
};

// Both sides dealt out alike.
template <class D>
struct Alike {
  using SlotsOfFirst = Slots<D>;
  Slots<D> slots;

  template <class F>
  __device__ void each(F f) const {
    slots.each([&](Slot slot) { f(slot, slot); });
  }
};

// The first side is dealt out, the second transposed against it: element row * columns + column is there element
// column * rows + row.
template <class D>
struct Across {
  using SlotsOfFirst = Slots<D>;
  Slots<D> slots;
  int rows;
  int columns;

  template <class F>
  __device__ void each(F f) const {
    slots.each_group([&](int group, int index) {
      int row = index / columns, column = index % columns;  // one division per group
#pragma unroll
      for (int element = 0; element < D::kElements; ++element) {
        if (slots.has(index + element)) f(Slot{group, element}, column * rows + row);
        if (++column == columns) column = 0, ++row;
      }
    });
  }
};

// A thread's share of a unit, in registers.
template <class T, class D>
struct Held {
  using value_type = T;
  static constexpr int kPieces = D::kElements * sizeof(T) / kPiece;  // of a group
  static constexpr int kInPiece = kPiece / sizeof(T);
  static_assert(kPieces * kInPiece == D::kElements, "groups are whole pieces");

  Slots<D> slots;
  T values[D::kGroups][D::kElements];

  explicit __device__ Held(Slots<D> slots) : slots(slots) {}
  __device__ Slots<D> range() const { return slots; }
  __device__ T operator[](Slot slot) const { return values[slot.group][slot.element]; }
  __device__ T& operator[](Slot slot) { return values[slot.group][slot.element]; }

  // read(const uint4*) reads a piece.
  template <class Read>
  __device__ void fill(const T* unit, Read read) {
    slots.each_group([&](int group, int index) {
      const T* from = unit + index;
      if (slots.whole(index) && misalignment(from) == 0) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const uint4 bits = read(reinterpret_cast<const uint4*>(from) + piece);
          memcpy(&values[group][piece * kInPiece], &bits, kPiece);
        }
      } else {
#pragma unroll
        for (int element = 0; element < D::kElements; ++element) {
          if (slots.has(index + element)) values[group][element] = from[element];
        }
      }
    });
  }

  __device__ void store_to(T* unit) const {
    slots.each_group([&](int group, int index) {
      T* to = unit + index;
      if (slots.whole(index) && misalignment(to) == 0) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          uint4 bits;
          memcpy(&bits, &values[group][piece * kInPiece], kPiece);
          __stwb(reinterpret_cast<uint4*>(to) + piece, bits);
        }
      } else {
#pragma unroll
        for (int element = 0; element < D::kElements; ++element) {
          if (slots.has(index + element)) write(to + element, values[group][element]);
        }
      }
    });
  }
};

// D::kGroups of the groups that a thread holds.
template <class Held, class D>
struct Part {
  using value_type = typename Held::value_type;
  Held& held;
  int first;  // group

  __device__ Slots<D> range() const { return held.slots.template from<D>(first); }
  __device__ auto& operator[](Slot slot) const { return held[Slot{first + slot.group, slot.element}]; }
};

// Memory that no thread writes during the launch is read through the first-level cache; what this launch rewrites is not.
struct ReadOnly {
  __device__ uint4 operator()(const uint4* p) const { return __ldg(p); }
};
struct Rewritten {
  __device__ uint4 operator()(const uint4* p) const { return __ldcg(p); }
};

}  // namespace
}  // namespace cuda
}  // namespace nfk
