// One step of stochastic gradient descent of all parameters of a pair of dtypes in one launch, gradients clipped on the way:
// weight, gradient, momentum and average are read once, all but the gradient are written once.
#include "launch.cuh"

namespace nfk {
namespace cuda {
namespace {

// A unit's weight and gradient stay in registers; momentum and average follow in so many parts, for which there are
// registers too. Of a part a thread holds at least so many bytes, counted in the accumulation type: with four warps and three
// parts, 4,608 float32.
constexpr int kParts = 3;
constexpr int kPartBytes = 48;
// Parameter groups of a launch. Most models have two or three: clipped or not, with weight decay or without.
constexpr int kGroups = 8;

struct Row {
  void* weight;
  const void* grad;
  void* momentum;  // null: none
  void* average;   // null: none
  UnitStatistics* statistics;
  int64_t length;
  int count;
  int group;  // of this launch
  int end;
};

struct Common {
  SgdConfig configs[kGroups];
  const float* lrs[kGroups];
  const float* grad_scale;
  const float* found_inf;

  // Whether the step is one of those without effect. Blocks read it first: a hit in the first-level cache for most.
  __device__ bool skips() const { return found_inf && *found_inf != 0; }
  __device__ SgdConfig config(int group) const {
    SgdConfig config = configs[group];
    config.clip.norm = Norm::two;  // as it is: so told, the compiler leaves out the others
    if (lrs[group]) config.lr *= *lrs[group];
    if (grad_scale) config.grad_factor /= *grad_scale;
    return config;
  }
};
using SgdTable = Table<Row, Common>;

// All tensors of a unit are dealt out alike.
template <class W, class G>
constexpr int kGroupBytes = kElements<W, G>* static_cast<int>(sizeof(Wider<W, G>));
template <class W, class G>
using PartOf = Deal<kElements<W, G>, (kPartBytes + kGroupBytes<W, G> - 1) / kGroupBytes<W, G>>;
template <class W, class G>
using DealOf = Deal<kElements<W, G>, kParts * PartOf<W, G>::kGroups>;

// Elements of the first group that lie before the weight, and so where the groups of all tensors begin.
template <class D, class W>
NFK_INLINE int head_of(const W* weight) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(weight) / sizeof(W) % D::kElements);
}

template <class W, class G>
NFK_INLINE Share share_of(const Row& row) {
  using D = DealOf<W, G>;
  const bool aligned = head_of<D>(static_cast<const W*>(row.weight)) == 0 && row.length % D::kElements == 0;
  return share_of(row.length, D::kElements, D::kGroups, aligned);
}

template <class W, class G>
int64_t blocks_of(const Row& row) {
  if (row.length == 1) return blocks_of_singles(row.count);
  return blocks_of(share_of<W, G>(row), row.count);
}

// Where a unit lies; from the table at each use, which is cheaper than registers.
template <class W, class G>
struct Unit {
  using Average = typename Accumulate<W>::type;

  const Row& row;
  int index;

  __device__ W* weight() const { return static_cast<W*>(row.weight) + offset(); }
  __device__ const G* grad() const { return static_cast<const G*>(row.grad) + offset(); }
  __device__ W* momentum() const { return row.momentum ? static_cast<W*>(row.momentum) + offset() : nullptr; }
  __device__ Average* average() const { return row.average ? static_cast<Average*>(row.average) + offset() : nullptr; }
  __device__ UnitStatistics* statistics() const { return row.statistics ? row.statistics + index : nullptr; }
  __device__ int64_t offset() const { return index * row.length; }
};

// What is held of a unit's momentum and average: a part.
template <class W, class G>
struct States {
  using P = PartOf<W, G>;
  Held<W, P> momentum;
  Held<typename Unit<W, G>::Average, P> average;

