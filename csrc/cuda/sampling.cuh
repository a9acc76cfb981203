// What forward and backward share on the device: which query a thread works on, where its samples
// lie, and talk among the lanes that share a query.
//
// A group of `Group` neighboring lanes computes one head of one query. Lane k computes location
// and weight of samples k, k + Group, ...; then all lanes go through the samples together, each
// lane for its own channels, and receive a sample's numbers from the lane that computed them.
// Lanes without a query run along (shuffles need whole warps) and write nothing.
//
// Instructions, not memory, bound forward in 16-bit types. So the four corners of a sample are
// always read, without a branch between them: a corner outside the map reads its neighbor inside
// with weight 0, and only a sample that touches no pixel is passed over.
#pragma once

#include <cstring>

#include "kernels.h"
#include "launch.cuh"

namespace maskdino {
namespace cuda {

constexpr int kWarp = 32;  // lanes
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
    number = fmax(number, __shfl_xor_sync(kWholeWarp, number, distance, Group));
  }
  return number;
}

// Channels of one row as numbers. A bfloat16 is the upper half of a float.
template <typename T, int Count, typename A>
__device__ __forceinline__ void unpack(const Pack<T, Count>& pack, A (&numbers)[Count]) {
  if constexpr (std::is_same<T, c10::BFloat16>::value && Count % 2 == 0) {
    uint32_t words[Count / 2];
    memcpy(words, &pack, sizeof(words));
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      const uint32_t bits = k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u;
      memcpy(&numbers[k], &bits, sizeof(bits));
    }
  } else {
#pragma unroll
    for (int k = 0; k < Count; ++k) numbers[k] = static_cast<A>(pack.element[k]);
  }
}

template <int Vector, typename T>
__device__ __forceinline__ Pack<T, Vector> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, Vector>*>(source);
}

// Stops the compiler from computing an address in global memory anew wherever it is used, to save
// two registers.
template <typename T>
__device__ __forceinline__ T* keep(T* pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The pointer some tokens further on; one multiply-add.
template <typename T>
__device__ __forceinline__ T* step(T* pointer, int tokens, int token_bytes) {
  using Byte = typename std::conditional<std::is_const<T>::value, const char, char>::type;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) +
                              static_cast<int64_t>(tokens) * token_bytes);
}

// The level of a sample, in shared memory: one entry per sample.
struct alignas(16) SampleLevel {
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
  int64_t image;
  int query, head;
  bool active;
  A center_x, center_y;  // of the query's own cell; only where every token is a query
};

template <Form kForm, int Group, typename A>
__device__ __forceinline__ Place<A> find_place(const Geometry& g) {
  Place<A> place{};
  const int block = blockIdx.x;
  const int pair = threadIdx.x / Group;  // of a query and a head
  const int slot = pair >> (g.heads_per_block - 1);
  place.image = blockIdx.z;
  place.head = blockIdx.y * g.heads_per_block + (pair & (g.heads_per_block - 1));
  if constexpr (kForm == Form::tokens) {
    int level = 0;
    while (block >= g.first_tile[level + 1]) ++level;
    const int width = g.width[level], height = g.height[level];
    const unsigned tile = block - g.first_tile[level], tiles_in_line = g.tiles_in_line[level];
    const unsigned tile_line = tile / tiles_in_line;
    const int column =
        ((tile - tile_line * tiles_in_line) << g.tile_bits) + (slot & ((1 << g.tile_bits) - 1));
    const int line = (tile_line << g.tile_bits) + (slot >> g.tile_bits);
    // Threads fill whole warps, so that there may be more of them than the tile has queries.
    place.active = slot < g.queries_per_block && column < width && line < height;
    place.query = g.first_token[level] + line * width + column;
    place.center_x = (static_cast<A>(column) + A(0.5)) / static_cast<A>(width);
    place.center_y = (static_cast<A>(line) + A(0.5)) / static_cast<A>(height);
  } else {
    const int64_t query = static_cast<int64_t>(block) * g.queries_per_block + slot;
    place.query = static_cast<int>(query);
    place.active = slot < g.queries_per_block && query < g.queries;
  }
  if (!place.active) place.query = 0;  // any address that exists
  return place;
}

// Finds coordinates and weights of the samples of one query and head. With `Pairs` the x and y of
// a location are read together.
template <typename T, Form kForm, int Group, bool Pairs>
struct Sampler {
  using A = Arithmetic<T>;
  using Raw = typename Inputs<T, kForm>::Raw;

  const Raw* points;  // of this query and head
  const Raw* scores;
  A center_x, center_y;
  A step_x, step_y;  // boxes: normalized distance of an offset of 1
  bool boxes;
  A largest;  // logit
  static constexpr bool kFused = kForm != Form::textbook;

