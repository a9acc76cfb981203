// Masks in the frame of the output on a GPU. What lies between map and output is never made: a
// pixel of the output reads at most three rows and columns of the map.
//
// A block has 32 columns of a mask, a warp of it 32 lines at a time, a lane a column. Of a row of
// the map a lane reads its three columns once, as lines go down.
#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "masks.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kMaskWarps = 8;
constexpr int64_t kMasksPerLayer = 65535;  // the most blocks along y

// The cells of a map that a pixel of the output reads along an axis, from `first` on.
struct Taps {
  int first;
  float a, b, c;
};

// What a position reads of an axis of `from` cells that is enlarged to `to`.
struct Neighbors {
  __device__ __forceinline__ Neighbors(int from, int to, int position) {
    const float scale = static_cast<float>(from) / static_cast<float>(to);
    const float place = fmaxf(0.0f, scale * (static_cast<float>(position) + 0.5f) - 0.5f);
    low = min(static_cast<int>(place), from - 1);
    high = min(low + 1, from - 1);
    above = fminf(place - static_cast<float>(low), 1.0f);
  }
  int low, high;
  float above;  // weight of `high`; that of `low` is the rest
};

__device__ __forceinline__ void add_share(Taps& taps, int cell, float share) {
  const int distance = cell - taps.first;
  if (distance == 0) {
    taps.a += share;
  } else if (distance == 1) {
    taps.b += share;
  } else {  // at most two, but for the rounding of places
    taps.c += share;
  }
}

__device__ __forceinline__ Taps find_taps(const ResizedAxis& sizes, int position) {
  const Neighbors of_image(sizes.image, sizes.output, position);
  const Neighbors low(sizes.map, sizes.canvas, of_image.low);
  const Neighbors high(sizes.map, sizes.canvas, of_image.high);
  Taps taps{low.low, 0.0f, 0.0f, 0.0f};
  add_share(taps, low.low, (1 - of_image.above) * (1 - low.above));
  add_share(taps, low.high, (1 - of_image.above) * low.above);
  add_share(taps, high.low, of_image.above * (1 - high.above));
  add_share(taps, high.high, of_image.above * high.above);
  return taps;
}

// A lane's columns of a map, and of three rows of it the sums over them.
struct Rows {
  __device__ __forceinline__ Rows(const float* map, const ResizedAxis& y, const ResizedAxis& x,
                                  const Taps& taps)
      : map(map),
        columns(x.map),
        last_row(y.map - 1),
        taps(taps),
        second(min(taps.first + 1, x.map - 1)),
        third(min(taps.first + 2, x.map - 1)) {}
  __device__ __forceinline__ float read(int row) const {
    const float* from = map + static_cast<int64_t>(min(row, last_row)) * columns;
    return taps.a * from[taps.first] + taps.b * from[second] + taps.c * from[third];
  }
  // Goes down to the rows from `row` on.
  __device__ __forceinline__ void go_to(int row) {
    if (row > first + 2 || first < 0) {
      first = row;
      top = read(row);
      middle = read(row + 1);
      bottom = read(row + 2);
    }
    for (; first < row; ++first) {
      top = middle;
      middle = bottom;
      bottom = read(first + 3);
    }
  }
  const float* map;
  const int columns, last_row;
  const Taps taps;
  const int second, third;
  int first = -1;
  float top, middle, bottom;
};

// Like PyTorch's sigmoid times the foreground: not a number stays that.
__device__ __forceinline__ float foreground_probability(float logit) {
  return logit > 0 ? 1 / (1 + expf(-logit)) : (logit <= 0 ? 0.0f : logit);
}

// Puts up to 32 pixels of a column, from line `begin` on, where they stand in the block's bits.
__device__ __forceinline__ void put_bits(unsigned* words, int64_t begin, unsigned bits) {
  const int64_t word = begin / 32;
  const int shift = static_cast<int>(begin % 32);
  if (bits << shift) atomicOr(words + word, bits << shift);
  if (shift && bits >> (32 - shift)) atomicOr(words + word + 1, bits >> (32 - shift));
}

