// The value's gradient where every token is a query: summed in shared memory over the queries of a
// region of the image before it is added to global memory.
//
// A block takes one head and one region: a square of cells of the largest level, and with it the
// queries of all levels whose centres lie there. Their samples mostly touch pixels nearby, so each
// level has a window around the region in shared memory. A corner outside it is added to global
// memory at once; any offset is right, only slower.
//
// No atomics in shared memory, where additions of floats are loops: the four corners of a sample
// differ in the parity of column and line, so each level has four classes of cells of which a sample
// touches one each. A unit of lanes, one a channel, owns one class of one level and walks through
// all samples of that level; nobody else writes its cells. Queries are taken a few at a time: first
// all lanes compute where the corners are and what they weigh, then the units add.
#include "atomics.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kClasses = 4;  // of cells of a level, by parity
constexpr int kLanes = Merging::kLanes;
constexpr int kNothing = INT32_MIN;

// One corner of a sample: the bytes from the window's first cell to its cell, or ~token where that
// is not in the window, or kNothing; and the corner's part of the attention weight.
struct alignas(8) Corner {
  int place;
  float weight;
};

// What a block handles of a level: the pixel at the window's top left, and the queries.
struct alignas(16) RegionLevel {
  int left, top;
  int first_column, columns, first_line, lines;
  int first_query, unused;  // number of queries of the levels before
};
static_assert(sizeof(Corner) == Merging::kCornerBytes && sizeof(RegionLevel) == Merging::kRegionBytes);

// Number of pixel centres of a level left of where region `region` begins, for sides of the level
// and of the base level that the regions are cut from.
__device__ __forceinline__ int centres_before(const Merging& m, int region, int side, int base) {
  const int64_t twice = 2 * static_cast<int64_t>(base);
  const int64_t begin = 2 * static_cast<int64_t>(m.side) * region * side - base;
  return static_cast<int>(min((begin + twice - 1) / twice, static_cast<int64_t>(side)));
}

// First pixel of a window `extent` wide, inside the map.
__device__ __forceinline__ int window_begin(const Merging& m, int region, int side, int base,
                                            int margin, int extent) {
  const int64_t twice = 2 * static_cast<int64_t>(base);
  const int64_t begin = 2 * static_cast<int64_t>(m.side) * region * side - base;
  const int first = static_cast<int>((begin + twice) / twice) - 1 - margin;
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
  }
  __syncthreads();
}

