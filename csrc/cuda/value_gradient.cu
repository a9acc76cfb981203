// The value's gradient where every token is a query: summed over the queries of a region of the
// image before it is added to global memory.
//
// A block takes one head (or 32 channels of it) and one region: a square of cells of the largest
// level, and with it the queries of all levels whose centres lie there. Their samples mostly touch
// pixels nearby, so each level has a window around the region. A corner outside it is added to
// global memory at once; any offset is right, only slower.
//
// In the windows the gradient is a product of matrices: (cells x queries), the weight that each
// query gives each cell, times (queries x channels), the gradient of the output. The first is laid
// out in shared memory for 16 queries at a time, with one addition for a corner instead of one for
// each of its channels; the product runs on tensor cores, and its sums stay in registers until all
// queries are through. Tensor cores cut factors off after 11 bits, so a weight is split in two that
// together have 22, and so is a float32 gradient.
#include "atomics.cuh"
#include "matrix.cuh"
#include "regions.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kLanes = Merging::kLanes, kQueries = Merging::kQueries;
constexpr int kGroups = kMaxThreads / kLanes;
constexpr int kWarps = kMaxThreads / 32;
constexpr int kCellTiles = Merging::kMostCells / 16 / kWarps;  // of 16 cells, for each warp
static_assert(kGroups == 2 * kQueries, "half of the groups lay out weights while all multiply");

// One corner of a sample: the number of its cell in the windows, or -1 where there is nothing to
// add; and the corner's part of the attention weight.
struct alignas(8) Corner {
  int cell;
  float weight;
};

// A corner that is not in the windows.
struct alignas(16) Outside {
  int token, query;
  float weight;
};
static_assert(sizeof(Corner) == Merging::kCornerBytes);
static_assert(sizeof(Outside) == Merging::kOutsideBytes);

// Where the block's shared memory is what: `corners` (query, point, level, corner), `grads` (query,
// channel), `weights` (2, kQueries, cell), which at the end becomes `window` (cell, channel).
struct Shared {
  SampleLevel* levels;
  RegionLevel* region;
  Outside* outside;
  Corner* corners;
  float* grads;
  float* weights;
};

template <int kChannels>
__device__ __forceinline__ Shared divide(SampleLevel* memory, const Geometry& g, const Merging& m) {
  Shared s;
  s.levels = memory;
  s.region = reinterpret_cast<RegionLevel*>(s.levels + g.samples);
  s.outside = reinterpret_cast<Outside*>(s.region + g.levels + 1);
  s.corners = reinterpret_cast<Corner*>(s.outside + Merging::kMostOutside);
  s.grads = reinterpret_cast<float*>(s.corners + 4 * g.samples * m.queries);
  s.weights = s.grads + (kChannels + 8) * m.queries;
  return s;
}

// Adds four channels of a query's gradient of the output, times a weight, to global memory.
template <typename T>
__device__ __forceinline__ void add_outside(const T* grad, float weight, float* target) {
  float numbers[4];
  unpack(load_pack<4>(grad), numbers);
#pragma unroll
  for (int k = 0; k < 4; ++k) numbers[k] *= weight;
  atomic_add(target, numbers);
}

// Notes a corner that is not in the windows, or adds it where the list is full. `grad` and
// `target`: the block's channels of the query and of token 0.
template <int kChannels, typename T>
__device__ __forceinline__ void note_outside(const Shared& s, const Geometry& g,
                                             const Outside& corner, const T* grad, float* target) {
  const int at = atomicAdd(&s.region[g.levels].outside, 1);
  if (at < Merging::kMostOutside) {
    s.outside[at] = corner;
    return;
  }
  target += static_cast<int64_t>(corner.token) * g.heads * g.channels;
#pragma unroll 1
  for (int channel = 0; channel < kChannels; channel += 4) {
    add_outside(grad + channel, corner.weight, target + channel);
  }
}

