// What forward and backward share on the device: which query a thread works on, where its samples
// lie, and talk among the lanes that share a query.
//
// A group of `Group` neighbouring lanes computes one head of one query. Lane k computes location
// and weight of samples k, k + Group, ...; then all lanes go through the samples together, each
// lane for its own channels, and receive a sample's numbers from the lane that computed them.
// Lanes without a query run along (shuffles need whole warps) and write nothing.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace maskdino {
namespace cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Vector elements of `Count` channels, moved by one instruction where they fill 16 bytes.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T element[Count];
};

template <int Group, typename A>
__device__ __forceinline__ A group_sum(A number) {
#pragma unroll
  for (int distance = Group / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(kWholeWarp, number, distance, Group);
  }
  return number;
}

template <int Group, typename A>
__device__ __forceinline__ A group_max(A number) {
#pragma unroll
  for (int distance = Group / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kWholeWarp, number, distance, Group);
    number = other > number ? other : number;
  }
  return number;
}

// The level of a sample, in shared memory: one entry per sample.
struct SampleLevel {
  int width, height, first_token;
};

__device__ __forceinline__ void fill_levels(const Geometry& g, SampleLevel* levels) {
  for (int i = threadIdx.x; i < g.samples; i += blockDim.x) {
    const int level = i / g.points;
    levels[i] = {g.width[level], g.height[level], g.first_token[level]};
  }
  __syncthreads();
}

// The query and head that a group of lanes works on.
template <typename A>
struct Place {
  int64_t image, query;
  int head;
  bool active;
  A centre_x, centre_y;  // of the query's own cell; only where every token is a query
};

template <int Group, typename A>
__device__ __forceinline__ Place<A> find_place(const Geometry& g) {
  Place<A> place{};
  const int64_t block = blockIdx.x % g.blocks_per_head;
  const int64_t pair = blockIdx.x / g.blocks_per_head;
  place.image = pair / g.heads;
  place.head = static_cast<int>(pair % g.heads);
  const int slot = threadIdx.x / Group;
  if (g.tile_side == 0) {
    place.query = block * g.queries_per_block + slot;
    place.active = slot < g.queries_per_block && place.query < g.queries;
  } else {
    int level = 0;
    while (block >= g.first_tile[level + 1]) ++level;
    const int width = g.width[level], height = g.height[level];
    const int tiles_in_line = (width + g.tile_side - 1) / g.tile_side;
    const int tile = static_cast<int>(block) - g.first_tile[level];
    const int column = tile % tiles_in_line * g.tile_side + slot % g.tile_side;
    const int line = tile / tiles_in_line * g.tile_side + slot / g.tile_side;
    place.active = column < width && line < height;
    place.query = g.first_token[level] + static_cast<int64_t>(line) * width + column;
    place.centre_x = (static_cast<A>(column) + A(0.5)) / static_cast<A>(width);
    place.centre_y = (static_cast<A>(line) + A(0.5)) / static_cast<A>(height);
  }
  if (!place.active) place.query = 0;  // any address that exists
  return place;
}

// Finds coordinates and weights of the samples of one query and head.
template <typename T, bool Fused, int Group>
struct Sampler {
  using A = Arithmetic<T>;
  using Raw = typename Inputs<T, Fused>::Raw;

  int64_t points_at, scores_at;  // first element of this query and head in their tensors
  const Raw* points;
  const Raw* scores;
  A centre_x, centre_y;
  A step_x, step_y;  // fused form with boxes: normalised distance of an offset of 1
  bool boxes;
  A largest, inverse_sum;  // of the softmax

  __device__ __forceinline__ Sampler(const Inputs<T, Fused>& in, const Place<A>& place, int lane) {
    const Geometry& g = in.geometry;
    const int64_t query = place.image * g.queries + place.query;
    const int64_t n = g.samples;
    points = in.points;
    boxes = false;
    if (!Fused) {
      scores = in.scores;
      points_at = (query * g.heads + place.head) * n * 2;
      scores_at = (query * g.heads + place.head) * n;
      return;
    }
    scores = in.points;
    points_at = query * g.heads * n * 3 + place.head * n * 2;
    scores_at = query * g.heads * n * 3 + g.heads * n * 2 + place.head * n;
    centre_x = place.centre_x;
    centre_y = place.centre_y;
    if (in.reference_size > 0) {
      const A* reference = in.reference + query * in.reference_size;
      centre_x = reference[0];
      centre_y = reference[1];
      boxes = in.reference_size == 4;
      if (boxes) {
        step_x = reference[2] * A(0.5) / static_cast<A>(g.points);
        step_y = reference[3] * A(0.5) / static_cast<A>(g.points);
      }
    }
    A here = -static_cast<A>(INFINITY);
    for (int i = lane; i < g.samples; i += Group) {
      const A logit = static_cast<A>(scores[scores_at + i]);
      here = logit > here ? logit : here;
    }
    largest = group_max<Group>(here);
    A sum = 0;
    for (int i = lane; i < g.samples; i += Group) {
      sum += exp(static_cast<A>(scores[scores_at + i]) - largest);
    }
    inverse_sum = A(1) / group_sum<Group>(sum);
  }

