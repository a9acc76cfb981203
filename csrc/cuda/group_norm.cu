// Group norm of maps on a GPU, in two launches. Blocks of the first leave moments of their part of
// a group; each block of the second combines all of them, in the same order, and norms its part.
#include <cmath>

#include "group_norm.cuh"
#include "launch.cuh"
#include "sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {

constexpr int kMomentsAhead = 4, kNormAhead = 2;  // vectors that a thread has under way

// Where a thread works: from pixel `begin` on, `step` further each time. A thread without work runs
// along to the barriers.
struct Share {
  int64_t image;
  int part, group, channel;  // the first group of the block; the first channel of the thread
  int column, columns, line, lines;
  int begin, end, step;
  int64_t first, stride;  // place in the map of the image's first pixel; from a pixel to the next
};

template <bool kRows, int kVector>
__device__ __forceinline__ Share share_of(const Cut& cut, int block) {
  Share at{};
  const int width = cut.channels / cut.groups, thread = threadIdx.x;
  const int pieces = kRows ? cut.slices : cut.channels;
  const int piece = kRows ? block % pieces : block / cut.parts % pieces;
  at.part = kRows ? block / pieces % cut.parts : block % cut.parts;
  at.image = block / pieces / cut.parts;
  at.columns = kRows ? cut.slice_groups * width / kVector : 1;
  at.lines = kGroupThreads / at.columns;
  at.column = thread % at.columns;
  at.line = thread / at.columns;
  at.group = kRows ? piece * cut.slice_groups : piece / width;
  at.channel = kRows ? at.group * width + at.column * kVector : piece;
  at.stride = kRows ? cut.channels : 1;
  at.first = at.image * cut.pixels * cut.channels +
             (kRows ? at.channel : static_cast<int64_t>(piece) * cut.pixels);
  at.begin = at.part * cut.part_pixels + at.line * (kRows ? 1 : kVector);
  at.end = at.part * cut.part_pixels + cut.part_pixels;
  if (at.end > cut.pixels) at.end = cut.pixels;
  if (at.line >= at.lines || at.channel >= cut.channels) at.begin = at.end;
  at.step = at.lines * (kRows ? 1 : kVector);
  return at;
}

// Calls `use(pixel, numbers)` for each vector of a thread; some are loaded before any is used.
template <int kVector, int kAhead, typename T, typename Use>
__device__ __forceinline__ void for_each_vector(const T* map, const Share& at, const Use& use) {
#pragma unroll 1
  for (int pixel = at.begin; pixel < at.end; pixel += kAhead * at.step) {
    Pack<T, kVector> packs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int place = pixel + k * at.step;
      if (place < at.end) packs[k] = load_pack<kVector>(map + at.first + place * at.stride);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int place = pixel + k * at.step;
      if (place >= at.end) break;
      float numbers[kVector];
      unpack(packs[k], numbers);
      use(place, numbers);
    }
  }
}

// Of both, which have the same origin.
__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float distance = b.mean - a.mean, share = b.count / count;
  return {count, a.origin, a.mean + distance * share,
          a.squares + b.squares + distance * distance * a.count * share};
}

template <typename T>
__device__ __forceinline__ float shift_at(const GroupInput<T>& in, int channel) {
  if (in.shift != nullptr) return in.shift[channel];
  return in.half_shift != nullptr ? static_cast<float>(in.half_shift[channel]) : 0.0f;
}

// Sums of distances from a thread's own first number are as good as its numbers, however far
// these are from 0: the first is one of them, and they are few. The origin is the first number of
// the group, or plane, in this part.
template <typename T, bool kRows, int kVector>
__device__ __forceinline__ Moments moments_of(const GroupInput<T>& in, const Share& at) {
  if (at.begin >= at.end) return {0, 0, 0, 0};
  const int width = in.cut.channels / in.cut.groups;
  const int channel = kRows ? at.channel / width * width : at.channel;
  const int64_t start = at.first + (channel - at.channel) +
                        static_cast<int64_t>(at.part) * in.cut.part_pixels * at.stride;
  Moments total{0, static_cast<float>(in.x[start]) + shift_at(in, channel), 0, 0};
  float origin[kVector], sums[kVector] = {}, squares[kVector] = {}, count = 0;
  unpack(load_pack<kVector>(in.x + at.first + at.begin * at.stride), origin);
  for_each_vector<kVector, kMomentsAhead>(in.x, at, [&](int, const float (&numbers)[kVector]) {
    count += 1;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float distance = numbers[k] - origin[k];
      sums[k] += distance;
      squares[k] += distance * distance;
    }
  });
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float mean = sums[k] / count, rest = squares[k] - sums[k] * mean;
    const float shift = shift_at(in, at.channel + (kRows ? k : 0));
    const float apart = origin[k] - total.origin + shift + mean;
    total = merged(total, {count, total.origin, apart, rest < 0 ? 0.0f : rest});
  }
  return total;
}

