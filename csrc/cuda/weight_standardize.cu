// Scaled weight standardization of all convolutions of a pair of dtypes in one launch, and its gradient in another: every
// tensor is read or written once. A unit stays in registers; where output and weight order its elements differently, the
// side that is read across goes through shared memory.
#include "launch.cuh"

namespace nfk {
namespace cuda {
namespace {

// Bytes that a thread holds of the wider tensor: with four warps, 18,432 bytes, or 4,608 float32.
constexpr int kHeldBytes = 144;

struct Row {
  const void* weight;
  const void* gain;  // null: 1
  void* other;       // the output; backward: its gradient
  void* grad_weight;
  void* grad_gain;
  double scale;
  int64_t length;
  int64_t columns;  // of a unit of the weight; 0 where the output is laid out alike
  int count;
  int end;
};

struct Common {
  double eps;
  EpsForm form;
};
using WeightTable = Table<Row, Common>;

constexpr int larger(int a, int b) { return a > b ? a : b; }

template <class W, class O>
constexpr int kGroupBytes = kElements<W, O>* larger(sizeof(W), sizeof(O));
template <class W, class O>
using DealOf = Deal<kElements<W, O>, (kHeldBytes + kGroupBytes<W, O> - 1) / kGroupBytes<W, O>>;

template <class W, class O>
NFK_INLINE Share share_of(const Row& row) {
  const bool aligned = misalignment(row.weight) == 0 && misalignment(row.other) == 0 &&
                       row.length % kElements<W, O> == 0;
  return share_of(row.length, DealOf<W, O>::kElements, DealOf<W, O>::kGroups, aligned);
}

// A unit in shared memory, read element by element across the order in which it was dealt out. One element in 33 is left
// out: without, the threads that read a column would meet in a few banks.
template <class T, class D>
struct Staged : Held<T, D> {
  static constexpr int kOfThread = D::kGroups * D::kElements * 33 / 32 + 1;  // elements of shared memory

  T* shared;  // this team's

  __device__ Staged(Slots<D> slots, const T* unit, T* shared) : Held<T, D>(slots), shared(shared) {
    this->fill(unit, ReadOnly{});
  }
  __device__ void stage(const Team& team) const {
    this->slots.each_group([&](int group, int index) {
#pragma unroll
      for (int element = 0; element < D::kElements; ++element) {
        if (this->slots.has(index + element)) shared[place(index + element)] = this->values[group][element];
      }
    });
    team.wait();
  }
  using Held<T, D>::operator[];
  __device__ T operator[](int i) const { return shared[place(i)]; }

 private:
  __device__ static int place(int i) { return i + i / 32; }
};

template <class D, class T>
__device__ Slots<D> slots_of(const Team& team, const T* unit, int64_t n) {
  return Slots<D>::of(team.thread, team.threads, misalignment(unit) / static_cast<int>(sizeof(T)), n);
}

// The pointers of one unit.
template <class W, class O>
struct Unit {
  const W* weight;
  O* other;
  W* grad_weight;
  W* grad_gain;
  int64_t n;
  int64_t columns;
  Standard<typename Accumulate<W>::type> by;

  __device__ Unit(const Row& row, int64_t unit, const Common& common)
      : weight(static_cast<const W*>(row.weight) + unit * row.length),
        other(static_cast<O*>(row.other) + unit * row.length),
        grad_weight(static_cast<W*>(row.grad_weight) + unit * row.length),
        grad_gain(row.grad_gain ? static_cast<W*>(row.grad_gain) + unit : nullptr),
        n(row.length),
        columns(row.columns),
        by(standard_of<W>(row, unit, row.length, common.eps, common.form)) {}
  __device__ int64_t rows() const { return n / columns; }
};

struct Forward {
  template <class W, class O>
  __device__ static void held(const Team& team, const Unit<W, O>& unit, void* shared) {
    using D = DealOf<W, O>;
    const Slots<D> slots = slots_of<D>(team, unit.weight, unit.n);
    if (unit.columns == 0) {
      Held<W, D> weight(slots);
      Held<O, D> out(slots);
      weight.fill(unit.weight, ReadOnly{});
      standardize_unit(team, weight, out, unit.by, Alike<D>{slots});
      out.store_to(unit.other);
    } else {
      const Staged<W, D> weight(slots, unit.weight, static_cast<W*>(shared));
      Held<O, D> out(slots_of<D>(team, unit.other, unit.n));
      weight.stage(team);
      const Across<D> order{out.slots, static_cast<int>(unit.columns), static_cast<int>(unit.rows())};
      standardize_unit(team, weight, out, unit.by, order);
      out.store_to(unit.other);
    }
  }

