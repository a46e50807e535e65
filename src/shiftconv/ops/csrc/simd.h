// Vectors as wide as the processor's, in float32 or float64, loaded from and stored to any floating dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define SHIFTCONV_AVX512
#elif defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined, so how vectors are passed does not matter

namespace shiftconv {

// What numbers of type T are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(SHIFTCONV_AVX512)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <class W>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = float __attribute__((vector_size(vector_bytes)));
  using Index = int32_t __attribute__((vector_size(vector_bytes)));
  using Unsigned = uint32_t __attribute__((vector_size(vector_bytes)));
  static constexpr int64_t count = vector_bytes / 4;
};

template <>
struct Lanes<double> {
  using Vector = double __attribute__((vector_size(vector_bytes)));
  using Index = int64_t __attribute__((vector_size(vector_bytes)));
  using Unsigned = uint64_t __attribute__((vector_size(vector_bytes)));
  static constexpr int64_t count = vector_bytes / 8;
};

template <class W>
using Vector = typename Lanes<W>::Vector;
template <class W>
using Index = typename Lanes<W>::Index;
template <class W>
constexpr int64_t lanes = Lanes<W>::count;

template <class W>
inline Vector<W> splat(W value) {
  return Vector<W>{} + value;
}

// 0, 1, 2 ...
template <class W>
inline Index<W> iota() {
  Index<W> index;
  for (int64_t i = 0; i < lanes<W>; ++i) index[i] = i;
  return index;
}

#if defined(SHIFTCONV_AVX512)
template <class W>
using Mask = std::conditional_t<std::is_same_v<W, float>, __mmask16, __mmask8>;

template <class W>
inline Mask<W> mask_of(uint16_t bits) {
  return static_cast<Mask<W>>(bits);
}

template <class W>
inline Mask<W> mask_nonzero(Vector<W> v) {
  if constexpr (std::is_same_v<W, float>)
    return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  else
    return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ);
}

// Zero where the mask is not set, whatever stands there.
template <class W>
inline Vector<W> keep(Mask<W> mask, Vector<W> v) {
  if constexpr (std::is_same_v<W, float>)
    return _mm512_maskz_mov_ps(mask, v);
  else
    return _mm512_maskz_mov_pd(mask, v);
}

template <class W>
inline Vector<W> fma(Vector<W> a, Vector<W> b, Vector<W> sum) {
  if constexpr (std::is_same_v<W, float>)
    return _mm512_fmadd_ps(a, b, sum);
  else
    return _mm512_fmadd_pd(a, b, sum);
}

// sum where the mask is not set
template <class W>
inline Vector<W> fma(Mask<W> mask, Vector<W> a, Vector<W> b, Vector<W> sum) {
  if constexpr (std::is_same_v<W, float>)
    return _mm512_mask3_fmadd_ps(a, b, sum, mask);
  else
    return _mm512_mask3_fmadd_pd(a, b, sum, mask);
}

// All lanes of low but the first, then the first of high.
template <class W>
inline Vector<W> next_lanes(Vector<W> low, Vector<W> high) {
  if constexpr (std::is_same_v<W, float>)
    return (Vector<W>)_mm512_alignr_epi32((__m512i)high, (__m512i)low, 1);
  else
    return (Vector<W>)_mm512_alignr_epi64((__m512i)high, (__m512i)low, 1);
}
#else
template <class W>
using Mask = Index<W>;

template <class W>
inline Mask<W> mask_of(uint16_t bits) {
  using Unsigned = typename Lanes<W>::Unsigned;
  const Unsigned lane = (Unsigned{} + 1) << (Unsigned)iota<W>();
  return ((Unsigned{} + bits) & lane) != 0;
}

template <class W>
inline Mask<W> mask_nonzero(Vector<W> v) {
  return v != 0;
}

template <class W>
inline Vector<W> keep(Mask<W> mask, Vector<W> v) {
  return (Vector<W>)(mask & (Mask<W>)v);
}

template <class W>
inline Vector<W> fma(Vector<W> a, Vector<W> b, Vector<W> sum) {
  return a * b + sum;
}

template <class W>
inline Vector<W> fma(Mask<W> mask, Vector<W> a, Vector<W> b, Vector<W> sum) {
  return sum + keep<W>(mask, a * b);
}