  explicit __device__ States(Slots<P> part) : momentum(part), average(part) {}
  __device__ void fill(const Unit<W, G>& unit) {
    if (unit.row.momentum) momentum.fill(unit.momentum(), Rewritten{});
    if (unit.row.average) average.fill(unit.average(), Rewritten{});
  }
  __device__ void store_to(const Unit<W, G>& unit) const {
    if (unit.row.momentum) momentum.store_to(unit.momentum());
    if (unit.row.average) average.store_to(unit.average());
  }
};

// A unit that fits the team's registers.
template <class W, class G>
__device__ void step_held_unit(const Team& team, const Unit<W, G>& unit, const Common& common) {
  using D = DealOf<W, G>;
  using P = PartOf<W, G>;
  const auto slots = Slots<D>::of(team.thread, team.threads, head_of<D>(unit.weight()), unit.row.length);
  Held<W, D> weight(slots);
  Held<G, D> grad(slots);
  weight.fill(unit.weight(), Rewritten{});
  grad.fill(unit.grad(), ReadOnly{});
  const SgdConfig config = common.config(unit.row.group);
  const auto step = descent_of(team, weight, grad, unit.statistics(), config);
#pragma unroll
  for (int first = 0; first < D::kGroups; first += P::kGroups) {
    States<W, G> states(slots.template from<P>(first));
    states.fill(unit);
    const Part<Held<W, D>, P> some{weight, first};
    const Part<Held<G, D>, P> of_grad{grad, first};
    step_elements(unit.row, team, some, of_grad, states.momentum, states.average, step, config.average_decay);
    states.store_to(unit);
  }
  weight.store_to(unit.weight());
}

template <class Team, class W, class G>
__device__ void step_unit_in_memory(const Team& team, const Unit<W, G>& unit, const Common& common) {
  const int64_t n = unit.row.length;
  const Global<const G> grad{unit.grad(), n};
  Global<W> momentum{unit.momentum(), n};
  Global<typename Unit<W, G>::Average> average{unit.average(), n};
  const SgdConfig config = common.config(unit.row.group);
  const auto step = descent_of(team, Global<const W>{unit.weight(), n}, grad, unit.statistics(), config);
  step_elements(unit.row, team, Global<W>{unit.weight(), n}, grad, momentum, average, step, config.average_decay);
}

template <class W, class G>
constexpr int kBlocks = std::is_same<Wider<W, G>, double>::value ? 3 : 4;

// At most 128 registers a thread, so that 4 blocks, 16 warps, share a multiprocessor; in float64, 3. Where float32 units fill
// a block, it has all of weight and gradient under way at once, then momentum and average in three parts: 36 KB and three
// times 12 KB (6 KB without an average), so 144 and 48 KB per multiprocessor, where 25 KB hide an H200's latency. Four times
// a microsecond of latency, and one for the table, scalars and norms, are less than the 14 us that a multiprocessor's
// 132nd of 4.8 TB/s takes for the 129 KB of each of its 4 blocks. Blocks whose warps have 256 float32 each wait twice, 3 us,
// and 4 of them take 3 us to transfer.
template <class W, class G>
__global__ void __launch_bounds__(kBlock, kBlocks<W, G>) step(const SgdTable __grid_constant__ table) {
  if (table.common.skips()) return;
  const Place place = table.find(blockIdx.x);
  const Row& row = table.rows[place.tensor];
  if (row.length == 1) {
    each_single(place.block, row.count, [&](int unit) {
      step_unit_in_memory(OneThread{}, Unit<W, G>{row, unit}, table.common);
    });
    return;
  }
  const Share share = share_of<W, G>(row);
  const Work work(share, place.block);
  if (work.unit >= row.count) return;
  const Unit<W, G> unit{row, work.unit};
  if (share == Share::long_unit) {
    step_unit_in_memory(work.team, unit, table.common);
  } else {
    step_held_unit(work.team, unit, table.common);
  }
}

// Groups that a launch holds the configurations of, from `first` on.
Common common_of(const std::vector<SgdConfig>& configs, const SgdScalars& scalars, int first) {
  Common common{{}, {}, scalars.grad_scale, scalars.found_inf};
  for (int i = 0; i < kGroups && first + i < static_cast<int>(configs.size()); ++i) {
    common.configs[i] = configs[first + i];
    common.lrs[i] = scalars.lrs[first + i];
  }
  return common;
}

template <class W, class G>
void step_tensors(const std::vector<const SgdTensor*>& tensors, const std::vector<SgdConfig>& configs,
                  const SgdScalars& scalars, Queue queue) {
  for (int first = 0; first < static_cast<int>(configs.size()); first += kGroups) {
    Launcher<Row, Common> launcher("sgd_agc", step<W, G>, common_of(configs, scalars, first), queue);
    for (const SgdTensor* t : tensors) {
      if (t->group / kGroups != first / kGroups) continue;
      const Row row{t->weight,       t->grad, t->momentum, t->average, t->statistics, t->units.length,
                    checked_count("sgd_agc", t->units), t->group - first, 0};
      launcher.add(row, blocks_of<W, G>(row));
    }
    launcher.flush();
  }
}

}  // namespace

void sgd_agc(const std::vector<SgdTensor>& tensors, const std::vector<SgdConfig>& configs, const SgdScalars& scalars,
             Queue queue) {
  const auto dtypes_of = [](const SgdTensor& t) { return std::make_pair(t.weight_dtype, t.grad_dtype); };
  each_pair_of_dtypes(tensors, dtypes_of, [&](auto w, auto g, const auto& of_pair) {
    step_tensors<decltype(w), decltype(g)>(of_pair, configs, scalars, queue);
  });
}

}  // namespace cuda
}  // namespace nfk
