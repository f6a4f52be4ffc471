// Adaptive gradient clipping of all parameters of a pair of dtypes in one launch: W and G are read once, G is written where
// a unit is clipped.
#include "launch.cuh"

namespace nfk {
namespace cuda {
namespace {

// Pieces of 16 bytes that a thread holds of each tensor: with four warps, 18,432 bytes, or 4,608 float32.
constexpr int kPieces = 9;

struct Row {
  const void* weight;
  void* grad;
  UnitStatistics* statistics;
  int64_t length;
  int count;
  int end;
};
using AgcTable = Table<Row, AgcConfig>;

template <class T>
using DealOf = Deal<kPiece / static_cast<int>(sizeof(T)), kPieces>;

template <class T>
NFK_INLINE Share share_of(const void* tensor, int64_t length) {
  const bool aligned = misalignment(tensor) == 0 && length * static_cast<int64_t>(sizeof(T)) % kPiece == 0;
  return share_of(length, DealOf<T>::kElements, DealOf<T>::kGroups, aligned);
}

template <class W, class G>
NFK_INLINE Share share_of(const Row& row) {
  const Share weight = share_of<W>(row.weight, row.length), grad = share_of<G>(row.grad, row.length);
  return weight > grad ? weight : grad;
}

template <class W, class G>
int64_t blocks_of(const Row& row) {
  if (row.length == 1) return blocks_of_singles(row.count);
  return blocks_of(share_of<W, G>(row), row.count);
}

__device__ UnitStatistics* statistics_of(const Row& row, int64_t unit) {
  return row.statistics ? row.statistics + unit : nullptr;
}

template <class W, class G>
__device__ void clip_single_elements(const Row& row, int block, AgcConfig config) {
  config.norm = Norm::one;  // of one element all norms are the same
  each_single(block, row.count, [&](int unit) {
    const Global<const W> weight{static_cast<const W*>(row.weight) + unit, 1};
    clip_unit(OneThread{}, weight, Global<G>{static_cast<G*>(row.grad) + unit, 1}, statistics_of(row, unit), config);
  });
}

template <class T>
__device__ Slots<DealOf<T>> slots_of(const Team& team, const T* unit, int64_t n) {
  return Slots<DealOf<T>>::of(team.thread, team.threads, misalignment(unit) / sizeof(T), n);
}

// A unit that fits the team's registers. Returns false, and has written nothing, where float32 does not hold what is on the
// way.
template <class W, class G>
__device__ bool clip_held_unit(const Team& team, const W* weight, G* grad, int64_t n, UnitStatistics* statistics,
                               const AgcConfig& config) {
  Held<W, DealOf<W>> w(slots_of(team, weight, n));
  Held<G, DealOf<G>> g(slots_of(team, static_cast<const G*>(grad), n));
  w.fill(weight, ReadOnly{});
  g.fill(grad, Rewritten{});
  const auto decision = decide<Wider<W, G>>(team, w, g, config);
  if (!decision.exact) return false;
  apply(team, g, statistics, decision);
  if (decision.clips) g.store_to(grad);
  return true;
}

template <class W, class G>
__device__ void clip_unit_of(const Team& team, const Row& row, int64_t unit, bool held, const AgcConfig& config) {
  const W* weight = static_cast<const W*>(row.weight) + unit * row.length;
  G* grad = static_cast<G*>(row.grad) + unit * row.length;
  UnitStatistics* statistics = statistics_of(row, unit);
  if (held && config.norm != Norm::p && clip_held_unit(team, weight, grad, row.length, statistics, config)) return;
  clip_unit(team, Global<const W>{weight, row.length}, Global<G>{grad, row.length}, statistics, config);
}

// At most 96 registers a thread, so that 5 blocks, 20 warps, share a multiprocessor. A block has all loads of its units
// under way at once: 36 KB where they fill it, 8 KB where its four warps have 256 float32 each, so 180 and 40 KB per
// multiprocessor; 4.8 TB/s times 0.7 us of latency, over an H200's 132, are 25 KB.
template <class W, class G>
__global__ void __launch_bounds__(kBlock, 5) clip(const AgcTable __grid_constant__ table) {
  const Place place = table.find(blockIdx.x);
  const Row& row = table.rows[place.tensor];
  if (row.length == 1) return clip_single_elements<W, G>(row, place.block, table.common);
  const Share share = share_of<W, G>(row);
  const Work work(share, place.block);
  if (work.unit < row.count) clip_unit_of<W, G>(work.team, row, work.unit, share != Share::long_unit, table.common);
}

template <class W, class G>
void clip_tensors(const std::vector<const AgcTensor*>& tensors, const AgcConfig& config, Queue queue) {
  Launcher<Row, AgcConfig> launcher("agc", clip<W, G>, config, queue);
  for (const AgcTensor* t : tensors) {
    const Row row{t->weight, t->grad, t->statistics, t->units.length, checked_count("agc", t->units), 0};
    launcher.add(row, blocks_of<W, G>(row));
  }
  launcher.flush();
}

}  // namespace

void agc(const std::vector<AgcTensor>& tensors, const AgcConfig& config, Queue queue) {
  const auto dtypes_of = [](const AgcTensor& t) { return std::make_pair(t.weight_dtype, t.grad_dtype); };
  each_pair_of_dtypes(tensors, dtypes_of, [&](auto w, auto g, const auto& of_pair) {
    clip_tensors<decltype(w), decltype(g)>(of_pair, config, queue);
  });
}

}  // namespace cuda
}  // namespace nfk