template <class W>
inline Vector<W> next_lanes(Vector<W> low, Vector<W> high) {
  W both[2 * lanes<W>];
  std::memcpy(both, &low, sizeof(low));
  std::memcpy(both + lanes<W>, &high, sizeof(high));
  std::memcpy(&low, both + 1, sizeof(low));
  return low;
}
#endif

// float32 from the bits of bfloat16 and back, nearest even. The sums that are stored come from bfloat16 numbers and
// finite weights, so a NaN among them has no bits that rounding could carry into its sign.
template <class Bits>
inline Bits round_bits(Bits bits) {
  return bits + ((bits >> 16 & 1) + 0x7fff);
}

template <class T>
inline Vector<Wide<T>> load(const T* from) {
  using V = Vector<Wide<T>>;
  V v{};
  if constexpr (std::is_same_v<T, Wide<T>>) {
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
#if defined(SHIFTCONV_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  else if constexpr (std::is_same_v<T, c10::Half>)
    return _mm512_cvtph_ps(bits);
#elif defined(__F16C__) && defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  else if constexpr (std::is_same_v<T, c10::Half>)
    return _mm256_cvtph_ps(bits);
#else
  for (int64_t i = 0; i < lanes<Wide<T>>; ++i) v[i] = static_cast<float>(from[i]);
#endif
  return v;
}

template <class T>
inline void store(T* to, Vector<Wide<T>> v) {
  using Unsigned [[maybe_unused]] = typename Lanes<Wide<T>>::Unsigned;
  if constexpr (std::is_same_v<T, Wide<T>>) {
    std::memcpy(to, &v, sizeof(v));
    return;
  }
#if defined(SHIFTCONV_AVX512)
  __m256i bits{};
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    bits = _mm512_cvtepi32_epi16((__m512i)(round_bits((Unsigned)v) >> 16));
  else if constexpr (std::is_same_v<T, c10::Half>)
    bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  if constexpr (sizeof(T) == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
#elif defined(__F16C__) && defined(__AVX2__)
  __m128i bits{};
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m256i high = (__m256i)(round_bits((Unsigned)v) >> 16);
    bits = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  if constexpr (sizeof(T) == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
#else
  if constexpr (sizeof(T) == 2)
    for (int64_t i = 0; i < lanes<float>; ++i) to[i] = static_cast<T>(v[i]);
#endif
}

// The first `count` lanes, at most all.
template <class T>
inline void store(T* to, Vector<Wide<T>> v, int64_t count) {
  if (count >= lanes<Wide<T>>) return store<T>(to, v);
  T all[lanes<Wide<T>>];
  store<T>(all, v);
  std::memcpy(static_cast<void*>(to), all, count * sizeof(T));
}

// Calls body with the numbers 0 to count - 1 as types. A loop would be unrolled too late to keep arrays in registers.
template <int count, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, count>{});
}

// Lane l of a or, from their number on, of b.
template <class W, int... l>
[[gnu::always_inline]] inline Vector<W> shuffle(Vector<W> a, Vector<W> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, l...);
#else
  return __builtin_shuffle(a, b, Index<W>{l...});
#endif
}

// Exchanges the blocks of `step` lanes that lie off the diagonal of two vectors `step` rows apart.
template <class W, int step>
[[gnu::always_inline]] inline void exchange(Vector<W>& a, Vector<W>& b) {
  constexpr int count = lanes<W>;
  [&]<int... l>(std::integer_sequence<int, l...>) __attribute__((always_inline)) {
    const Vector<W> low = shuffle<W, ((l & step) ? count + l - step : l)...>(a, b);
    b = shuffle<W, ((l & step) ? count + l : l + step)...>(a, b);
    a = low;
  }(std::make_integer_sequence<int, count>{});
}

// Rows and columns of a square of lanes change places.
template <class W>
[[gnu::always_inline]] inline void transpose(Vector<W> (&v)[lanes<W>]) {
  constexpr int count = lanes<W>;
  const auto stage = [&](auto step) __attribute__((always_inline)) {
    if constexpr (step < count)
      unrolled<count>([&](auto i) __attribute__((always_inline)) {
        if constexpr ((i & step) == 0) exchange<W, step>(v[i], v[i + step]);
      });
  };
  stage(std::integral_constant<int, 1>{});
  stage(std::integral_constant<int, 2>{});
  stage(std::integral_constant<int, 4>{});
  stage(std::integral_constant<int, 8>{});
}