  template <class W, class O>
  __device__ static void in_memory(const Team& team, const Unit<W, O>& unit) {
    const Global<const W> weight{unit.weight, unit.n};
    const Global<O> out{unit.other, unit.n};
    if (unit.columns == 0) {
      standardize_unit(team, weight, out, unit.by, Linear{unit.n});
    } else {
      standardize_unit(team, weight, out, unit.by, Transposed{unit.columns, unit.rows()});
    }
  }
};

struct Backward {
  template <class W, class O>
  __device__ static void held(const Team& team, const Unit<W, O>& unit, void* shared) {
    using D = DealOf<W, O>;
    const O* grad_out = unit.other;
    Held<W, D> weight(slots_of<D>(team, unit.weight, unit.n));
    Held<W, D> grad_weight(weight.slots);
    weight.fill(unit.weight, ReadOnly{});
    if (unit.columns == 0) {
      Held<O, D> grad(weight.slots);
      grad.fill(grad_out, ReadOnly{});
      store_gain(team, unit, standardize_unit_backward(team, weight, grad, grad_weight, unit.by, Alike<D>{weight.slots}));
    } else {
      const Staged<O, D> grad(slots_of<D>(team, grad_out, unit.n), grad_out, static_cast<O*>(shared));
      grad.stage(team);
      const Across<D> order{weight.slots, static_cast<int>(unit.rows()), static_cast<int>(unit.columns)};
      store_gain(team, unit, standardize_unit_backward(team, weight, grad, grad_weight, unit.by, order));
    }
    grad_weight.store_to(unit.grad_weight);
  }

  template <class W, class O>
  __device__ static void in_memory(const Team& team, const Unit<W, O>& unit) {
    const Global<const W> weight{unit.weight, unit.n};
    const Global<const O> grad{unit.other, unit.n};
    const Global<W> grad_weight{unit.grad_weight, unit.n};
    if (unit.columns == 0) {
      store_gain(team, unit, standardize_unit_backward(team, weight, grad, grad_weight, unit.by, Linear{unit.n}));
    } else {
      const Transposed order{unit.rows(), unit.columns};
      store_gain(team, unit, standardize_unit_backward(team, weight, grad, grad_weight, unit.by, order));
    }
  }

 private:
  template <class W, class O, class Acc>
  __device__ static void store_gain(const Team& team, const Unit<W, O>& unit, Acc grad_gain) {
    if (unit.grad_gain && team.thread == 0) write(unit.grad_gain, store<W>(grad_gain));
  }
};

// At most 128 registers a thread and 26 KB of shared memory a block, so that 4 blocks, 16 warps, share a multiprocessor
// (float32 to bfloat16 takes 78 registers forward, for 6 blocks). Where float32 units fill their block, 18 KB of it are
// under way forward and 27 KB with a bfloat16 gradient backward: 72 and 108 KB per multiprocessor, where 25 KB hide an
// H200's latency.
template <class Pass, class W, class O>
__global__ void __launch_bounds__(kBlock, 4) standardize(const WeightTable __grid_constant__ table) {
  using D = DealOf<W, O>;
  constexpr int kOfWarp = kWarp * larger(Staged<W, D>::kOfThread * sizeof(W), Staged<O, D>::kOfThread * sizeof(O));
  __shared__ double shared[kWarps][kOfWarp / sizeof(double)];

  const Place place = table.find(blockIdx.x);
  const Row& row = table.rows[place.tensor];
  const Share share = share_of<W, O>(row);
  const int warp = share == Share::warp ? static_cast<int>(threadIdx.x) / kWarp : 0;
  const int index = share == Share::warp ? place.block * kWarps + warp : place.block;
  if (index >= row.count) return;
  const Team team = share == Share::warp ? Team::warp() : Team::block();
  const Unit<W, O> unit(row, index, table.common);
  if (share == Share::long_unit) {
    Pass::in_memory(team, unit);
  } else {
    Pass::held(team, unit, shared[warp]);
  }
}

template <class Pass, class W, class O>
void standardize_tensors(const char* op, const std::vector<const WeightTensor*>& tensors, const Common& common,
                         Queue queue) {
  Launcher<Row, Common> launcher(op, standardize<Pass, W, O>, common, queue);
  for (const WeightTensor* t : tensors) {
    void* other = t->out ? t->out : const_cast<void*>(t->grad_out);
    const Row row{t->weight,         t->gain,  other,           t->grad_weight,
                  t->grad_gain,      t->scale, t->units.length, t->transposed ? t->columns : 0,
                  checked_count(op, t->units), 0};
    launcher.add(row, blocks_of(share_of<W, O>(row), row.count));
  }
  launcher.flush();
}

template <class Pass>
void standardize_all(const char* op, const std::vector<WeightTensor>& tensors, const Common& common, Queue queue) {
  const auto dtypes_of = [](const WeightTensor& t) { return std::make_pair(t.weight_dtype, t.out_dtype); };
  each_pair_of_dtypes(tensors, dtypes_of, [&](auto w, auto o, const auto& of_pair) {
    standardize_tensors<Pass, decltype(w), decltype(o)>(op, of_pair, common, queue);
  });
}

}  // namespace

void weight_standardize(const std::vector<WeightTensor>& tensors, double eps, EpsForm form, Queue queue) {
  standardize_all<Forward>("weight_standardize", tensors, {eps, form}, queue);
}

void weight_standardize_backward(const std::vector<WeightTensor>& tensors, double eps, EpsForm form, Queue queue) {
  standardize_all<Backward>("weight_standardize_backward", tensors, {eps, form}, queue);
}

}  // namespace cuda
}  // namespace nfk