template <typename T, bool kRows, int kVector>
__global__ void __launch_bounds__(kGroupThreads) group_moments_kernel(const GroupInput<T> in) {
  extern __shared__ Moments group_shared[];
  const Cut& cut = in.cut;
  const int block = blockIdx.x;
  const Share at = share_of<kRows, kVector>(cut, block);
  const int thread = threadIdx.x, width = cut.channels / cut.groups;
  group_shared[thread] = moments_of<T, kRows, kVector>(in, at);
  for (int left = at.lines; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (at.line + half < left) {
      group_shared[thread] = merged(group_shared[thread], group_shared[thread + half * at.columns]);
    }
    left = half;
  }
  __syncthreads();
  if (!kRows) {
    if (thread == 0) in.moments[block] = group_shared[0];
    return;
  }
  const int columns = width / kVector;  // of a group
  if (at.line > 0 || at.column % columns != 0 || at.channel >= cut.channels) return;
  Moments total = group_shared[thread];
  for (int k = 1; k < columns; ++k) total = merged(total, group_shared[thread + k]);
  in.moments[(at.image * cut.groups + at.channel / width) * cut.parts + at.part] = total;
}

// The mean of a group, origin + distance, and 1 / deviation.
struct Normal {
  float origin, distance, scale;
};

// One warp reads the moments of all parts twice.

template <typename T>
__device__ __forceinline__ Normal normal_of(const GroupInput<T>& in, int64_t image, int group,
                                            int parts) {
  const int lane = threadIdx.x % kWarp;
  const Moments* moments = in.moments + (image * in.cut.groups + group) * parts;
  const float origin = moments[0].origin;
  float count = 0, distances = 0, squares = 0;
#pragma unroll 2
  for (int i = lane; i < parts; i += kWarp) {
    const Moments part = moments[i];
    count += part.count;
    distances += part.count * (part.origin - origin + part.mean);
  }
  count = group_sum<kWarp>(count);
  const float distance = group_sum<kWarp>(distances) / count;
#pragma unroll 2
  for (int i = lane; i < parts; i += kWarp) {
    const Moments part = moments[i];
    const float apart = part.origin - origin + part.mean - distance;
    squares += part.squares + part.count * apart * apart;
  }
  const float variance = group_sum<kWarp>(squares) / count;
  return {origin, distance, 1 / sqrtf(variance + in.eps)};
}

// a + b; adds to `lost` by how much it is too small. Maps may be far from 0.
__device__ __forceinline__ float rounded_sum(float a, float b, float& lost) {
  const float sum = a + b, added = sum - a;
  lost += (a - (sum - added)) + (b - added);
  return sum;
}

// The two coarse pixels between which the center of a pixel lies, and the second one's weight.
struct Between {
  int first, second;
  float weight;
};

__device__ __forceinline__ Between between(int pixel, float scale, int size) {
  const float place = scale * (static_cast<float>(pixel) + 0.5f) - 0.5f;
  const float inside = place < 0 ? 0.0f : place;
  const int whole = static_cast<int>(inside), first = whole < size - 1 ? whole : size - 1;
  return {first, first + (first < size - 1 ? 1 : 0), inside - static_cast<float>(first)};
}

template <int kVector>
__device__ __forceinline__ void load_floats(const float* source, float (&numbers)[kVector]) {
  constexpr int kPack = kVector % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int k = 0; k < kVector; k += kPack) {
    const Pack<float, kPack> pack = load_pack<kPack>(source + k);
#pragma unroll
    for (int i = 0; i < kPack; ++i) numbers[k + i] = pack.element[i];
  }
}

