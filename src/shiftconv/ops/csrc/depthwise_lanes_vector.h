// Vectors whose lanes are channels, and how maps of either memory format become rows of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "depthwise_problem.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SHIFTCONV_CHANNELS_AVX512
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined, so how vectors are passed does not matter

namespace shiftconv::channelwise {

// What numbers of type T are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(SHIFTCONV_CHANNELS_AVX512)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <class W>
struct VectorOf {
  typedef W type __attribute__((vector_size(vector_bytes)));
};
template <class W>
using Vector = typename VectorOf<W>::type;
using Bits = Vector<uint32_t>;

template <class W>
constexpr int64_t width = vector_bytes / int64_t{sizeof(W)};  // channels of a vector

// Calls body with 0, 1, ... count - 1 as constants.
template <int count, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, count>{});
}

template <class V>
[[gnu::always_inline]] inline V fma(V a, V b, V sum) {
#if defined(SHIFTCONV_CHANNELS_AVX512)
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
  if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
  if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#endif
  return a * b + sum;
}

template <class V>
inline bool any_nonzero(V v) {
#if defined(SHIFTCONV_CHANNELS_AVX512)
  if constexpr (std::is_same_v<V, Vector<float>>)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
  else
    return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NEQ_UQ) != 0;
#else
  const auto differs = v != 0;
  Vector<uint64_t> words;
  std::memcpy(&words, &differs, sizeof(words));
  uint64_t any = 0;
  for (int64_t i = 0; i < width<uint64_t>; ++i) any |= words[i];
  return any != 0;
#endif
}

template <class T>
inline Vector<Wide<T>> load(const T* from) {
  using W = Wide<T>;
  Vector<W> v{};
  if constexpr (std::is_same_v<T, W>) {
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
#if defined(SHIFTCONV_CHANNELS_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if constexpr (std::is_same_v<T, c10::BFloat16>) return (Vector<W>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if constexpr (std::is_same_v<T, c10::BFloat16>) return (Vector<W>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  for (int64_t i = 0; i < width<W>; ++i) v[i] = static_cast<W>(from[i]);
#endif
  return v;
}

// float32 as bfloat16 in the upper half of its bits: nearest even, a NaN stays one.
inline Bits rounded(Vector<float> v) {
  const Bits bits = (Bits)v, nan = (Bits)(v != v);
  return ((bits + ((bits >> 16 & 1) + 0x7fff)) & ~nan) | (nan & 0x7fc00000);
}

template <class T>
inline void store(T* to, Vector<Wide<T>> v) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    std::memcpy(to, &v, sizeof(v));
    return;
  }
#if defined(SHIFTCONV_CHANNELS_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m256i bits = _mm512_cvtepi32_epi16((__m512i)(rounded(v) >> 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m256i high = (__m256i)(rounded(v) >> 16);
    const __m128i bits = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
  }
#else
  if constexpr (sizeof(T) == 2)
    for (int64_t i = 0; i < width<float>; ++i) to[i] = static_cast<T>(static_cast<float>(v[i]));
#endif
}

// Lane l of a or, from width on, of b.
template <int... l, class V>
[[gnu::always_inline]] inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, l...);
#else
  using Index = std::conditional_t<std::is_same_v<V, Vector<double>>, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vector<Index>{l...});
#endif
}

// Exchanges the blocks of `step` lanes that lie off the diagonal of two vectors `step` rows apart.
template <int step, class V>
[[gnu::always_inline]] inline void exchange(V& a, V& b) {
  constexpr int count = sizeof(V) / sizeof(a[0]);
  [&]<int... l>(std::integer_sequence<int, l...>) __attribute__((always_inline)) {
    const V low = shuffle<((l & step) ? count + l - step : l)...>(a, b);
    b = shuffle<((l & step) ? count + l : l + step)...>(a, b);
    a = low;
  }(std::make_integer_sequence<int, count>{});
}

// Rows and columns change places.
template <class W>
[[gnu::always_inline]] inline void transpose(Vector<W> (&v)[width<W>]) {
  constexpr int count = width<W>;
  const auto stage = [&](auto step) __attribute__((always_inline)) {
    if constexpr (step < count)
      unroll<count>([&](auto i) __attribute__((always_inline)) {
        if constexpr ((i & step) == 0) exchange<step>(v[i], v[i + step]);
      });
  };
  stage(std::integral_constant<int, 1>{});
  stage(std::integral_constant<int, 2>{});
  stage(std::integral_constant<int, 4>{});
  stage(std::integral_constant<int, 8>{});
}

