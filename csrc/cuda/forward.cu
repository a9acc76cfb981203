// Forward kernel: every lane holds the sums of its own channels (16 bytes of them where the head
// size allows) while its group walks through the samples.
#include "mma.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

// What a lane hands to the others of its group about its sample: see Sample; weights of the
// corners.
template <typename A>
struct Corners {
  int token, right_step, down_step;
  A weight[4];
};

template <typename A>
__device__ __forceinline__ Corners<A> weigh_corners(const Sample<A>& s, A weight) {
  const A top = weight * s.top, bottom = weight * s.bottom;
  return {s.token,
          s.right_step,
          s.down_step,
          {top * s.left, top * s.right, bottom * s.left, bottom * s.right}};
}

template <int Group, typename A>
__device__ __forceinline__ Corners<A> from_lane(const Corners<A>& own, int lane) {
  Corners<A> corners{__shfl_sync(kWholeWarp, own.token, lane, Group),
                     __shfl_sync(kWholeWarp, own.right_step, lane, Group),
                     __shfl_sync(kWholeWarp, own.down_step, lane, Group),
                     {}};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    corners.weight[k] = __shfl_sync(kWholeWarp, own.weight[k], lane, Group);
  }
  return corners;
}

template <int Vector, typename T, typename A>
__device__ __forceinline__ void add_row(A (&sums)[Vector], A weight, const Pack<T, Vector>& row) {
  A numbers[Vector];
  unpack(row, numbers);
#pragma unroll
  for (int k = 0; k < Vector; ++k) sums[k] += weight * numbers[k];
}

template <typename T, Form kForm, int Vector, int Group>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const Inputs<T, kForm> in, T* output) {
  using A = Arithmetic<T>;
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  fill_levels(g, levels);
  const int lane = threadIdx.x % Group;
  const Place<A> place = find_place<kForm, A>(g, threadIdx.x / Group);
  const Sampler<T, kForm, Group, (Vector > 1)> sampler(in, place, lane);
  const int stride = g.heads * g.channels;
  const T* head = in.value + place.image * g.tokens * stride + place.head * g.channels;
  T* target = output + (place.image * g.queries + place.query) * stride + place.head * g.channels;

  // With vectors a group covers the head at once.
  for (int first = 0; first < (Vector > 1 ? 1 : g.channels); first += Group) {
    const int channel = first + lane * Vector;
    const bool covers = Vector > 1 || channel < g.channels;
    const T* const features = keep(head + (covers ? channel : 0));
    A sums[Vector] = {};
    A sum_of_weights = 0;
    for (int base = 0; base < g.samples; base += Group) {
      Corners<A> own{-1, 0, 0, {}};
      if (base + lane < g.samples) {
        A x, y;
        const SampleLevel level = levels[base + lane];
        sampler.locate(base + lane, level, x, y);
        const A weight = sampler.weight(base + lane);
        sum_of_weights += weight;
        own = weigh_corners(place_sample(x, y, level), weight);
      }
      // A group as large as a warp may have more lanes than there are samples.
      const int count = Group < 32 ? Group : min(Group, g.samples - base);
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const Corners<A> corners = from_lane<Group>(own, j);
        if (corners.token < 0) continue;
        const T* top_left = step(features, corners.token, g.token_bytes);
        const T* bottom_left = step(top_left, corners.down_step, g.token_bytes);
        const auto row_0 = load_pack<Vector>(top_left);
        const auto row_1 = load_pack<Vector>(step(top_left, corners.right_step, g.token_bytes));
        const auto row_2 = load_pack<Vector>(bottom_left);
        const auto row_3 = load_pack<Vector>(step(bottom_left, corners.right_step, g.token_bytes));
        add_row(sums, corners.weight[0], row_0);
        add_row(sums, corners.weight[1], row_1);
        add_row(sums, corners.weight[2], row_2);
        add_row(sums, corners.weight[3], row_3);
      }
    }
    const A scale = sampler.kFused ? A(1) / group_sum<Group>(sum_of_weights) : A(1);
    if (place.active && covers) {
      Pack<T, Vector> result;
#pragma unroll
      for (int k = 0; k < Vector; ++k) result.element[k] = static_cast<T>(sums[k] * scale);
      *reinterpret_cast<Pack<T, Vector>*>(target + channel) = result;
    }
  }
}

