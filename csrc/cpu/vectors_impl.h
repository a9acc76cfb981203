// Vectors of MASKDINO_VECTOR_BYTES bytes (GCC's and Clang's vector types) and what the kernels do
// with them. Included by kernels_impl.h alone, once per instruction set.

namespace maskdino {
namespace cpu {
namespace MASKDINO_INSTRUCTION_SET {
namespace {

#define MASKDINO_INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MASKDINO_VECTOR_BYTES)));
  typedef T quarter __attribute__((vector_size(16)));
  typedef Integer<T> integers __attribute__((vector_size(MASKDINO_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Integers = typename VectorOf<T>::integers;

template <typename T>
constexpr int64_t kLanes = MASKDINO_VECTOR_BYTES / sizeof(T);

template <typename V>
MASKDINO_INLINE V load_as(const void* source) {
  V vector;
  __builtin_memcpy(&vector, source, sizeof(vector));
  return vector;
}

template <typename T>
MASKDINO_INLINE Vector<T> load(const T* source) {
  return load_as<Vector<T>>(source);
}

template <typename V, typename T>
MASKDINO_INLINE void store(T* target, V vector) {
  __builtin_memcpy(target, &vector, sizeof(vector));
}

// Combines the lanes of a vector, halving it until 16 bytes are left.
template <typename T, typename Combine>
MASKDINO_INLINE T fold_lanes(Vector<T> vector, const Combine& combine) {
  constexpr int kParts = MASKDINO_VECTOR_BYTES / 16;
  constexpr int kLanesOfPart = 16 / sizeof(T);
  typename VectorOf<T>::quarter parts[kParts];
  __builtin_memcpy(parts, &vector, sizeof(parts));
  for (int count = kParts / 2; count >= 1; count /= 2) {
    for (int part = 0; part < count; ++part) {
      parts[part] = combine(parts[part], parts[part + count]);
    }
  }
  const T first = combine(parts[0][0], parts[0][kLanesOfPart / 2]);
  if (kLanesOfPart == 2) return first;
  return combine(first, combine(parts[0][1], parts[0][kLanesOfPart - 1]));
}

template <typename T>
MASKDINO_INLINE T sum_lanes(Vector<T> vector) {
  return fold_lanes<T>(vector, [](auto a, auto b) { return a + b; });
}

// The largest lane; NaN lanes may be passed over.
template <typename T>
MASKDINO_INLINE T largest_lane(Vector<T> vector) {
  return fold_lanes<T>(vector, [](auto a, auto b) { return a > b ? a : b; });
}

template <typename T, int... Lanes>
MASKDINO_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b, std::integer_sequence<int, Lanes...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lanes...);
#else
  return __builtin_shuffle(a, b, Integers<T>{Lanes...});
#endif
}

// Lanes `first` and `first + 1` of every 16 bytes of a and b: interleaved (a b a b) or not (a a b
// b).
template <bool Interleaved, int First, int... Lanes>
constexpr auto pick(std::integer_sequence<int, Lanes...>) {
  constexpr int n = sizeof...(Lanes);
  return std::integer_sequence<int, (Lanes / 4 * 4 + First +
                                     (Interleaved ? Lanes % 4 / 2 + Lanes % 2 * n
                                                  : Lanes % 2 + Lanes % 4 / 2 * n))...>{};
}

// Sums the lanes of four vectors: interleaving and adding leaves the four sums side by side.
MASKDINO_INLINE void sum_lanes_of_four(const Vector<float>* v, float* sums) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
  constexpr auto low = pick<true, 0>(lanes);
  constexpr auto high = pick<true, 2>(lanes);
  constexpr auto left = pick<false, 0>(lanes);
  constexpr auto right = pick<false, 2>(lanes);
  const Vector<float> ab = shuffle<float>(v[0], v[1], low) + shuffle<float>(v[0], v[1], high);
  const Vector<float> cd = shuffle<float>(v[2], v[3], low) + shuffle<float>(v[2], v[3], high);
  const Vector<float> abcd = shuffle<float>(ab, cd, left) + shuffle<float>(ab, cd, right);
  constexpr int kParts = MASKDINO_VECTOR_BYTES / 16;
  VectorOf<float>::quarter parts[kParts];
  __builtin_memcpy(parts, &abcd, sizeof(parts));
  for (int count = kParts / 2; count >= 1; count /= 2) {
    for (int part = 0; part < count; ++part) parts[part] += parts[part + count];
  }
  for (int k = 0; k < 4; ++k) sums[k] = parts[0][k];
}

MASKDINO_INLINE void sum_lanes_of_four(const Vector<double>* v, double* sums) {
  for (int k = 0; k < 4; ++k) sums[k] = sum_lanes<double>(v[k]);
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87, NaN for NaN. Free of branches
// and library calls, so that a loop over it vectorises.
MASKDINO_INLINE float exp_nonpositive(float x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float power = shifted - kRound;
  const float rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
  float series = 1.9875691e-4f;
  series = series * rest + 1.3981999e-3f;
  series = series * rest + 8.3334519e-3f;
  series = series * rest + 4.1665795e-2f;
  series = series * rest + 1.6666665e-1f;
  series = series * rest + 5.0000001e-1f;
  series = series * rest * rest + rest + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;  // the low bits of `shifted` hold the power of two
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return x < -87.0f ? 0.0f : series * scale;
}

MASKDINO_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }

}  // namespace
}  // namespace MASKDINO_INSTRUCTION_SET
}  // namespace cpu
}  // namespace maskdino
