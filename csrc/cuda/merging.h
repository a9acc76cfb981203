// The plan of value_gradient.cu: regions, windows and shared memory. Plain C++.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace maskdino {
namespace cuda {

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
  m.stride = static_cast<int>((cells + 31) / 32 * 32 + 8);  // lanes then read from different banks
  const int64_t channels = std::min(g.channels, Merging::kMostChannels);
  const int64_t query_bytes =
      Merging::kCornerBytes * 4 * g.samples + sizeof(float) * (channels + 8);
  m.shared_bytes = sizeof(SampleLevel) * g.samples + Merging::kRegionBytes * (g.levels + 1) +
                   Merging::kOutsideBytes * Merging::kMostOutside + query_bytes * m.queries +
                   int64_t{2 * Merging::kQueries * sizeof(float)} * m.stride;
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
  const auto fits = [&](const Merging& plan) {
    return plan.first_cell[g.levels] <= Merging::kMostCells && plan.shared_bytes <= limit;
  };
  std::sort(order, order + g.levels, [&](int a, int b) { return tokens(a) < tokens(b); });
  size_windows(g, m);
  if (!fits(m)) return false;
  for (int margin = kLeast + 1; margin <= kMost; ++margin) {
    for (int k = 0; k < g.levels; ++k) {
      Merging wider = m;
      wider.margin[order[k]] = margin;
      size_windows(g, wider);
      if (fits(wider)) m = wider;
    }
  }
  return true;
}

// False where the GPU or the sizes do not allow it.
inline bool plan_merging(const Geometry& g, Merging& m) {
  int device = 0, generation = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const bool whole = g.channels == 16 || g.channels % Merging::kMostChannels == 0;
  const int longest = std::max(*std::max_element(g.width, g.width + g.levels),
                               *std::max_element(g.height, g.height + g.levels));
  if (generation < 8 || !whole || longest > Merging::kMostCellsInLine) return false;
  m = {};
  m.side = 8;
  for (int level = 1; level < g.levels; ++level) {
    const int64_t largest = int64_t{g.width[m.base_level]} * g.height[m.base_level];
    if (int64_t{g.width[level]} * g.height[level] > largest) m.base_level = level;
  }
  m.regions_in_line = (g.width[m.base_level] + m.side - 1) / m.side;
  const int64_t lines = (g.height[m.base_level] + m.side - 1) / m.side;
  const int parts = std::max(1, g.channels / Merging::kMostChannels);
  m.grid = {static_cast<unsigned>(m.regions_in_line * lines),
            static_cast<unsigned>(g.heads * parts), static_cast<unsigned>(g.images)};
  // A region has 64 + 16 + 4 + 1 queries where sides halve from level to level.
  for (m.queries = 96; m.queries > 0; m.queries -= Merging::kQueries) {
    if (widen_windows(g, shared, m)) return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace maskdino