// The same by products of matrices. A warp computes four pairs of a query and a head at once; lane
// 4 g + t has four channels of pair t. The step of sample s multiplies features, 16 channels x the
// four corners of each pair, by weights, the corners x two columns for each pair: the weight as a
// number of T, and what is lost by that. A corner of one pair has weight 0 in the columns of
// others.
//
// Two rows that hold channels of two corners become one that holds corners of a channel. Which
// channels a lane has is free, pair by pair: so the two halves of a warp read from all banks.
//
// A number that is not finite spoils all four pairs, times 0. Then a lane computes its sums anew.
constexpr int kPairs = 4;        // of a warp, at once
constexpr int kPairLanes = 8;    // lanes of a pair
constexpr int kHandedOver = 16;  // samples of a pair, at once
constexpr int kLaneChannels = kProductChannels / kPairLanes;

// What lanes of a warp hand to each other, for two samples that are read together: the tokens at
// the upper left and the lower left; the weights of the upper and the lower corners, rounded to two
// numbers of T; and the rest of the weights.
struct alignas(16) Handover {
  uint2 part[kHandedOver / 2][3][kPairs][2];
};

// A corner outside the map has weight 0 and lies in the map, which is at least two tokens wide and
// high: the square of four tokens is pushed inside. NaN has weight 0 everywhere.
struct Square {
  int token;
  float left, right, top, bottom;
};

__device__ __forceinline__ float push_inside(float x, float size, float& first, float& second) {
  const float begin = fmin(fmax(floor(x), 0.f), size - 2.f);
  first = __saturatef(1.f - fabs(x - begin));
  second = __saturatef(1.f - fabs(x - begin - 1.f));
  return begin;
}

__device__ __forceinline__ Square place_square(float x, float y, const SampleLevel& level) {
  Square square;
  const float column = push_inside(x, static_cast<float>(level.width), square.left, square.right);
  const float line = push_inside(y, static_cast<float>(level.height), square.top, square.bottom);
  square.token =
      level.first_token + static_cast<int>(line) * level.width + static_cast<int>(column);
  return square;
}

template <typename T>
__device__ __forceinline__ uint32_t split_pair(float first, float second, uint32_t& rest) {
  const uint32_t rounded = round_pair<T>(first, second);
  Pack<T, 2> pack;
  float numbers[2];
  memcpy(&pack, &rounded, sizeof(pack));
  unpack(pack, numbers);
  rest = round_pair<T>(first - numbers[0], second - numbers[1]);
  return rounded;
}

// Adds a sample; `top` and `bottom` are the rows of the left and the right corner, four channels of
// each.
template <typename T>
__device__ __forceinline__ void add_corners(float (&sums)[2][4], const uint2 (&top)[2],
                                            const uint2 (&bottom)[2], uint2 weights) {
  constexpr unsigned kLower = 0x5410, kUpper = 0x7632;
  const uint32_t b[2] = {weights.x, weights.y};
  const uint32_t first[4] = {
      __byte_perm(top[0].x, top[1].x, kLower), __byte_perm(top[0].x, top[1].x, kUpper),
      __byte_perm(bottom[0].x, bottom[1].x, kLower), __byte_perm(bottom[0].x, bottom[1].x, kUpper)};
  const uint32_t second[4] = {
      __byte_perm(top[0].y, top[1].y, kLower), __byte_perm(top[0].y, top[1].y, kUpper),
      __byte_perm(bottom[0].y, bottom[1].y, kLower), __byte_perm(bottom[0].y, bottom[1].y, kUpper)};
  add_product<T>(sums[0], first, b);
  add_product<T>(sums[1], second, b);
}

// A lane's channels of a pair, by this lane alone.
template <typename T, typename Sampler>
__device__ __forceinline__ void add_one_by_one(const Sampler& sampler, const SampleLevel* levels,
                                               int samples, const T* features,
                                               float (&sums)[kLaneChannels]) {
#pragma unroll
  for (float& sum : sums) sum = 0;
#pragma unroll 1
  for (int i = 0; i < samples; ++i) {
    float x, y;
    sampler.locate(i, levels[i], x, y);
    const Corners<float> corners = weigh_corners(place_sample(x, y, levels[i]), sampler.weight(i));
    if (corners.token < 0) continue;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int token =
          corners.token + (k % 2 ? corners.right_step : 0) + (k / 2 ? corners.down_step : 0);
      add_row(sums, corners.weight[k],
              load_pack<kLaneChannels>(step(features, token, kProductTokenBytes)));
    }
  }
}

// What a block works on, in shared memory.
template <typename T>
struct alignas(16) Work {
  Tile tile;
  float cell_width, cell_height;  // in parts of the level
  const T* points;                // of the image
  T* output;                      // of the image
};