// The place of one of the region's queries.
__device__ __forceinline__ Place<float> find_query(const Geometry& g, const RegionLevel* region,
                                                   int index) {
  Place<float> place{};
  place.image = blockIdx.z;
  place.head = blockIdx.y;
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

// Where the block's shared memory is what. `corners` is (level, class, query, point), `grads`
// (query, channel), `window` (cell, channel).
struct Shared {
  SampleLevel* levels;
  RegionLevel* region;
  Corner* corners;
  float* grads;
  float* window;
};

__device__ __forceinline__ Shared divide(SampleLevel* memory, const Geometry& g, const Merging& m) {
  Shared s;
  s.levels = memory;
  s.region = reinterpret_cast<RegionLevel*>(s.levels + g.samples);
  s.corners = reinterpret_cast<Corner*>(s.region + g.levels + 1);
  s.grads = reinterpret_cast<float*>(s.corners + g.levels * kClasses * m.queries * m.points);
  s.window = s.grads + m.queries * g.channels;
  return s;
}

// Writes the four corners of sample `i` of the query in `slot` for the units that own them.
__device__ __forceinline__ void write_corners(const Geometry& g, const Merging& m, const Shared& s,
                                              int slot, int i, float x, float y, float weight) {
  const int level = i / g.points, point = i - level * g.points;
  const SampleLevel map = s.levels[i];
  const Sample<float> sample = place_sample(x, y, map);
  const bool touches = sample.token >= 0;
  const int column = touches ? static_cast<int>(floor(x)) : 0;
  const int line = touches ? static_cast<int>(floor(y)) : 0;
  const RegionLevel r = s.region[level];
  const float sides[2] = {sample.left, sample.right}, heights[2] = {sample.top, sample.bottom};
#pragma unroll
  for (int k = 0; k < kClasses; ++k) {
    const int u = column + (k & 1), v = line + (k >> 1);
    const int in_x = u - r.left, in_y = v - r.top;
    Corner corner{kNothing, weight * (heights[k >> 1] * sides[k & 1])};
    if (sample.inside >> k & 1) {
      const bool in_window =
          in_x >= 0 && in_x < m.width[level] && in_y >= 0 && in_y < m.height[level];
      const int cell = m.first_cell[level] + in_y * m.width[level] + in_x;
      corner.place = in_window ? cell * g.channels * static_cast<int>(sizeof(float))
                               : ~(map.first_token + v * map.width + u);
    }
    const int owner = level * kClasses + ((u & 1) | (v & 1) << 1);
    s.corners[(owner * m.queries + slot) * m.points + point] = corner;
  }
}

// Corners and the gradient of the output of the query that a group of lanes takes.
template <typename T>
__device__ __forceinline__ void prepare_query(const Inputs<T, Form::tokens>& in, const Merging& m,
                                              const T* grad_output, const Shared& s, int index) {
  const Geometry& g = in.geometry;
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const Place<float> place = find_query(g, s.region, index);
  const Sampler<T, Form::tokens, kLanes, true> sampler(in, place, lane);
  const float scale = sampler.inverse_sum(g.samples, lane);
  if (!place.active) return;
  const int64_t row = (place.image * g.queries + place.query) * g.heads + place.head;
  for (int channel = 4 * lane; channel < g.channels; channel += 4 * kLanes) {
    Pack<float, 4> numbers;
    unpack(load_pack<4>(grad_output + row * g.channels + channel), numbers.element);
    *reinterpret_cast<Pack<float, 4>*>(s.grads + slot * g.channels + channel) = numbers;
  }
  for (int i = lane; i < g.samples; i += kLanes) {
    float x, y;
    sampler.locate(i, s.levels[i], x, y);
    write_corners(g, m, s, slot, i, x, y, scale * sampler.weight(i));
  }
}

__device__ __forceinline__ float& cell_at(char* column, int place) {
  return *reinterpret_cast<float*>(column + place);
}

// Adds four corners of one query to a lane's channel. All four cells are read before the first is
// written; where a cell comes twice, its sum is handed on.
__device__ __forceinline__ void add_four(char* column, const Corner (&c)[4], float grad) {
  float sums[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[k] = cell_at(column, c[k].place);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int earlier = 0; earlier < k; ++earlier) {
      if (c[earlier].place == c[k].place) sums[k] = sums[earlier];
    }
    sums[k] += c[k].weight * grad;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) cell_at(column, c[k].place) = sums[k];
}

// The same where some corners are not in the window. `target` is the lane's channel of token 0.
__device__ __forceinline__ void add_four_anywhere(char* column, float* target, int stride,
                                                  const Corner (&c)[4], float grad) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (c[k].place >= 0) {
      cell_at(column, c[k].place) += c[k].weight * grad;
    } else if (c[k].place != kNothing) {
      atomicAdd(target + static_cast<int64_t>(~c[k].place) * stride, c[k].weight * grad);
    }
  }
}

