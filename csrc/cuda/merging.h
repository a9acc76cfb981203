// The plan of value_gradient.cu: regions, windows and shared memory. Plain C++.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace maskdino {
namespace cuda {

// Shared memory of one multiprocessor of the current device, and the most that a block may have.
struct SharedMemory {
  int64_t processor = 0, block = 0;
};

inline SharedMemory shared_memory() {
  int device = 0, processor = 0, block = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {processor, block};
}

// Sizes of the windows that go with the margins, and the shared memory they need.
inline void size_windows(const Geometry& g, Merging& m) {
  const auto extent = [&m](int64_t side, int64_t base, int margin) {
    const int64_t covered = (m.side * side + base - 1) / base;  // cells of the level
    return static_cast<int>(std::min(side, covered + 2 + 2 * margin));
  };
  int64_t cells = 0;
  for (int level = 0; level < g.levels; ++level) {
    m.width[level] = extent(g.width[level], g.width[m.base_level], m.margin[level]);
    m.height[level] = extent(g.height[level], g.height[m.base_level], m.margin[level]);
    m.first_cell[level] = static_cast<int>(cells);
    cells = std::min<int64_t>(cells + int64_t{m.width[level]} * m.height[level], 1 << 24);
  }
  m.first_cell[g.levels] = static_cast<int>(cells);
  const int64_t corners = int64_t{4} * g.levels * m.queries * m.points;
  m.shared_bytes = sizeof(SampleLevel) * g.samples + Merging::kRegionBytes * (g.levels + 1) +
                   Merging::kCornerBytes * corners +
                   sizeof(float) * g.channels * (m.queries + cells);
}

// Widens the windows, those of small levels first, as far as `limit` bytes allow. False where even
// the narrowest are too large.
inline bool widen_windows(const Geometry& g, int64_t limit, Merging& m) {
  constexpr int kLeast = 2, kMost = 5;  // offsets begin with one to four cells
  int order[kMaxLevels];
  for (int level = 0; level < g.levels; ++level) {
    order[level] = level;
    m.margin[level] = kLeast;
  }
  const auto tokens = [&g](int level) { return int64_t{g.width[level]} * g.height[level]; };
  std::sort(order, order + g.levels, [&](int a, int b) { return tokens(a) < tokens(b); });
  size_windows(g, m);
  if (m.shared_bytes > limit) return false;
  for (int margin = kLeast + 1; margin <= kMost; ++margin) {
    for (int k = 0; k < g.levels; ++k) {
      Merging wider = m;
      wider.margin[order[k]] = margin;
      size_windows(g, wider);
      if (wider.shared_bytes <= limit) m = wider;
    }
  }
  return true;
}

// False where the windows do not fit into shared memory.
inline bool plan_merging(const Geometry& g, Merging& m) {
  m = {};
  m.side = 8;
  m.queries = kMaxThreads / Merging::kLanes;
  m.points = (g.points + 3) / 4 * 4;
  for (int level = 1; level < g.levels; ++level) {
    const int64_t largest = int64_t{g.width[m.base_level]} * g.height[m.base_level];
    if (int64_t{g.width[level]} * g.height[level] > largest) m.base_level = level;
  }
  m.regions_in_line = (g.width[m.base_level] + m.side - 1) / m.side;
  const int64_t lines = (g.height[m.base_level] + m.side - 1) / m.side;
  m.grid = {static_cast<unsigned>(m.regions_in_line * lines), static_cast<unsigned>(g.heads),
            static_cast<unsigned>(g.images)};
  constexpr int64_t kReserved = 1024;  // of every block
  const SharedMemory has = shared_memory();
  const int64_t half = std::min(has.processor / 2 - kReserved, has.block);  // two blocks at a time
  return widen_windows(g, half, m) || widen_windows(g, has.block, m);
}

}  // namespace cuda
}  // namespace maskdino