// The query of a pair and how its samples are found; false beyond the block's queries.
template <typename Sampler, typename T, Form kForm>
__device__ __forceinline__ bool aim(const Inputs<T, kForm>& in, const Work<T>& work, int pair,
                                    int head, Sampler& sampler, int& query) {
  const Geometry& g = in.geometry;
  const int slot = pair >> 1;
  bool active = slot < g.queries_per_block;
  if constexpr (kForm == Form::tokens) {
    const int column = work.tile.column + (slot & ((1 << g.tile_bits) - 1));
    const int line = work.tile.line + (slot >> g.tile_bits);
    active = active & (column < work.tile.width) & (line < work.tile.height);
    query = active ? work.tile.first_token + line * work.tile.width + column : 0;
    sampler.center_x = (static_cast<float>(column) + 0.5f) * work.cell_width;
    sampler.center_y = (static_cast<float>(line) + 0.5f) * work.cell_height;
  } else {
    query = blockIdx.x * g.queries_per_block + slot;
    active = active && query < g.queries;
    if (!active) query = 0;
    const float* reference = in.reference + (blockIdx.z * g.queries + query) * in.reference_size;
    sampler.center_x = reference[0];
    sampler.center_y = reference[1];
    sampler.boxes = in.reference_size == 4;
    if (sampler.boxes) {
      sampler.step_x = reference[2] * 0.5f / static_cast<float>(g.points);
      sampler.step_y = reference[3] * 0.5f / static_cast<float>(g.points);
    }
  }
  const int numbers = g.heads * g.samples * 3;  // of a query
  sampler.points = keep(work.points + (query * numbers + head * g.samples * 2));
  sampler.scores = keep(work.points + (query * numbers + (2 * g.heads + head) * g.samples));
  return active;
}

template <typename T, Form kForm, int Passes>
__global__ void __launch_bounds__(kMaxThreads, 2)
    forward_products_kernel(const Inputs<T, kForm> in, T* output) {
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  constexpr int kTokenChannels = kProductTokenBytes / sizeof(T);
  Work<T>& work = *reinterpret_cast<Work<T>*>(levels + g.samples);
  if (threadIdx.x == 0) {
    work.points = in.points + blockIdx.z * g.queries * (g.heads * g.samples * 3);
    work.output = output + blockIdx.z * g.queries * kTokenChannels;
    if constexpr (kForm == Form::tokens) {
      work.tile = find_tile(g);
      work.cell_width = 1.f / static_cast<float>(work.tile.width);
      work.cell_height = 1.f / static_cast<float>(work.tile.height);
    }
  }
  fill_levels(g, levels);
  const int warp = threadIdx.x / kWarp;
  const int row = threadIdx.x % kWarp / kPairs, pair = threadIdx.x % kPairs;
  Handover& handover = reinterpret_cast<Handover*>(&work + 1)[warp];
  const bool has_weights = row / 2 == pair;  // the column is one of the pair's
  const int head = blockIdx.y * 2 + pair % 2;
  const int channel =
      head * kProductChannels + (row ^ (pair / 2 * (kPairLanes / 2))) * kLaneChannels;
  const T* const features = keep(in.value + blockIdx.z * g.tokens * kTokenChannels + channel);
  uint4 weights{0, 0, 0, 0};

#pragma unroll 1
  for (int first = warp * kPairs; first < 2 * g.queries_per_block;
       first += blockDim.x / kPairLanes) {
    Sampler<T, kForm, kPairLanes, true> sampler;
    int query;
    const bool active = aim(in, work, first + pair, head, sampler, query);
    // Beyond the last sample weights are 0.
    float scores[Passes];
    sampler.largest = -INFINITY;
#pragma unroll
    for (int pass = 0; pass < Passes; ++pass) {
      const int i = pass * kPairLanes + row;
      scores[pass] = i < g.samples ? static_cast<float>(sampler.scores[i]) : -INFINITY;
      sampler.largest = fmax(sampler.largest, scores[pass]);
    }
    sampler.largest = group_max<kPairLanes, kPairs>(sampler.largest);
    float sums[2][4] = {};
    float sum_of_weights = 0;
#pragma unroll
    for (int base = 0; base < Passes * kPairLanes; base += kHandedOver) {
      if (base >= g.samples) break;
      __syncwarp();
#pragma unroll
      for (int half = 0; half < kHandedOver; half += kPairLanes) {
        if (base + half >= g.samples) break;
        const int i = min(base + half + row, g.samples - 1);
        const SampleLevel level = levels[i];
        float x, y;
        sampler.locate(i, level, x, y);
        const Square square = place_square(x, y, level);
        const float weight = exp(scores[(base + half) / kPairLanes] - sampler.largest);
        sum_of_weights += weight;
        const float top = weight * square.top, bottom = weight * square.bottom;
        uint2 rounded, rest;
        rounded.x = split_pair<T>(top * square.left, top * square.right, rest.x);
        rounded.y = split_pair<T>(bottom * square.left, bottom * square.right, rest.y);
        auto& part = handover.part[(half + row) / 2];
        part[0][pair][row % 2] = {static_cast<unsigned>(square.token),
                                  static_cast<unsigned>(square.token + level.width)};
        part[1][pair][row % 2] = rounded;
        part[2][pair][row % 2] = rest;
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kHandedOver / 2; ++k) {
        if (k % 2 == 0 && base + 2 * k >= g.samples) break;
        const uint4 tokens = *reinterpret_cast<const uint4*>(handover.part[k][0][pair]);
        if (has_weights) {
          weights = *reinterpret_cast<const uint4*>(handover.part[k][1 + row % 2][pair]);
        }
        uint2 rows[4][2];
        const unsigned lines[4] = {tokens.x, tokens.y, tokens.z, tokens.w};
#pragma unroll
        for (int line = 0; line < 4; ++line) {
          const T* const left = step(features, lines[line], kProductTokenBytes);
          rows[line][0] = *reinterpret_cast<const uint2*>(left);
          rows[line][1] = *reinterpret_cast<const uint2*>(left + kTokenChannels);
        }
        add_corners<T>(sums, rows[0], rows[1], {weights.x, weights.y});
        add_corners<T>(sums, rows[2], rows[3], {weights.z, weights.w});
      }
    }
    float numbers[kLaneChannels] = {sums[0][0] + sums[0][1], sums[0][2] + sums[0][3],
                                    sums[1][0] + sums[1][1], sums[1][2] + sums[1][3]};
    const float check = 0.f * numbers[0] + 0.f * numbers[1] + 0.f * numbers[2] + 0.f * numbers[3];
    if (!(check == 0.f)) {
      // Aims anew, so that no register holds the aim until here.
      Sampler<T, kForm, kPairLanes, true> again;
      aim(in, work, first + pair, head, again, query);
      again.largest = sampler.largest;
      add_one_by_one(again, levels, g.samples, features, numbers);
    }
    const float scale = 1.f / group_sum<kPairLanes, kPairs>(sum_of_weights);
    if (active) {
      Pack<T, kLaneChannels> result;
#pragma unroll
      for (int k = 0; k < kLaneChannels; ++k) {
        result.element[k] = static_cast<T>(numbers[k] * scale);
      }
      T* const target = work.output + (query * kTokenChannels + channel);
      *reinterpret_cast<Pack<T, kLaneChannels>*>(target) = result;
    }
  }
}

}  // namespace