// Every unit adds what the first `count` queries bring to its cells.
__device__ __forceinline__ void add_queries(const Geometry& g, const Merging& m, const Shared& s,
                                            float* grad_value, int count) {
  const int stride = g.heads * g.channels;
  const int lanes = min(32, g.channels), slices = g.channels / lanes;
  const int units = g.levels * kClasses * slices;
  for (int unit = threadIdx.x / lanes; unit < units; unit += blockDim.x / lanes) {
    const int owner = unit / slices;
    const int channel = (unit - owner * slices) * lanes + threadIdx.x % lanes;
    char* const column = reinterpret_cast<char*>(s.window + channel);
    float* const target = grad_value + channel;
    const Corner* corners = s.corners + owner * m.queries * m.points;
    for (int query = 0; query < count; ++query) {
      const float grad = s.grads[query * g.channels + channel];
      for (int point = 0; point < m.points; point += 4, corners += 4) {
        const auto first = load_pack<2>(corners), second = load_pack<2>(corners + 2);
        const Corner four[4] = {first.element[0], first.element[1], second.element[0],
                                second.element[1]};
        if ((four[0].place | four[1].place | four[2].place | four[3].place) >= 0) {
          add_four(column, four, grad);
        } else {
          add_four_anywhere(column, target, stride, four, grad);
        }
      }
    }
  }
}

// Adds the windows to global memory, but for cells that nobody touched.
__device__ __forceinline__ void flush(const Geometry& g, const Merging& m, const Shared& s,
                                      float* grad_value) {
  const int stride = g.heads * g.channels, fours = g.channels / 4;
  for (int k = threadIdx.x; k < m.first_cell[g.levels] * fours; k += blockDim.x) {
    const int cell = k / fours, channel = 4 * (k - cell * fours);
    const auto sums = load_pack<4>(s.window + 4 * k);
    const float(&n)[4] = sums.element;
    if (n[0] == 0 && n[1] == 0 && n[2] == 0 && n[3] == 0) continue;
    int level = 0;
    while (cell >= m.first_cell[level + 1]) ++level;
    const int within = cell - m.first_cell[level];
    const int line = within / m.width[level], column = within - line * m.width[level];
    const RegionLevel r = s.region[level];
    const int token = g.first_token[level] + (r.top + line) * g.width[level] + r.left + column;
    atomic_add(grad_value + static_cast<int64_t>(token) * stride + channel, n);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    value_gradient_kernel(const Inputs<T, Form::tokens> in, const Merging merging,
                          const T* grad_output, float* grad_value) {
  extern __shared__ SampleLevel levels[];
  const Geometry& g = in.geometry;
  const Shared shared = divide(levels, g, merging);
  for (int k = threadIdx.x; k < merging.first_cell[g.levels] * g.channels / 4; k += blockDim.x) {
    reinterpret_cast<Pack<float, 4>*>(shared.window)[k] = {};
  }
  // Points are padded to fours with corners that add nothing.
  for (int k = threadIdx.x; k < g.levels * kClasses * merging.queries * merging.points;
       k += blockDim.x) {
    shared.corners[k] = {kNothing, 0.0f};
  }
  fill_levels(g, shared.levels);
  fill_region(g, merging, shared.region);
  float* const head = grad_value + static_cast<int64_t>(blockIdx.z) * g.tokens * g.heads * g.channels +
                      blockIdx.y * g.channels;
  const int queries = shared.region[g.levels].first_query;
  for (int first = 0; first < queries; first += merging.queries) {
    prepare_query(in, merging, grad_output, shared, first + static_cast<int>(threadIdx.x) / kLanes);
    __syncthreads();
    add_queries(g, merging, shared, head, min(merging.queries, queries - first));
    __syncthreads();
  }
  flush(g, merging, shared, head);
}

}  // namespace

template <typename T>
void launch_value_gradient(const Inputs<T, Form::tokens>& in, const Merging& merging,
                           const T* grad_output, float* grad_value, cudaStream_t stream) {
  launch(value_gradient_kernel<T>, merging.grid, merging.queries * kLanes, merging.shared_bytes,
         stream, in, merging, grad_output, grad_value);
}

#define MASKDINO_INSTANTIATE(T)                                                                 \
  template void launch_value_gradient<T>(const Inputs<T, Form::tokens>&, const Merging&, const T*, \
                                         float*, cudaStream_t);
MASKDINO_INSTANTIATE(float)
MASKDINO_INSTANTIATE(c10::Half)
MASKDINO_INSTANTIATE(c10::BFloat16)
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