// Adds the resized coarse map: of one pixel kVector channels, or kVector neighbors in a plane.
template <bool kRows, int kVector, typename U>
__device__ __forceinline__ void add_coarse(const GroupOutput<U>& out, const Share& at, int channels,
                                           int pixel, float (&numbers)[kVector]) {
  const float* coarse = out.coarse + at.image * out.coarse_step;
  if constexpr (kRows) {
    const Between y = between(pixel / out.width, out.scale_y, out.coarse_height);
    const Between x = between(pixel % out.width, out.scale_x, out.coarse_width);
    float corner[2][2][kVector];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t line = k / 2 == 0 ? y.first : y.second, place = k % 2 == 0 ? x.first : x.second;
      load_floats(coarse + (line * out.coarse_width + place) * channels + at.channel,
                  corner[k / 2][k % 2]);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float above = (1 - x.weight) * corner[0][0][k] + x.weight * corner[0][1][k];
      const float below = (1 - x.weight) * corner[1][0][k] + x.weight * corner[1][1][k];
      numbers[k] += (1 - y.weight) * above + y.weight * below;
    }
  } else {
    coarse += static_cast<int64_t>(at.channel) * out.coarse_height * out.coarse_width;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const Between y = between((pixel + k) / out.width, out.scale_y, out.coarse_height);
      const Between x = between((pixel + k) % out.width, out.scale_x, out.coarse_width);
      const float* top = coarse + static_cast<int64_t>(y.first) * out.coarse_width;
      const float* bottom = coarse + static_cast<int64_t>(y.second) * out.coarse_width;
      const float above = (1 - x.weight) * top[x.first] + x.weight * top[x.second];
      const float below = (1 - x.weight) * bottom[x.first] + x.weight * bottom[x.second];
      numbers[k] += (1 - y.weight) * above + y.weight * below;
    }
  }
}

// Blocks go through the map from its end: what the first launch read last is still in the cache.
template <typename T, typename U, bool kRows, int kVector, bool kCoarse>
__global__ void __launch_bounds__(kGroupThreads)
    group_norm_kernel(const GroupInput<T> in, const GroupOutput<U> out, int last_block) {
  extern __shared__ Moments group_shared[];
  Normal* shared = reinterpret_cast<Normal*>(group_shared);
  const Cut& cut = in.cut;
  const Share at = share_of<kRows, kVector>(cut, last_block - static_cast<int>(blockIdx.x));
  const int width = cut.channels / cut.groups, warp = threadIdx.x / kWarp;
  const int parts = kRows ? cut.parts : cut.parts * width;
  const int groups = kRows ? cut.slice_groups : 1;
  for (int k = warp; k < groups && at.group + k < cut.groups; k += kGroupThreads / kWarp) {
    const Normal normal = normal_of(in, at.image, at.group + k, parts);
    if (threadIdx.x % kWarp != 0) continue;
    shared[k] = normal;
    if (at.part == 0 && (kRows || at.channel % width == 0)) {
      float* kept = in.mean_and_scale + (at.image * cut.groups + at.group + k) * 2;
      kept[0] = normal.origin + normal.distance;
      kept[1] = normal.scale;
    }
  }
  __syncthreads();
  if (at.begin >= at.end) return;
  const Normal normal = shared[at.channel / width - at.group];
  float center[kVector], scale[kVector], bias[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const int channel = at.channel + (kRows ? k : 0);
    float lost = 0;
    const float origin = rounded_sum(normal.origin, -shift_at(in, channel), lost);
    center[k] = rounded_sum(origin, normal.distance, lost);
    scale[k] = normal.scale * in.weight[channel];
    bias[k] = in.bias[channel] - lost * scale[k];
  }
  for_each_vector<kVector, kCoarse ? 1 : kNormAhead>(
      in.x, at, [&](int pixel, float (&numbers)[kVector]) {
        Pack<U, kVector> pack;
#pragma unroll
        for (int k = 0; k < kVector; ++k)
          numbers[k] = (numbers[k] - center[k]) * scale[k] + bias[k];
        if constexpr (kCoarse) add_coarse<kRows>(out, at, cut.channels, pixel, numbers);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {  // not a number stays that
          pack.element[k] = static_cast<U>(out.relu && numbers[k] < 0 ? 0.0f : numbers[k]);
        }
        *reinterpret_cast<Pack<U, kVector>*>(out.normed + at.first + pixel * at.stride) = pack;
      });
}