__global__ void resized_masks_kernel(const ResizedMasks in) {
  extern __shared__ SampleLevel levels[];  // one name and type for all kernels
  unsigned* words = reinterpret_cast<unsigned*>(levels);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t mask = blockIdx.z * kMasksPerLayer + blockIdx.y;
  if (mask >= in.masks) return;
  const int height = in.y.output, width = in.x.output;
  if (in.bits != nullptr) {  // 32 columns of a bit for each line
    for (int i = threadIdx.x; i < height; i += kMaskWarps * kWarp) words[i] = 0;
    __syncthreads();
  }
  const int x = blockIdx.x * kWarp + lane;
  const bool inside = x < width;
  const float* map = in.maps + mask * in.y.map * in.x.map;
  Rows rows(map, in.y, in.x, find_taps(in.x, min(x, width - 1)));
  float probability = 0;
  int area = 0;
  for (int begin = warp * kWarp; begin < height; begin += kMaskWarps * kWarp) {
    const Taps down = find_taps(in.y, min(begin + lane, height - 1));
    const int lines = min(kWarp, height - begin);
    unsigned bits = 0;
    for (int line = 0; line < lines; ++line) {
      const float a = __shfl_sync(kWholeWarp, down.a, line, kWarp);
      const float b = __shfl_sync(kWholeWarp, down.b, line, kWarp);
      const float c = __shfl_sync(kWholeWarp, down.c, line, kWarp);
      rows.go_to(__shfl_sync(kWholeWarp, down.first, line, kWarp));
      const float logit = a * rows.top + b * rows.middle + c * rows.bottom;
      if (!inside) continue;
      const int64_t place = (mask * height + begin + line) * width + x;
      if (in.logits != nullptr) in.logits[place] = logit;
      if (in.foreground != nullptr) in.foreground[place] = logit > 0;
      bits |= static_cast<unsigned>(logit > 0) << line;
      area += logit > 0;
      if (in.sums != nullptr) probability += foreground_probability(logit);
    }
    if (in.bits != nullptr) put_bits(words, static_cast<int64_t>(lane) * height + begin, bits);
  }
  if (in.sums != nullptr) {
    const float total = group_sum<kWarp>(probability);
    const float pixels = group_sum<kWarp>(static_cast<float>(area));
    if (lane == 0) {
      float* sums = in.sums + 2 * (mask * in.parts + blockIdx.x * kMaskWarps + warp);
      sums[0] = total;
      sums[1] = pixels;
    }
  }
  if (in.bits == nullptr) return;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp / 8 * height;
  const int64_t wanted = min(in.mask_bytes - first, static_cast<int64_t>(kWarp) / 8 * height);
  uint8_t* target = in.bits + mask * in.mask_bytes + first;
  for (int64_t i = threadIdx.x; i < wanted; i += kMaskWarps * kWarp) {
    target[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

// A warp has a mask.
__global__ void mask_quality_kernel(const float* sums, int64_t parts, float* quality) {
  const float* own = sums + 2 * parts * blockIdx.x;
  double total = 0, pixels = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kWarp) {
    total += own[2 * i];
    pixels += own[2 * i + 1];
  }
  total = group_sum<kWarp>(total);
  pixels = group_sum<kWarp>(pixels);
  if (threadIdx.x == 0) quality[blockIdx.x] = static_cast<float>(total / (pixels + 1e-6));
}

unsigned blocks_of_mask(const ResizedAxis& x) {
  return static_cast<unsigned>((x.output + kWarp - 1) / kWarp);
}

}  // namespace

int64_t parts_of_mask(const ResizedAxis& x) {
  return static_cast<int64_t>(blocks_of_mask(x)) * kMaskWarps;
}

void launch_resized_masks(const ResizedMasks& in, cudaStream_t stream) {
  const Grid grid{blocks_of_mask(in.x), static_cast<unsigned>(std::min(in.masks, kMasksPerLayer)),
                  static_cast<unsigned>((in.masks + kMasksPerLayer - 1) / kMasksPerLayer)};
  const size_t shared = in.bits == nullptr ? 0 : sizeof(unsigned) * in.y.output;
  launch(resized_masks_kernel, grid, kMaskWarps * kWarp, shared, stream, in);
}

void launch_mask_quality(const float* sums, int64_t masks, int64_t parts, float* quality,
                         cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(masks), 1, 1};
  launch(mask_quality_kernel, grid, kWarp, 0, stream, sums, parts, quality);
}

}  // namespace cuda
}  // namespace maskdino