  __device__ __forceinline__ A weight(int i) const {
    const A score = static_cast<A>(scores[scores_at + i]);
    return Fused ? exp(score - largest) * inverse_sum : score;
  }

  // Pixel coordinates, pixel centres at integers.
  __device__ __forceinline__ void locate(int i, const SampleLevel& level, A& x, A& y) const {
    const A px = static_cast<A>(points[points_at + 2 * i]);
    const A py = static_cast<A>(points[points_at + 2 * i + 1]);
    const A width = static_cast<A>(level.width), height = static_cast<A>(level.height);
    if (!Fused) {
      x = px * width - A(0.5);
      y = py * height - A(0.5);
    } else if (boxes) {
      x = (centre_x + px * step_x) * width - A(0.5);
      y = (centre_y + py * step_y) * height - A(0.5);
    } else {
      x = centre_x * width + px - A(0.5);
      y = centre_y * height + py - A(0.5);
    }
  }
};

// A sample on its level: the token of its top left corner (which may lie outside), the fractions
// to the right and down, and a bit for each of the corners top left, top right, bottom left,
// bottom right that is inside. No bit is set where the sample touches no pixel or is NaN.
template <typename A>
struct Sample {
  int row;
  int corners;
  A fraction_x, fraction_y, weight;
};

template <typename A>
__device__ __forceinline__ Sample<A> place_sample(A x, A y, A weight, const SampleLevel& level) {
  Sample<A> sample{0, 0, A(0), A(0), weight};
  const bool touches = x > A(-1) && x < static_cast<A>(level.width) && y > A(-1) &&
                       y < static_cast<A>(level.height);
  if (!touches) return sample;
  const A left_edge = floor(x), top_edge = floor(y);
  const int left = static_cast<int>(left_edge), top = static_cast<int>(top_edge);
  sample.fraction_x = x - left_edge;
  sample.fraction_y = y - top_edge;
  sample.row = level.first_token + top * level.width + left;
  const bool left_in = left >= 0, right_in = left + 1 < level.width;
  const bool top_in = top >= 0, bottom_in = top + 1 < level.height;
  sample.corners = (top_in && left_in ? 1 : 0) | (top_in && right_in ? 2 : 0) |
                   (bottom_in && left_in ? 4 : 0) | (bottom_in && right_in ? 8 : 0);
  return sample;
}

// Bilinear weight of a corner, without the attention weight.
template <typename A>
__device__ __forceinline__ A corner_weight(const Sample<A>& s, int corner) {
  const A across = corner & 1 ? s.fraction_x : A(1) - s.fraction_x;
  const A down = corner & 2 ? s.fraction_y : A(1) - s.fraction_y;
  return across * down;
}

// Calls `launch(vector width, group)` with compile-time constants for the head size.
template <typename T, typename Launch>
void choose_group(int64_t channels, bool vectors, const Launch& launch) {
  if constexpr (sizeof(T) <= 4) {
    constexpr std::integral_constant<int, 16 / sizeof(T)> vector;
    const int group = lanes_per_query(channels, sizeof(T), vectors);
    if (group == 4) return launch(vector, std::integral_constant<int, 4>{});
    if (group == 8) return launch(vector, std::integral_constant<int, 8>{});
    if (group == 16) return launch(vector, std::integral_constant<int, 16>{});
  }
  launch(std::integral_constant<int, 1>{}, std::integral_constant<int, 32>{});
}

// Whole warps for all queries of a block.
template <int Group>
int threads_per_block(const Geometry& g) {
  return (g.queries_per_block * Group + 31) / 32 * 32;
}

inline int64_t count_blocks(const Geometry& g) { return g.blocks_per_head * g.heads * g.images; }

}  // namespace cuda
}  // namespace maskdino