// Channels that one vector carries: `valid` of them from `first`; those before `fresh` belong to another block.
struct Block {
  int64_t first, fresh, valid;

  static int64_t count(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes; }
  static Block at(int64_t index, int64_t channels, int64_t lanes) {
    const int64_t first = std::min(index * lanes, std::max<int64_t>(channels - lanes, 0));
    return {first, index * lanes - first, std::min(channels, lanes)};
  }
};

// to[i] = numbers i of all channels, which lie `stride` apart, for 0 <= i < count. Lanes without a channel repeat one.
template <class T>
void gather(const T* from, int64_t stride, int64_t valid, int64_t count, Vector<Wide<T>>* to) {
  using W = Wide<T>;
  constexpr int64_t lanes = width<W>;
  const T* row[lanes];
  for (int64_t l = 0; l < lanes; ++l) row[l] = from + std::min(l, valid - 1) * stride;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) {
      W all[lanes];
      for (int64_t l = 0; l < lanes; ++l) all[l] = static_cast<W>(row[l][i]);
      to[i] = load<W>(all);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += lanes) {
    i = std::min(i, count - lanes);
    Vector<W> v[lanes];
    unroll<lanes>([&](auto l) __attribute__((always_inline)) { v[l] = load<T>(row[l] + i); });
    transpose<W>(v);
    unroll<lanes>([&](auto l) __attribute__((always_inline)) { to[i + l] = v[l]; });
  }
}

// The opposite, for the channels that this block is to write.
template <class T>
void scatter(const Vector<Wide<T>>* from, int64_t count, const Block& block, T* to, int64_t stride) {
  using W = Wide<T>;
  constexpr int64_t lanes = width<W>;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t l = block.fresh; l < block.valid; ++l) to[l * stride + i] = static_cast<T>(from[i][l]);
    return;
  }
  for (int64_t i = 0; i < count; i += lanes) {
    i = std::min(i, count - lanes);
    Vector<W> v[lanes];
    unroll<lanes>([&](auto l) __attribute__((always_inline)) { v[l] = from[i + l]; });
    transpose<W>(v);
    unroll<lanes>([&](auto l) __attribute__((always_inline)) {
      if (block.fresh <= l && l < block.valid) store<T>(to + l * stride + i, v[l]);
    });
  }
}

// Pixels of the block's channels of one image, one vector each, row by row.
template <class T>
void read_map(const Map<const T>& map, int64_t n, const Block& block, int64_t h, int64_t w, Vector<Wide<T>>* to) {
  constexpr int64_t lanes = width<Wide<T>>;
  const T* from = map.plane(n, block.first);
  if (map.column == 1 && map.row == w) return gather<T>(from, map.channel, block.valid, h * w, to);
  for (int64_t i = 0; i < h * w; ++i, from += map.column) {
    if (block.valid == lanes) {
      to[i] = load<T>(from);
    } else {
      T all[lanes] = {};
      std::copy_n(from, block.valid, all);
      to[i] = load<T>(all);
    }
  }
}

template <class T>
void write_map(const Vector<Wide<T>>* from, const Block& block, const Map<T>& map, int64_t n, int64_t h, int64_t w) {
  constexpr int64_t lanes = width<Wide<T>>;
  T* to = map.plane(n, block.first);
  if (map.column == 1 && map.row == w) return scatter<T>(from, h * w, block, to, map.channel);
  for (int64_t i = 0; i < h * w; ++i, to += map.column) {
    if (block.fresh == 0 && block.valid == lanes) {
      store<T>(to, from[i]);
    } else {
      T all[lanes];
      store<T>(all, from[i]);
      std::copy(all + block.fresh, all + block.valid, to + block.fresh);
    }
  }
}

// Memory of a thread, handed out piece by piece and kept for the next call. One at a time per thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= held().size) return;
    held().memory.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
    held().size = bytes;
  }

  template <class V>
  V* take(int64_t count) {
    V* piece = reinterpret_cast<V*>(held().memory.get() + used_);
    used_ += count * static_cast<int64_t>(sizeof(V));
    return piece;
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  struct Held {
    std::unique_ptr<char[], Free> memory;
    int64_t size = 0;
  };
  static Held& held() {
    static thread_local Held held;
    return held;
  }
  int64_t used_ = 0;
};

}  // namespace shiftconv::channelwise
