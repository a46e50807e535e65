// Channels-last maps by way of scratch: blocks of adjacent channels become planes that stay in cache, and back.
#pragma once

#include <vector>

#include "simd.h"

namespace shiftconv {

#if defined(SHIFTCONV_AVX512)
// Swaps the parts of size `half` off the diagonal of two rows of a matrix.
template <class W, int half>
inline void swap_parts(Vector<W>& a, Vector<W>& b) {
  Index<W> low, high;
  for (int64_t i = 0; i < lanes<W>; ++i) {
    low[i] = i & half ? lanes<W> + i - half : i;
    high[i] = i & half ? lanes<W> + i : i + half;
  }
  const auto pick = [&](Index<W> index) -> Vector<W> {
    if constexpr (std::is_same_v<W, float>)
      return _mm512_permutex2var_ps(a, (__m512i)index, b);
    else
      return _mm512_permutex2var_pd(a, (__m512i)index, b);
  };
  const Vector<W> first = pick(low), second = pick(high);
  a = first;
  b = second;
}

template <class W, int half>
[[gnu::always_inline]] inline void swap_all(Vector<W>* row) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<W>; ++i)
    if (!(i & half)) swap_parts<W, half>(row[i], row[i + half]);
  if constexpr (half > 1) swap_all<W, half / 2>(row);
}

template <class W>
[[gnu::noinline]] void transpose_square(Vector<W>* row) {
  swap_all<W, lanes<W> / 2>(row);
}
#else
template <class W>
void transpose_square(Vector<W>* row) {
  W all[lanes<W>][lanes<W>];
  std::memcpy(all, row, sizeof(all));
  for (int64_t i = 0; i < lanes<W>; ++i)
    for (int64_t j = 0; j < lanes<W>; ++j) row[i][j] = all[j][i];
}
#endif

// Planes of a block of channels, with room for a vector before and behind each.
template <class W>
class Planes {
 public:
  explicit Planes(int64_t volume)
      : volume_(volume), stride_((volume + 3 * lanes<W>) / lanes<W> * lanes<W>), memory_((lanes<W> + 1) * stride_) {}

  W* operator[](int64_t channel) { return memory_.data() + lanes<W> + channel * stride_; }

  // From `channels` <= lanes channels of an image; pixels are `pixel` elements apart.
  template <class T>
  [[gnu::noinline]] void gather(const T* image, int64_t pixel, int64_t channels) {
    for (int64_t p = 0; p < volume_; p += lanes<W>) {
      Vector<W> row[lanes<W>] = {};
      const int64_t count = std::min(volume_ - p, lanes<W>);
      for (int64_t i = 0; i < count; ++i) {
        const T* const from = image + (p + i) * pixel;
        if (channels == lanes<W>) {
          row[i] = load<T>(from);
        } else {
          T some[lanes<W>] = {};
          std::memcpy(static_cast<void*>(some), from, channels * sizeof(T));
          row[i] = load<T>(some);
        }
      }
      transpose_square<W>(row);
      for (int64_t c = 0; c < channels; ++c) store<W>((*this)[c] + p, row[c]);
    }
  }

  template <class T>
  [[gnu::noinline]] void scatter(T* image, int64_t pixel, int64_t channels) {
    for (int64_t p = 0; p < volume_; p += lanes<W>) {
      Vector<W> row[lanes<W>];
      for (int64_t c = 0; c < lanes<W>; ++c) row[c] = load<W>((*this)[c] + p);
      transpose_square<W>(row);
      const int64_t count = std::min(volume_ - p, lanes<W>);
      for (int64_t i = 0; i < count; ++i) store<T>(image + (p + i) * pixel, row[i], channels);
    }
  }

 private:
  int64_t volume_, stride_;
  std::vector<W> memory_;
};

}  // namespace shiftconv