// Sums of a block's part, channel by channel, of gradients and of gradients times the normed map.
template <typename T, typename G, bool kRows, int kVector>
__global__ void __launch_bounds__(kGroupThreads)
    group_sums_kernel(const GroupGradient<T, G> gradient) {
  extern __shared__ Moments group_shared[];
  float* shared = reinterpret_cast<float*>(group_shared);  // (kVector, 2, kGroupThreads)
  const GroupInput<T>& in = gradient.in;
  const Cut& cut = in.cut;
  const Share at = share_of<kRows, kVector>(cut, static_cast<int>(blockIdx.x));
  const int width = cut.channels / cut.groups, thread = threadIdx.x;
  float plain[kVector] = {}, normed[kVector] = {};
  if (at.begin < at.end) {
    const float* kept = in.mean_and_scale + (at.image * cut.groups + at.channel / width) * 2;
    const float mean = kept[0], scale = kept[1];
    float weight[kVector], bias[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      weight[k] = in.weight[at.channel + (kRows ? k : 0)];
      bias[k] = in.bias[at.channel + (kRows ? k : 0)];
    }
    for_each_vector<kVector, kNormAhead>(in.x, at, [&](int pixel, float (&numbers)[kVector]) {
      float grads[kVector];
      unpack(load_pack<kVector>(gradient.grad + at.first + pixel * at.stride), grads);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float value = (numbers[k] - mean) * scale;
        const bool passes = !gradient.relu || value * weight[k] + bias[k] > 0;
        const float grad = passes ? grads[k] : 0.0f;
        plain[k] += grad;
        normed[k] += grad * value;
      }
    });
  }
  if (!kRows) {
#pragma unroll
    for (int k = 1; k < kVector; ++k) {
      plain[0] += plain[k];
      normed[0] += normed[k];
    }
  }
  constexpr int kKept = kRows ? kVector : 1;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    shared[2 * k * kGroupThreads + thread] = plain[k];
    shared[(2 * k + 1) * kGroupThreads + thread] = normed[k];
  }
  for (int left = at.lines; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (at.line + half < left) {
#pragma unroll
      for (int k = 0; k < 2 * kKept; ++k) {
        float* row = shared + k * kGroupThreads + thread;
        row[0] += row[half * at.columns];
      }
    }
    left = half;
  }
  if (at.line > 0 || at.channel >= cut.channels) return;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    float* sums =
        gradient.parts + ((at.image * cut.channels + at.channel + k) * cut.parts + at.part) * 2;
    sums[0] = shared[2 * k * kGroupThreads + thread];
    sums[1] = shared[(2 * k + 1) * kGroupThreads + thread];
  }
}