template <typename T, Form kForm>
void launch_forward_products(const Inputs<T, kForm>& in, T* output, cudaStream_t stream) {
  const Geometry& g = in.geometry;
  // Tiles are many and large, and a warp goes through two parts of one: neighbors share its cache.
  const int threads = kForm == Form::tokens ? threads_per_block<kPairLanes / 2>(g)
                                            : threads_per_block<kPairLanes>(g);
  const size_t shared =
      g.samples * sizeof(SampleLevel) + sizeof(Work<T>) + threads / kWarp * sizeof(Handover);
  if (g.samples <= 2 * kPairLanes) {
    launch(forward_products_kernel<T, kForm, 2>, in.grid, threads, shared, stream, in, output);
  } else {
    launch(forward_products_kernel<T, kForm, 4>, in.grid, threads, shared, stream, in, output);
  }
}

template <typename T, Form kForm>
void launch_forward(const Inputs<T, kForm>& in, T* output, bool vectors, cudaStream_t stream) {
  const Geometry& g = in.geometry;
  constexpr int kWidest = sizeof(T) <= 4 ? forward_vector(sizeof(T)) : 1;
  choose_group<T, kWidest>(g.channels, vectors, [&](auto vector, auto group) {
    constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
    launch(forward_kernel<T, kForm, kVector, kGroup>, in.grid, threads_per_block<kGroup>(g),
           g.samples * sizeof(SampleLevel), stream, in, output);
  });
}

#define MASKDINO_INSTANTIATE(T, form) \
  template void launch_forward<T, form>(const Inputs<T, form>&, T*, bool, cudaStream_t);
MASKDINO_FOR_EACH_KERNEL(MASKDINO_INSTANTIATE)
#undef MASKDINO_INSTANTIATE

#define MASKDINO_INSTANTIATE(T, form) \
  template void launch_forward_products<T, form>(const Inputs<T, form>&, T*, cudaStream_t);
MASKDINO_INSTANTIATE(c10::Half, Form::tokens)
MASKDINO_INSTANTIATE(c10::Half, Form::references)
MASKDINO_INSTANTIATE(c10::BFloat16, Form::tokens)
MASKDINO_INSTANTIATE(c10::BFloat16, Form::references)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
