// OpenMP loops over the units of many tensors. A unit belongs to one thread, so results do not depend on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../units.h"

namespace nfk {
namespace cpu {

struct Task {
  size_t tensor;
  int64_t first;
  int64_t last;
};

// Elements a task holds at least: 64 Ki are some 10 us of memory traffic, far more than a dynamic schedule costs.
constexpr int64_t kTaskElements = 64 * 1024;

// Cuts `units` units of `length` elements into tasks.
inline void append_tasks(std::vector<Task>& tasks, size_t tensor, Units units) {
  const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, units.length));
  for (int64_t first = 0; first < units.count; first += step) {
    tasks.push_back({tensor, first, std::min(first + step, units.count)});
  }
}

template <class F>
void run_tasks(const std::vector<Task>& tasks, int threads, F f) {
  const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (count > 1)
  for (int64_t i = 0; i < count; ++i) f(tasks[i]);
}

}  // namespace cpu
}  // namespace nfk