// A warp has a channel: the sums of all its parts, of each image and of all.
template <typename T, typename G>
__global__ void __launch_bounds__(kGroupThreads)
    group_fold_kernel(const GroupGradient<T, G> gradient) {
  const Cut& cut = gradient.in.cut;
  const int channel = static_cast<int>(blockIdx.x) * (kGroupThreads / kWarp) +
                      static_cast<int>(threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (channel >= cut.channels) return;
  float bias = 0, weight = 0;
  for (int64_t image = 0; image < cut.images; ++image) {
    const int64_t place = image * cut.channels + channel;
    const float* parts = gradient.parts + place * cut.parts * 2;
    float plain = 0, normed = 0;
    for (int i = lane; i < cut.parts; i += kWarp) {
      plain += parts[2 * i];
      normed += parts[2 * i + 1];
    }
    plain = group_sum<kWarp>(plain);
    normed = group_sum<kWarp>(normed);
    bias += plain;
    weight += normed;
    if (lane == 0) {
      gradient.sums[2 * place] = plain;
      gradient.sums[2 * place + 1] = normed;
    }
  }
  if (lane == 0) {
    gradient.weight[channel] = weight;
    gradient.bias[channel] = bias;
  }
}

template <typename T, typename G, bool kRows, int kVector>
__global__ void __launch_bounds__(kGroupThreads)
    group_gradient_kernel(const GroupGradient<T, G> gradient, int last_block) {
  const GroupInput<T>& in = gradient.in;
  const Cut& cut = in.cut;
  const Share at = share_of<kRows, kVector>(cut, last_block - static_cast<int>(blockIdx.x));
  if (at.begin >= at.end) return;
  const int width = cut.channels / cut.groups, group = at.channel / width;
  const float* kept = in.mean_and_scale + (at.image * cut.groups + group) * 2;
  const float mean = kept[0], scale = kept[1];
  float plain = 0, normed = 0;  // means over the group
  for (int channel = group * width; channel < (group + 1) * width; ++channel) {
    const float* sums = gradient.sums + (at.image * cut.channels + channel) * 2;
    plain += sums[0] * in.weight[channel];
    normed += sums[1] * in.weight[channel];
  }
  const float count = static_cast<float>(width) * static_cast<float>(cut.pixels);
  plain /= count;
  normed /= count;
  float weight[kVector], bias[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    weight[k] = in.weight[at.channel + (kRows ? k : 0)];
    bias[k] = in.bias[at.channel + (kRows ? k : 0)];
  }
  for_each_vector<kVector, kNormAhead>(in.x, at, [&](int pixel, float (&numbers)[kVector]) {
    float grads[kVector];
    const int64_t place = at.first + pixel * at.stride;
    unpack(load_pack<kVector>(gradient.grad + place), grads);
    Pack<T, kVector> pack;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float value = (numbers[k] - mean) * scale;
      const bool passes = !gradient.relu || value * weight[k] + bias[k] > 0;
      const float grad = passes ? grads[k] * weight[k] : 0.0f;
      pack.element[k] = static_cast<T>((grad - plain - value * normed) * scale);
    }
    *reinterpret_cast<Pack<T, kVector>*>(gradient.x + place) = pack;
  });
}

// Pixels that may read a coarse one, and the weight with which one does.
struct Readers {
  int first, end;
};

__device__ __forceinline__ Readers readers_of(int coarse, float scale, int coarse_size, int size) {
  const float low = (static_cast<float>(coarse) - 0.5f) / scale - 1.5f;
  const float high = (static_cast<float>(coarse) + 1.5f) / scale + 1.5f;
  const int first = coarse == 0 || low < 0 ? 0 : static_cast<int>(low);
  const int end =
      coarse == coarse_size - 1 || high >= static_cast<float>(size) ? size : static_cast<int>(high);
  return {first, end};
}

__device__ __forceinline__ float weight_in(const Between& pixel, int coarse) {
  return (pixel.first == coarse ? 1 - pixel.weight : 0.0f) +
         (pixel.second == coarse ? pixel.weight : 0.0f);
}

template <typename G, int kVector>
__global__ void __launch_bounds__(kGroupThreads)
    resize_backward_kernel(const ResizeGradient<G> in) {
  int64_t rest = static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  const int64_t target = rest * kVector;
  const int columns = in.channels / kVector;
  const int channel = static_cast<int>(rest % columns) * kVector;
  rest /= columns;
  const int x = static_cast<int>(rest % in.coarse_width);
  rest /= in.coarse_width;
  const int y = static_cast<int>(rest % in.coarse_height);
  const int64_t image = rest / in.coarse_height;
  if (image >= in.images) return;
  const Readers lines = readers_of(y, in.scale_y, in.coarse_height, in.height);
  const Readers places = readers_of(x, in.scale_x, in.coarse_width, in.width);
  float sums[kVector] = {};
  for (int line = lines.first; line < lines.end; ++line) {
    const float vertical = weight_in(between(line, in.scale_y, in.coarse_height), y);
    if (vertical == 0) continue;
    for (int place = places.first; place < places.end; ++place) {
      const float weight = vertical * weight_in(between(place, in.scale_x, in.coarse_width), x);
      if (weight == 0) continue;
      const int64_t pixel = (image * in.height + line) * in.width + place;
      float grads[kVector];
      unpack(load_pack<kVector>(in.grad + pixel * in.channels + channel), grads);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sums[k] += weight * grads[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) in.coarse[target + k] = sums[k];
}

// `run(rows, vector)` with the two as constants.
template <typename T, typename Run>
void for_cut(const Cut& cut, const Run& run) {
  using One = std::integral_constant<int, 1>;
  using Many = std::integral_constant<int, static_cast<int>(16 / sizeof(T))>;
  if (cut.rows) {
    cut.vector > 1 ? run(std::true_type{}, Many{}) : run(std::true_type{}, One{});
  } else {
    cut.vector > 1 ? run(std::false_type{}, Many{}) : run(std::false_type{}, One{});
  }
}

}  // namespace

template <typename T>
void launch_group_moments(const GroupInput<T>& in, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(in.cut.blocks()), 1, 1};
  for_cut<T>(in.cut, [&](auto rows, auto vector) {
    launch(group_moments_kernel<T, rows(), vector()>, grid, kGroupThreads,
           kGroupThreads * sizeof(Moments), stream, in);
  });
}

