// The innermost part of the depthwise planes: a tile of output rows, one vector wide, held in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace shiftconv {

// How a tap is multiplied: one number by one number.
template <class W>
struct SingleTaps {
  using Sum = W;
  using Cell = W;  // what the scratch holds for a pixel, and a program for a tap
  static constexpr int64_t taps = 1;

  // Unlike a sum with zero, this difference is one broadcast: it is exact for zeros of either sign.
  static Vector<W> splat(const Cell* weight) { return *weight - Vector<W>{}; }
  static Vector<W> multiply_add(Vector<W> weight, Vector<W> x, Vector<W> sum) { return fma<W>(weight, x, sum); }
};

#if defined(SHIFTCONV_AVX512) && defined(__AVX512BF16__)
#define SHIFTCONV_TAP_PAIRS 1
// Two numbers of bfloat16 by two, which lie side by side in a row: a cell holds its pixel and the next one.
struct PairTaps {
  using Sum = float;
  using Cell = uint32_t;
  static constexpr int64_t taps = 2;

  static Vector<float> splat(const Cell* weight) {
    return (Vector<float>)_mm512_set1_epi32(static_cast<int32_t>(*weight));
  }
  static Vector<float> multiply_add(Vector<float> weight, Vector<float> x, Vector<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
  }
};
#endif

// Taps of one kernel column that follow each other, and the input row and pixel that the first of them takes to the
// first pixel of an image.
struct TapBlock {
  int64_t offset;  // cells from the pixel
  int64_t weight;  // cells from the start of the program's weights
  int32_t row, count;
};

constexpr int most_taps = 7;  // of a block

#if defined(SHIFTCONV_AVX512) || defined(__aarch64__)
constexpr int most_rows = 16;  // of a tile, beside the weights of a block, in 32 registers
#else
constexpr int most_rows = 8;
#endif

// What a tile reads: a source image in the scratch, and the blocks of taps that reach it.
template <class Cell>
struct TileInput {
  const Cell* pixel;  // where the tile's first output pixel is in the source
  int64_t stride;     // cells from row to row
  int64_t row, rows;  // of that pixel, and of the image
  const TapBlock *begin, *end;
  const Cell* weights;
};

template <class T>
struct TileOutput {
  T* data;
  int64_t stride, rows, columns;  // at most those of a tile are written
  Wide<T> bias;
};

// One block of taps: every input row is loaded once and taken to all output rows of the tile that it reaches.
template <class A, int height, int taps>
[[gnu::always_inline]] inline void add_block(Vector<typename A::Sum> (&sum)[height], const typename A::Cell* from,
                                             int64_t stride, const typename A::Cell* weights, uint32_t inside) {
  using V = Vector<typename A::Sum>;
  V weight[taps];
  unrolled<taps>([&](auto u) __attribute__((always_inline)) { weight[u] = A::splat(weights + u); });
  unrolled<height + taps - 1>([&](auto row) __attribute__((always_inline)) {
    if (inside >> row & 1) [[likely]] {
      V x;
      std::memcpy(&x, from + row * stride, sizeof(x));
      unrolled<taps>([&](auto u) __attribute__((always_inline)) {
        constexpr int r = row - u;
        if constexpr (0 <= r && r < height) sum[r] = A::multiply_add(weight[u], x, sum[r]);
      });
    }
  });
}

// Bits of those of `count` rows from `row` on that are rows of an image.
inline uint32_t rows_inside(int64_t row, int64_t count, int64_t rows) {
  const int64_t begin = std::min<int64_t>(row < 0 ? -row : 0, 31), end = std::min(count, rows - row);
  return begin < end ? (uint32_t{1} << end) - (uint32_t{1} << begin) : 0;
}

template <class T>
[[gnu::always_inline]] inline void store_lanes(T* to, Vector<Wide<T>> v, int64_t count) {
#if defined(SHIFTCONV_AVX512)
  if (count < lanes<Wide<T>>) {
    const uint32_t bits = (1u << count) - 1;
    if constexpr (sizeof(T) == 2) {
      __m256i whole;
      store<T>(reinterpret_cast<T*>(&whole), v);
      _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(bits), whole);
    } else if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(bits), v);
    } else {
      _mm512_mask_storeu_pd(to, static_cast<__mmask8>(bits), v);
    }
    return;
  }
#endif
  store<T>(to, v, count);
}

template <class T, class A, int height>
[[gnu::noinline]] void run_tile(const TileInput<typename A::Cell>* inputs, int64_t count, const TileOutput<T>& out) {
  static_assert(height + most_taps - 1 < 32);
  Vector<Wide<T>> sum[height];
  unrolled<height>([&](auto r) __attribute__((always_inline)) { sum[r] = splat<Wide<T>>(out.bias); });
  for (const auto* input = inputs; input != inputs + count; ++input)
    for (const TapBlock* block = input->begin; block != input->end; ++block) {
      const uint32_t inside = rows_inside(input->row + block->row, height + block->count - 1, input->rows);
      if (inside == 0) continue;
      const auto* const from = input->pixel + block->offset;
      const auto* const weights = input->weights + block->weight;
      switch (block->count) {
        case 1:
          add_block<A, height, 1>(sum, from, input->stride, weights, inside);
          break;
        case 2:
          add_block<A, height, 2>(sum, from, input->stride, weights, inside);
          break;
        case 3:
          add_block<A, height, 3>(sum, from, input->stride, weights, inside);
          break;
        case 4:
          add_block<A, height, 4>(sum, from, input->stride, weights, inside);
          break;
        case 5:
          add_block<A, height, 5>(sum, from, input->stride, weights, inside);
          break;
        case 6:
          add_block<A, height, 6>(sum, from, input->stride, weights, inside);
          break;
        default:
          add_block<A, height, 7>(sum, from, input->stride, weights, inside);
      }
    }
  unrolled<height>([&](auto r) __attribute__((always_inline)) {
    if (r < out.rows) store_lanes<T>(out.data + r * out.stride, sum[r], out.columns);
  });
}

// The same with the fewest rows that hold those of the output.
template <class T, class A>
void run_rows(const TileInput<typename A::Cell>* inputs, int64_t count, const TileOutput<T>& out) {
  if (out.rows <= 4) return run_tile<T, A, 4>(inputs, count, out);
  if (out.rows <= 7) return run_tile<T, A, 7>(inputs, count, out);
  if constexpr (most_rows == 8) return run_tile<T, A, 8>(inputs, count, out);
  if constexpr (most_rows > 8) {
    if (out.rows <= 10) return run_tile<T, A, 10>(inputs, count, out);
    if (out.rows <= 12) return run_tile<T, A, 12>(inputs, count, out);
    if (out.rows <= 14) return run_tile<T, A, 14>(inputs, count, out);
    run_tile<T, A, 16>(inputs, count, out);
  }
}

}  // namespace shiftconv
