// Sixteen lanes of 32 bits: loads, products, transposes and stores, for float32 and for bfloat16 in pairs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define SHIFTCONV_LINEAR_VECTORS 1

namespace shiftconv {

using BFloat16 = c10::BFloat16;

constexpr int64_t lanes = 16;         // of a vector
constexpr int64_t strips = 3;         // vectors side by side in a tile
constexpr int64_t tile = strips * lanes;

inline __mmask16 first_lanes(int64_t count) {
  return count >= lanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Elements as lanes of 32 bits, zero where the mask is not set, which is not read either.
inline __m512i load_lanes(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_epi32(mask, from); }
inline __m512i load_lanes(__mmask16 mask, const BFloat16* from) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

// The same where all sixteen may be read: a masked load that misses the cache holds up those behind it (AMD Zen 5).
// The loads are hidden from the compiler, which would fuse them with what follows into masked ones.
inline __m512i load_all(const void* from) {
  __m512i bits = _mm512_loadu_si512(from);
  __asm__("" : "+v"(bits));
  return bits;
}
inline __m512i load_whole(__mmask16 mask, const float* from) { return _mm512_maskz_mov_epi32(mask, load_all(from)); }
inline __m512i load_whole(__mmask16 mask, const BFloat16* from) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  __asm__("" : "+v"(bits));
  return _mm512_maskz_cvtepu16_epi32(mask, bits);
}

inline __m512 load_floats(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load_floats(__mmask16 mask, const BFloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(load_lanes(mask, from), 16));
}

inline void store_floats(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store_floats(BFloat16* to, __mmask16 mask, __m512 value) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_set1_epi32(rounded, nan, 0x7fc00000);
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

// The compiler takes a function that only prefetches for one without effect, and drops the call; hence by hand.
inline void prefetch(const void* at) { __asm__ volatile("prefetcht0 (%0)" : : "r"(at)); }
inline void prefetch_write(const void* at) { __asm__ volatile("prefetchw (%0)" : : "r"(at)); }

// The second operand is what comes of a NaN and a number.
inline __m512 relu(__m512 value) { return _mm512_max_ps(_mm512_setzero_ps(), value); }

// A lane holds one float32, or two neighbours in the sum of bfloat16.
template <class T>
constexpr int64_t depth = 4 / sizeof(T);

template <class T>
struct Dot;

template <>
struct Dot<float> {
  static __m512i broadcast(const float* a) { return _mm512_castps_si512(_mm512_set1_ps(*a)); }
  static __m512i broadcast_last(const float* a) { return broadcast(a); }
  static __m512 add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

template <>
struct Dot<BFloat16> {
  static __m512i broadcast(const BFloat16* a) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_set1_epi32(pair);
  }
  static __m512i broadcast_last(const BFloat16* a) { return _mm512_set1_epi32(a->x); }  // it has no neighbour
  static __m512 add(__m512 sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    const auto low = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto upper = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, high)); };
    return _mm512_fmadd_ps(upper(a), upper(b), _mm512_fmadd_ps(low(a), low(b), sum));
#endif
  }
};

// sum[i][v] += a[i][k] * b[k][v] over `count` values of k, as many to a lane as `depth` says.
// a has rows `stride` elements apart; b rows of a whole tile, of which the first `width` vectors are used.
template <class T, int rows, int width>
inline void multiply(__m512 (&sum)[rows][width], const T* a, int64_t stride, const __m512i* b, int64_t count) {
  const auto step = [&](auto broadcast) __attribute__((always_inline)) {
    __m512i right[width];
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) right[v] = b[v];
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
      const __m512i left = broadcast(a + i * stride);
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) sum[i][v] = Dot<T>::add(sum[i][v], left, right[v]);
    }
  };
  const T* const end = a + count / depth<T> * depth<T>;
  for (; a < end; a += depth<T>, b += strips) step([](const T* p) { return Dot<T>::broadcast(p); });
  if (count % depth<T>) step([](const T* p) { return Dot<T>::broadcast_last(p); });
}

// Rows and columns of a block of sixteen by sixteen lanes change places.
inline void transpose(std::array<__m512i, lanes>& row) {
  std::array<__m512i, lanes> t;
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // now row[4 i + j] has column 4 k + j of rows 4 i .. 4 i + 3 in its quarter k
    const __m512i even_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  row = t;
}

// Memory of a thread that is kept for the next call; `slot` tells its uses apart.
template <int slot, class T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  static thread_local std::unique_ptr<char[], Free> held;
  static thread_local int64_t size = 0;
  const int64_t bytes = std::max<int64_t>(count, 1) * int64_t{sizeof(T)};
  if (bytes > size) {
    held.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
    size = bytes;
  }
  return reinterpret_cast<T*>(held.get());
}

}  // namespace shiftconv
#endif