template <typename T, typename U>
void launch_group_norm(const GroupInput<T>& in, const GroupOutput<U>& out, cudaStream_t stream) {
  const Grid grid{static_cast<unsigned>(in.cut.blocks()), 1, 1};
  for_cut<T>(in.cut, [&](auto rows, auto vector) {
    const auto run = [&](auto kernel) {
      launch(kernel, grid, kGroupThreads, kGroupThreads * sizeof(Moments), stream, in, out,
             static_cast<int>(in.cut.blocks() - 1));
    };
    if (out.coarse != nullptr) {
      run(group_norm_kernel<T, U, rows(), vector(), true>);
    } else {
      run(group_norm_kernel<T, U, rows(), vector(), false>);
    }
  });
}

template <typename T, typename G>
void launch_group_norm_backward(const GroupGradient<T, G>& gradient, cudaStream_t stream) {
  const Cut& cut = gradient.in.cut;
  const Grid grid{static_cast<unsigned>(cut.blocks()), 1, 1};
  constexpr unsigned kFolds = kGroupThreads / kWarp;
  const Grid folds{(static_cast<unsigned>(cut.channels) + kFolds - 1) / kFolds, 1, 1};
  for_cut<T>(cut, [&](auto rows, auto vector) {
    const size_t shared = sizeof(float) * 2 * kGroupThreads * (rows() ? vector() : 1);
    launch(group_sums_kernel<T, G, rows(), vector()>, grid, kGroupThreads, shared, stream,
           gradient);
    launch(group_fold_kernel<T, G>, folds, kGroupThreads, 0, stream, gradient);
    launch(group_gradient_kernel<T, G, rows(), vector()>, grid, kGroupThreads, 0, stream, gradient,
           static_cast<int>(cut.blocks() - 1));
  });
}

template <typename G>
void launch_resize_backward(const ResizeGradient<G>& gradient, cudaStream_t stream) {
  const int64_t threads = gradient.images * gradient.coarse_height * gradient.coarse_width *
                          (gradient.channels / gradient.vector);
  const Grid grid{static_cast<unsigned>((threads + kGroupThreads - 1) / kGroupThreads), 1, 1};
  constexpr int kMany = static_cast<int>(16 / sizeof(G));
  if (gradient.vector > 1) {
    launch(resize_backward_kernel<G, kMany>, grid, kGroupThreads, 0, stream, gradient);
  } else {
    launch(resize_backward_kernel<G, 1>, grid, kGroupThreads, 0, stream, gradient);
  }
}

#define MASKDINO_INSTANTIATE(T, U)                                                   \
  template void launch_group_norm<T, U>(const GroupInput<T>&, const GroupOutput<U>&, \
                                        cudaStream_t);                               \
  template void launch_group_norm_backward<T, U>(const GroupGradient<T, U>&, cudaStream_t);
#define MASKDINO_INSTANTIATE_TYPE(T)                                         \
  template void launch_group_moments<T>(const GroupInput<T>&, cudaStream_t); \
  template void launch_resize_backward<T>(const ResizeGradient<T>&, cudaStream_t);
MASKDINO_INSTANTIATE_TYPE(float)
MASKDINO_INSTANTIATE_TYPE(c10::Half)
MASKDINO_INSTANTIATE_TYPE(c10::BFloat16)
MASKDINO_INSTANTIATE(float, float)
MASKDINO_INSTANTIATE(c10::Half, c10::Half)
MASKDINO_INSTANTIATE(c10::Half, float)
MASKDINO_INSTANTIATE(c10::BFloat16, c10::BFloat16)
MASKDINO_INSTANTIATE(c10::BFloat16, float)
#undef MASKDINO_INSTANTIATE_TYPE
#undef MASKDINO_INSTANTIATE

}  // namespace cuda
}  // namespace maskdino