// Adjacent numbers as one or two vectors. 32 numbers of bfloat16 become two vectors of float32 by one operation each,
// if those with even and with odd indices go separate ways.
#if defined(SHIFTCONV_AVX512)
template <class T>
constexpr int phases = std::is_same_v<T, c10::BFloat16> ? 2 : 1;
#else
template <class T>
constexpr int phases = 1;
#endif

template <class T>
using Pack = std::array<Vector<Wide<T>>, phases<T>>;
template <class T>
constexpr int64_t pack_size = phases<T>* lanes<Wide<T>>;

// Bits of numbers that are kept.
template <class T>
using BitPack = std::array<Index<Wide<T>>, phases<T>>;

template <class W>
inline Vector<W> keep_bits(Index<W> bits, Vector<W> v) {
  return (Vector<W>)(bits & (Index<W>)v);
}

// Calls body with the index of each vector of a pack. A loop would be unrolled too late to keep packs in registers.
template <class T, class Body>
[[gnu::always_inline]] inline void each_phase(const Body& body) {
  body(std::integral_constant<int, 0>{});
  if constexpr (phases<T> == 2) body(std::integral_constant<int, 1>{});
}

template <class T>
inline Pack<T> load_pack(const T* from) {
  if constexpr (phases<T> == 1) {
    return {load<T>(from)};
  } else {
    using Bits = typename Lanes<float>::Unsigned;
    using V = Vector<float>;
    Bits bits;
    std::memcpy(&bits, from, sizeof(bits));
    __asm__("" : "+v"(bits));  // else the compiler loads twice, by operands in memory
    return {(V)(bits << 16), (V)(bits & 0xffff0000)};
  }
}

// One vector of a pack.
template <class T, int phase>
inline Vector<Wide<T>> load_phase(const T* from) {
  return load_pack<T>(from)[phase];
}

// Numbers to compute with, which are to meet those of a pack.
template <class T>
inline Pack<T> load_beside(const Wide<T>* from) {
  using W = Wide<T>;
  Pack<T> pack;
  if constexpr (phases<T> == 1) {
    pack = {load<W>(from)};
  } else {
    W split[phases<T>][lanes<W>];
    for (int64_t i = 0; i < pack_size<T>; ++i) split[i % phases<T>][i / phases<T>] = from[i];
    for (int f = 0; f < phases<T>; ++f) pack[f] = load<W>(split[f]);
  }
  return pack;
}

template <class T>
inline void store_pack(T* to, const Pack<T>& pack) {
  if constexpr (phases<T> == 1) {
    store<T>(to, pack[0]);
  } else {
    using Bits = typename Lanes<float>::Unsigned;
#if defined(__AVX512BF16__)
    // All even ones, then all odd ones; what is below the smallest normal number becomes zero.
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(pack[1], pack[0]);
    const Bits lane = (Bits)(iota<float>() | (iota<float>() + 16) << 16);
    const Bits both = (Bits)_mm512_permutexvar_epi16((__m512i)lane, halves);
#else
    const Bits even = round_bits((Bits)pack[0]) >> 16, odd = round_bits((Bits)pack[1]);
    const Bits both = even | (odd & 0xffff0000);
#endif
    std::memcpy(to, &both, sizeof(both));
  }
}

// The numbers that follow those of low, of which the last is the first of high.
template <class T>
inline Pack<T> next_pack(const Pack<T>& low, const Pack<T>& high) {
  const Vector<Wide<T>> after = next_lanes<Wide<T>>(low[0], high[0]);
  if constexpr (phases<T> == 1)
    return {after};
  else
    return {low[1], after};
}

template <class W>
inline double sum_lanes(Vector<W> v) {
#if defined(SHIFTCONV_AVX512)
  if constexpr (std::is_same_v<W, float>)
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
  else
    return _mm512_reduce_add_pd(v);
#else
  double sum = 0;
  for (int64_t i = 0; i < lanes<W>; ++i) sum += v[i];
  return sum;
#endif
}

}  // namespace shiftconv