  __device__ __forceinline__ Sampler(const Inputs<T, kForm>& in, const Place<A>& place, int lane) {
    const Geometry& g = in.geometry;
    const int64_t query = place.image * g.queries + place.query;
    const int n = g.samples;
    boxes = false;
    largest = 0;
    if constexpr (!kFused) {
      const int64_t pair = query * g.heads + place.head;
      points = keep(in.points + pair * n * 2);
      scores = keep(in.scores + pair * n);
      return;
    }
    const Raw* const offsets = in.points + query * (g.heads * n * 3);
    points = keep(offsets + place.head * n * 2);
    scores = keep(offsets + (2 * g.heads + place.head) * n);
    center_x = place.center_x;
    center_y = place.center_y;
    if constexpr (kForm == Form::references) {
      const A* reference = in.reference + query * in.reference_size;
      center_x = reference[0];
      center_y = reference[1];
      boxes = in.reference_size == 4;
      if (boxes) {
        step_x = reference[2] * A(0.5) / static_cast<A>(g.points);
        step_y = reference[3] * A(0.5) / static_cast<A>(g.points);
      }
    }
    constexpr int kAtOnce = 4;  // so that they are waited for together
    A here = -static_cast<A>(INFINITY);
#pragma unroll 1
    for (int first = lane; first < n; first += kAtOnce * Group) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int i = first + k * Group;
        if (i < n) here = fmax(here, static_cast<A>(scores[i]));
      }
    }
    largest = group_max<Group>(here);
  }

  // Attention weight; of a fused form before division by the sum of a query's weights.
  __device__ __forceinline__ A weight(int i) const {
    const A score = static_cast<A>(scores[i]);
    return kFused ? exp(score - largest) : score;
  }

  // What a weight of a fused form is multiplied by.
  __device__ __forceinline__ A inverse_sum(int samples, int lane) const {
    A sum = 0;
    for (int i = lane; i < samples; i += Group) sum += weight(i);
    return A(1) / group_sum<Group>(sum);
  }

  // Pixel coordinates, pixel centers at integers.
  __device__ __forceinline__ void locate(int i, const SampleLevel& level, A& x, A& y) const {
    A point[2];
    if constexpr (Pairs) {
      unpack(load_pack<2>(points + 2 * i), point);
    } else {
      point[0] = static_cast<A>(points[2 * i]);
      point[1] = static_cast<A>(points[2 * i + 1]);
    }
    const A width = static_cast<A>(level.width), height = static_cast<A>(level.height);
    if constexpr (kFused) {
      const bool in_boxes = kForm == Form::references && boxes;
      x = (center_x * width - A(0.5)) + point[0] * (in_boxes ? step_x * width : A(1));
      y = (center_y * height - A(0.5)) + point[1] * (in_boxes ? step_y * height : A(1));
    } else {
      x = point[0] * width - A(0.5);
      y = point[1] * height - A(0.5);
    }
  }
};

// A sample on its level: the token of its top left corner, and the steps to the corners at the
// right and below (0 where one of the two is outside the map and the other stands for it). Corners
// are ordered top left, top right, bottom left, bottom right; bit k of `inside` tells of corner k.
// The bilinear weight of a corner is the product of its sides' weights; a side outside weighs 0.
// `token` is -1 where the sample touches no pixel or is NaN.
template <typename A>
struct Sample {
  int token, right_step, down_step, inside;
  A left, right, top, bottom;
};

template <typename A>
__device__ __forceinline__ Sample<A> place_sample(A x, A y, const SampleLevel& level) {
  const bool touches =
      x > A(-1) && x < static_cast<A>(level.width) && y > A(-1) && y < static_cast<A>(level.height);
  if (!touches) return {-1, 0, 0, 0, A(0), A(0), A(0), A(0)};
  const A left_edge = floor(x), top_edge = floor(y);
  const int column = static_cast<int>(left_edge), line = static_cast<int>(top_edge);
  const A fraction_x = x - left_edge, fraction_y = y - top_edge;
  const bool left = column >= 0, right = column + 1 < level.width;
  const bool top = line >= 0, bottom = line + 1 < level.height;
  return {level.first_token + (top ? line * level.width : 0) + (left ? column : 0),
          left && right ? 1 : 0,
          top && bottom ? level.width : 0,
          ((left ? 1 : 0) | (right ? 2 : 0)) * ((top ? 1 : 0) | (bottom ? 4 : 0)),
          left ? A(1) - fraction_x : A(0),
          right ? fraction_x : A(0),
          top ? A(1) - fraction_y : A(0),
          bottom ? fraction_y : A(0)};
}

// Calls `launch(vector, group)` with compile-time constants for the head size.
template <typename T, int kVector, typename Launch>
void choose_group(int64_t channels, bool vectors, const Launch& launch) {
  if constexpr (kVector > 1) {
    constexpr std::integral_constant<int, kVector> vector;
    constexpr int kSmallest = kSmallestHead / static_cast<int>(kVector * sizeof(T));
    const int group = vectors ? lanes_per_query(channels, kVector) : 0;
    if (group == kSmallest) return launch(vector, std::integral_constant<int, kSmallest>{});
    if (group == 2 * kSmallest) return launch(vector, std::integral_constant<int, 2 * kSmallest>{});
    if (group == 4 * kSmallest) return launch(vector, std::integral_constant<int, 4 * kSmallest>{});
    if (group == 8 * kSmallest) return launch(vector, std::integral_constant<int, 8 * kSmallest>{});
  }
  launch(std::integral_constant<int, 1>{}, std::integral_constant<int, 32>{});
}

// `instantiate(type, form)` for all types and forms.
#define MASKDINO_FOR_EACH_TYPE(instantiate, form)                                 \
  instantiate(float, form) instantiate(double, form) instantiate(c10::Half, form) \
      instantiate(c10::BFloat16, form)
#define MASKDINO_FOR_EACH_KERNEL(instantiate)         \
  MASKDINO_FOR_EACH_TYPE(instantiate, Form::textbook) \
  MASKDINO_FOR_EACH_TYPE(instantiate, Form::tokens)   \
  MASKDINO_FOR_EACH_TYPE(instantiate, Form::references)

// Whole warps for all queries of a block.
template <int Group>
int threads_per_block(const Geometry& g) {
  return (g.queries_per_block * g.heads_per_block * Group + 31) / 32 * 32;
}

}  // namespace cuda
}  // namespace maskdino