// Adds the noted corners, four channels a lane. `grad`: the block's channels of the image's query
// 0.
template <int kChannels, typename T>
__device__ __forceinline__ void add_noted(const Shared& s, const Geometry& g, const T* grad,
                                          float* target) {
  constexpr int kFours = kChannels / 4;
  const int count = min(s.region[g.levels].outside, Merging::kMostOutside);
  const int64_t stride = static_cast<int64_t>(g.heads) * g.channels;
  const int channel = 4 * (threadIdx.x % kFours);
  for (int at = threadIdx.x / kFours; at < count; at += blockDim.x / kFours) {
    const Outside corner = s.outside[at];
    add_outside(grad + corner.query * stride + channel, corner.weight,
                target + corner.token * stride + channel);
  }
}

// Writes the four corners of sample `i` of a query to `corners`; notes those that are not in the
// windows.
template <int kChannels, typename T>
__device__ __forceinline__ void write_corners(const Geometry& g, const Merging& m, const Shared& s,
                                              int i, const Sample<float>& sample, float x, float y,
                                              float weight, bool merges, int query, const T* grad,
                                              float* target, Corner* corners) {
  const int level = i / g.points, point = i - level * g.points;
  const RegionLevel r = s.region[level];
  const SampleLevel map = s.levels[i];
  const float sides[2] = {sample.left, sample.right}, heights[2] = {sample.top, sample.bottom};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    Corner corner{-1, weight * (heights[k >> 1] * sides[k & 1])};
    if (sample.inside >> k & 1) {
      const int column = static_cast<int>(floor(x)) + (k & 1);
      const int line = static_cast<int>(floor(y)) + (k >> 1);
      const int in_x = column - r.left, in_y = line - r.top;
      if (merges && in_x >= 0 && in_x < m.width[level] && in_y >= 0 && in_y < m.height[level]) {
        corner.cell = m.first_cell[level] + in_y * m.width[level] + in_x;
      } else {
        const int token = map.first_token + line * map.width + column;
        note_outside<kChannels>(s, g, {token, query, corner.weight}, grad, target);
      }
    }
    corners[(point * g.levels + level) * 4 + k] = corner;
  }
}

// Corners, and gradient of the output, of query `index` of the region; a group of lanes takes it.
// Zero times infinity is not zero, so a query whose gradient is not finite is not part of the
// product.
template <int kChannels, typename T>
__device__ __forceinline__ void prepare_query(const Inputs<T, Form::tokens>& in, const Merging& m,
                                              const Shared& s, const Place<float>& place,
                                              const T* grad_output, float* target, int slot) {
  const Geometry& g = in.geometry;
  const int lane = threadIdx.x % kLanes;
  const Sampler<T, Form::tokens, kLanes, true> sampler(in, place, lane);
  const float scale = sampler.inverse_sum(g.samples, lane);
  const int64_t row = place.image * g.queries + place.query;
  const T* grad = grad_output + row * g.heads * g.channels;
  float nothing = 0;
  for (int channel = lane; channel < kChannels; channel += kLanes) {
    nothing += 0 * static_cast<float>(grad[channel]);
  }
  const bool merges = group_sum<kLanes>(nothing) == 0;
  for (int channel = lane; channel < kChannels; channel += kLanes) {
    s.grads[slot * (kChannels + 8) + channel] =
        place.active && merges ? static_cast<float>(grad[channel]) : 0.0f;
  }
  Corner* const corners = s.corners + 4 * g.samples * slot;
  for (int i = lane; i < g.samples; i += kLanes) {
    float x, y;
    sampler.locate(i, s.levels[i], x, y);
    Sample<float> sample = place_sample(x, y, s.levels[i]);
    if (!place.active) sample.inside = 0;
    write_corners<kChannels>(g, m, s, i, sample, x, y, scale * sampler.weight(i), merges,
                             place.query, grad, target, corners);
  }
}

