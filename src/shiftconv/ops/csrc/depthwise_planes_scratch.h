// Planes of a feature map between memory and the scratch of the depthwise kernels, from and to both memory formats.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "depthwise_planes_tile.h"
#include "depthwise_problem.h"

namespace shiftconv {

// The first `count` of adjacent numbers, zeros after them; `count` may be negative, and what lies beyond is not read.
template <class T>
[[gnu::always_inline]] inline Vector<Wide<T>> load_lanes(const T* from, int64_t count) {
  constexpr int64_t all = lanes<Wide<T>>;
  if (count >= all) return load<T>(from);
  if (count <= 0) return Vector<Wide<T>>{};
#if defined(SHIFTCONV_AVX512)
  const uint32_t bits = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), from);
    return load<T>(reinterpret_cast<const T*>(&some));
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), from);
  } else {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), from);
  }
#else
  T some[all];
  std::memset(static_cast<void*>(some), 0, sizeof(some));
  std::memcpy(static_cast<void*>(some), from, count * sizeof(T));
  return load<T>(some);
#endif
}

// Rows of a padded plane: a vector of zeros before the first column, at least one after the last.
template <class W>
struct PaddedPlane {
  static constexpr int64_t margin = lanes<W>;
  int64_t stride, rows;

  PaddedPlane(int64_t width, int64_t rows)
      : stride((width + 3 * margin - 1) / margin * margin), rows(rows) {}
  // An odd number of vectors, so that planes do not share the same few sets of the cache.
  int64_t cells() const { return (rows * stride / margin | 1) * margin; }
};

// Turns numbers that fill a cell alone into what A multiplies, in one row of the scratch.
template <class A>
inline void finish_row([[maybe_unused]] typename A::Cell* row, [[maybe_unused]] int64_t width) {
#if defined(SHIFTCONV_TAP_PAIRS)
  if constexpr (A::taps == 2) {
    row[-1] = row[0] << 16;
    for (int64_t i = 0; i < width; i += lanes<float>) {
      const __m512i here = _mm512_loadu_si512(row + i), next = _mm512_loadu_si512(row + i + 1);
      _mm512_storeu_si512(row + i, _mm512_or_si512(here, _mm512_slli_epi32(next, 16)));
    }
  }
#endif
}

// A number as it stands in a cell by itself.
template <class T, class A>
[[gnu::always_inline]] inline Vector<typename A::Sum> load_cells(const T* from, int64_t count) {
#if defined(SHIFTCONV_TAP_PAIRS)
  if constexpr (A::taps == 2) {
    const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
    return (Vector<float>)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  }
#endif
  return load_lanes<T>(from, count);
}

// Rows [first, last) of one plane; `to` is the first pixel of the first of them.
template <class T, class A>
void load_plane(const Map<const T>& x, int64_t n, int64_t c, int64_t width, Range rows, typename A::Cell* to,
                int64_t stride) {
  constexpr int64_t step = lanes<typename A::Sum>;
  const T* from = x.plane(n, c) + rows.begin * x.row;
  for (int64_t i = rows.begin; i < rows.end; ++i, from += x.row, to += stride) {
    for (int64_t j = 0; j < width; j += step) {
      const auto cells = load_cells<T, A>(from + j, width - j);
      std::memcpy(to + j, &cells, sizeof(cells));
    }
    finish_row<A>(to, width);
  }
}

// The same of `channels` planes at once, at most as many as lanes, whose pixels lie side by side in memory.
template <class T, class A>
void load_planes(const Map<const T>& x, int64_t n, int64_t c, int64_t channels, int64_t width, Range rows,
                 typename A::Cell* to, const PaddedPlane<typename A::Sum>& plane) {
  constexpr int64_t step = lanes<typename A::Sum>;
  for (int64_t i = rows.begin; i < rows.end; ++i, to += plane.stride) {
    const T* const from = x.plane(n, c) + i * x.row;
    for (int64_t j = 0; j < width; j += step) {
      Vector<typename A::Sum> v[step];
      const T* const pixel = from + j * x.column;
      if (channels == step && width - j >= step)
        unrolled<step>([&](auto k) __attribute__((always_inline)) {
          v[k] = load_cells<T, A>(pixel + k * x.column, step);
        });
      else
        unrolled<step>([&](auto k) __attribute__((always_inline)) {
          v[k] = load_cells<T, A>(pixel + k * x.column, k < width - j ? channels : 0);
        });
      transpose<typename A::Sum>(v);
      const auto put = [&](auto k) __attribute__((always_inline)) {
        std::memcpy(to + k * plane.cells() + j, &v[k], sizeof(v[k]));
      };
      if (channels == step)
        unrolled<step>(put);
      else
        unrolled<step>([&](auto k) __attribute__((always_inline)) {
          if (k < channels) put(k);
        });
    }
    for (int64_t k = 0; k < channels; ++k) finish_row<A>(to + k * plane.cells(), width);
  }
}

// Rows of planes that lie `plane` elements apart in the scratch, to where their pixels lie side by side.
template <class T>
void store_planes(const Map<T>& y, int64_t n, int64_t c, int64_t channels, int64_t width, Range rows, const T* from,
                  int64_t stride, int64_t plane) {
  constexpr int64_t step = lanes<Wide<T>>;
  for (int64_t i = rows.begin; i < rows.end; ++i, from += stride) {
    T* const to = y.plane(n, c) + i * y.row;
    for (int64_t j = 0; j < width; j += step) {
      Vector<Wide<T>> v[step];
      unrolled<step>([&](auto k) __attribute__((always_inline)) {
        v[k] = k < channels ? load<T>(from + k * plane + j) : Vector<Wide<T>>{};
      });
      transpose<Wide<T>>(v);
      T* const pixel = to + j * y.column;
      if (channels == step && width - j >= step)
        unrolled<step>([&](auto k) __attribute__((always_inline)) { store<T>(pixel + k * y.column, v[k]); });
      else
        unrolled<step>([&](auto k) __attribute__((always_inline)) {
          if (k < width - j) store_lanes<T>(pixel + k * y.column, v[k], channels);
        });
    }
  }
}

}  // namespace shiftconv
