// Regions of an image for value_gradient.cu: which queries lie in a block's region, and where the
// windows around it begin. A query belongs to the region that its centre lies in.
#pragma once

#include "sampling.cuh"

namespace maskdino {
namespace cuda {

// What a block handles of a level: the pixel at the window's top left, and the queries.
struct alignas(16) RegionLevel {
  int left, top;
  int first_column, columns, first_line, lines;
  int first_query;  // number of queries of the levels before
  int outside;      // in the entry behind the last level: number of corners outside
};
static_assert(sizeof(RegionLevel) == Merging::kRegionBytes);

// Twice the distance in pixels, times the base level's side, from a level's first pixel centre to
// where region `region` begins. Sides are at most Merging::kMostCellsInLine, so 32 bits hold it.
__device__ __forceinline__ int region_begin(const Merging& m, int region, int side, int base) {
  return 2 * m.side * region * side - base;
}

// Number of pixel centres of a level before where a region begins, for sides of the level and of
// the base level that the regions are cut from.
__device__ __forceinline__ int centres_before(const Merging& m, int region, int side, int base) {
  return min((region_begin(m, region, side, base) + 2 * base - 1) / (2 * base), side);
}

// First pixel of a window `extent` wide, inside the map.
__device__ __forceinline__ int window_begin(const Merging& m, int region, int side, int base,
                                            int margin, int extent) {
  const int first = (region_begin(m, region, side, base) + 2 * base) / (2 * base) - 1 - margin;
  return max(0, min(first, side - extent));
}

// Lays out the levels of this block's region; entry `levels` counts all queries.
__device__ __forceinline__ void fill_region(const Geometry& g, const Merging& m,
                                            RegionLevel* region) {
  const int column = blockIdx.x % m.regions_in_line, line = blockIdx.x / m.regions_in_line;
  const int width = g.width[m.base_level], height = g.height[m.base_level];
  for (int level = threadIdx.x; level < g.levels; level += blockDim.x) {
    RegionLevel r{};
    r.left = window_begin(m, column, g.width[level], width, m.margin[level], m.width[level]);
    r.top = window_begin(m, line, g.height[level], height, m.margin[level], m.height[level]);
    r.first_column = centres_before(m, column, g.width[level], width);
    r.columns = centres_before(m, column + 1, g.width[level], width) - r.first_column;
    r.first_line = centres_before(m, line, g.height[level], height);
    r.lines = centres_before(m, line + 1, g.height[level], height) - r.first_line;
    region[level] = r;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int queries = 0;
    for (int level = 0; level < g.levels; ++level) {
      region[level].first_query = queries;
      queries += region[level].columns * region[level].lines;
    }
    region[g.levels].first_query = queries;
    region[g.levels].outside = 0;
  }
  __syncthreads();
}

// The place of one of the region's queries.
__device__ __forceinline__ Place<float> find_query(const Geometry& g, const RegionLevel* region,
                                                   int head, int index) {
  Place<float> place{};
  place.image = blockIdx.z;
  place.head = head;
  place.active = index < region[g.levels].first_query;
  if (!place.active) return place;
  int level = 0;
  while (index >= region[level + 1].first_query) ++level;
  const RegionLevel r = region[level];
  const int within = index - r.first_query;
  const int line = r.first_line + within / r.columns;
  const int column = r.first_column + within % r.columns;
  place.query = g.first_token[level] + line * g.width[level] + column;
  place.centre_x = (static_cast<float>(column) + 0.5f) / static_cast<float>(g.width[level]);
  place.centre_y = (static_cast<float>(line) + 0.5f) / static_cast<float>(g.height[level]);
  return place;
}

}  // namespace cuda
}  // namespace maskdino