// Lays out the weights of the queries of product `product`, or clears them. The corners of one
// point lie in different cells; those of the next point wait for them.
template <bool kClear>
__device__ __forceinline__ void lay_out(const Geometry& g, const Merging& m, const Shared& s,
                                        int product) {
  const int lane = threadIdx.x % kLanes, query = threadIdx.x / kLanes % kQueries;
  float* const row = s.weights + ((product & 1) * kQueries + query) * m.stride;
  const Corner* corners = s.corners + 4 * g.samples * (product * kQueries + query);
  for (int point = 0; point < g.points; ++point, corners += 4 * g.levels) {
    for (int k = lane; k < 4 * g.levels; k += kLanes) {
      const Corner corner = corners[k];
      if (corner.cell >= 0) row[corner.cell] = kClear ? 0.0f : row[corner.cell] + corner.weight;
    }
    __syncwarp();
  }
}

// What tensor cores keep of a number, and the rest.
__device__ __forceinline__ void split(float number, float& upper, float& lower) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof(bits));
  bits &= 0xffffe000u;
  memcpy(&upper, &bits, sizeof(bits));
  lower = number - upper;
}

// Adds the product of eight queries' weights and gradients; a warp has every kWarps-th tile of
// cells.
template <int kChannels, bool kSplit>
__device__ __forceinline__ void multiply(const Merging& m, int cells, const float* weights,
                                         const float* grads,
                                         float (&sums)[kCellTiles][kChannels / 8][4]) {
  const int warp = threadIdx.x / 32, i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  constexpr int kStride = kChannels + 8;
  float upper_grads[kChannels / 8][2], lower_grads[kChannels / 8][2];
#pragma unroll
  for (int tile = 0; tile < kChannels / 8; ++tile) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float number = grads[(j + 4 * k) * kStride + 8 * tile + i];
      upper_grads[tile][k] = number;
      if constexpr (kSplit) split(number, upper_grads[tile][k], lower_grads[tile][k]);
    }
  }
#pragma unroll
  for (int t = 0; t < kCellTiles; ++t) {
    const int cell = 16 * (warp + t * kWarps);
    if (cell >= cells) break;
    float upper[4], lower[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      split(weights[(j + 4 * (k >> 1)) * m.stride + cell + i + 8 * (k & 1)], upper[k], lower[k]);
    }
#pragma unroll
    for (int tile = 0; tile < kChannels / 8; ++tile) {
      add_product(sums[t][tile], lower, upper_grads[tile]);
      if constexpr (kSplit) add_product(sums[t][tile], upper, lower_grads[tile]);
      add_product(sums[t][tile], upper, upper_grads[tile]);
    }
  }
}

template <int kChannels>
__device__ __forceinline__ void store(int cells, float* window,
                                      const float (&sums)[kCellTiles][kChannels / 8][4]) {
  const int warp = threadIdx.x / 32, i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < kCellTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int cell = 16 * (warp + t * kWarps) + i + 8 * half;
      if (cell >= cells) continue;
#pragma unroll
      for (int tile = 0; tile < kChannels / 8; ++tile) {
        float* target = window + cell * kChannels + 8 * tile + 2 * j;
        target[0] = sums[t][tile][2 * half];
        target[1] = sums[t][tile][2 * half + 1];
      }
    }
  }
}

// Adds the windows to global memory, but for cells that nobody touched.
template <int kChannels>
__device__ __forceinline__ void flush(const Geometry& g, const Merging& m, const Shared& s,
                                      float* target) {
  constexpr int kFours = kChannels / 4;
  for (int k = threadIdx.x; k < m.first_cell[g.levels] * kFours; k += blockDim.x) {
    const int cell = k / kFours, channel = 4 * (k % kFours);
    const auto sums = load_pack<4>(s.weights + 4 * k);
    const float(&n)[4] = sums.element;
    if (n[0] == 0 && n[1] == 0 && n[2] == 0 && n[3] == 0) continue;
    int level = 0;
    while (cell >= m.first_cell[level + 1]) ++level;
    const int within = cell - m.first_cell[level];
    const int line = within / m.width[level], column = within - line * m.width[level];
    const RegionLevel r = s.region[level];
    const int64_t token =
        g.first_token[level] + (r.top + line) * g.width[level] + r.left + column;
    atomic_add(target + token * g.heads * g.channels + channel, n);
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kMaxThreads, 1)
    value_gradient_kernel(const Inputs<T, Form::tokens> in, const Merging merging,
                          const T* grad_output, float* grad_value) {
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  const Shared shared = divide<kChannels>(levels, g, merging);
  for (int k = threadIdx.x; k < 2 * kQueries * merging.stride / 4; k += blockDim.x) {
    reinterpret_cast<Pack<float, 4>*>(shared.weights)[k] = {};
  }
  fill_levels(g, shared.levels);
  fill_region(g, merging, shared.region);
  const int first_channel = blockIdx.y * kChannels, head = first_channel / g.channels;
  const int64_t stride = static_cast<int64_t>(g.heads) * g.channels;
  float* const target = grad_value + blockIdx.z * g.tokens * stride + first_channel;
  const int cells = merging.first_cell[g.levels], queries = shared.region[g.levels].first_query;
  const T* const image_grad = grad_output + blockIdx.z * g.queries * stride + first_channel;
  const int group = threadIdx.x / kLanes;
  float sums[kCellTiles][kChannels / 8][4] = {};
  for (int first = 0; first < queries; first += merging.queries) {
    const int products = (min(merging.queries, queries - first) + kQueries - 1) / kQueries;
    for (int slot = group; slot < products * kQueries; slot += kGroups) {
      const Place<float> place = find_query(g, shared.region, head, first + slot);
      prepare_query<kChannels>(in, merging, shared, place, grad_output + first_channel, target,
                               slot);
    }
    __syncthreads();
    add_noted<kChannels>(shared, g, image_grad, target);
    // While one product is computed, half of the lanes lay out the next. The last need not be
    // cleared.
    const bool last = queries - first <= merging.queries;
    for (int k = 0; k <= products + (last ? 0 : 1); ++k) {
      if (group / kQueries == (k & 1)) {
        if (k >= 2) lay_out<true>(g, merging, shared, k - 2);
        if (k < products) lay_out<false>(g, merging, shared, k);
      }
      // By now all have read it, and the next corners are noted after more barriers.
      if (k == 1 && threadIdx.x == 0) shared.region[g.levels].outside = 0;
      if (k > 0 && k <= products) {
        for (int half = 0; half < kQueries; half += 8) {
          multiply<kChannels, std::is_same<T, float>::value>(
              merging, cells,
              shared.weights + (((k - 1) & 1) * kQueries + half) * merging.stride,
              shared.grads + ((k - 1) * kQueries + half) * (kChannels + 8), sums);
        }
      }
      __syncthreads();
    }
  }
  store<kChannels>(cells, shared.weights, sums);
  __syncthreads();
  flush<kChannels>(g, merging, shared, target);
}

}  // namespace

template <typename T>
void launch_value_gradient(const Inputs<T, Form::tokens>& in, const Merging& merging,
                           const T* grad_output, float* grad_value, cudaStream_t stream) {
  const auto kernel = in.geometry.channels == 16 ? value_gradient_kernel<T, 16>
                                                 : value_gradient_kernel<T, 32>;
  launch(kernel, merging.grid, kMaxThreads, merging.shared_bytes, stream, in, merging, grad_output,
         grad_value);
}

#define MASKDINO_INSTANTIATE(T)                                                                    \
  template void launch_value_gradient<T>(const Inputs<T, Form::tokens>&, const Merging&, const T*, \
                                         float*, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
