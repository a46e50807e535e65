// A rectangle of taps of the weight gradient of a depthwise convolution, summed in registers.
//
// One lane is one column. A row of x meets, for the taps of one column of the rectangle, as many rows of the gradient
// as the rectangle is high, so that a vector that was loaded serves as many products as the rectangle has rows or
// columns. The lanes of a tap are added up only when all images are through.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace shiftconv::tapwise {

#if defined(SHIFTCONV_AVX512) && defined(__AVX512BF16__)
#define SHIFTCONV_PAIRS
#endif

// The same pixel of two images in bfloat16: a lane whose product sums over both.
struct Pair {
  c10::BFloat16 first, second;
};

// What lies in the planes that are computed with, for maps of type T.
#if defined(SHIFTCONV_PAIRS)
template <class T>
using Cell = std::conditional_t<std::is_same_v<T, c10::BFloat16>, Pair, Wide<T>>;
#else
template <class T>
using Cell = Wide<T>;
#endif

template <class C>
constexpr int64_t images_of = std::is_same_v<C, Pair> ? 2 : 1;  // that share a cell

template <class C>
struct Dot {
  using Sum = C;
  using Operand = Vector<C>;
  static Operand load(const C* from) {
    Operand v = shiftconv::load<C>(from);
#if defined(__AVX2__)
    __asm__("" : "+v"(v));  // else the compiler loads it anew for every product, by operands in memory
#endif
    return v;
  }
  static Vector<C> add(Operand a, Operand b, Vector<C> sum) { return fma<C>(a, b, sum); }
};

#if defined(SHIFTCONV_PAIRS)
template <>
struct Dot<Pair> {
  using Sum = float;
  using Operand = __m512i;
  static Operand load(const Pair* from) { return _mm512_loadu_si512(from); }
  static Vector<float> add(Operand a, Operand b, Vector<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class C>
using SumOf = typename Dot<C>::Sum;
template <class C>
constexpr int64_t width_of = lanes<SumOf<C>>;

#if defined(SHIFTCONV_AVX512)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif
constexpr int most_taps = 8;  // of a rectangle, along one axis

// Whether the sums, the vectors of the shorter side and one of the other side fit the registers.
constexpr bool tile_fits(int rows, int columns) {
  return rows <= most_taps && columns <= most_taps && rows * columns + std::min(rows, columns) < vector_registers;
}

// Which products a rectangle of taps sums: cells of x and of the gradient that meet at its first tap.
template <class C>
struct TileRun {
  const C *x, *grad;
  int64_t x_row, grad_row;      // steps in cells
  int64_t x_image, grad_image;  // steps in cells
  int64_t images, rows, vectors;
  SumOf<C>* sums;      // [rows of taps, columns of taps, lanes]
  const char* ahead;   // what is read after this, to be fetched meanwhile: with each row a cache line and another
  int64_t ahead_step, ahead_other;  // bytes: to the line of the next row, from one to the other
};

inline void fetch(const char* from) { __builtin_prefetch(from, 0, 2); }

template <class C, int rows, int columns>
void add_tile(const TileRun<C>& run) {
  using D = Dot<C>;
  using V = Vector<SumOf<C>>;
  V sum[rows][columns];
#pragma GCC unroll 8
  for (int u = 0; u < rows; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < columns; ++v) sum[u][v] = load<SumOf<C>>(run.sums + (u * columns + v) * width_of<C>);
  const auto step = [&](const C* x, const C* grad) __attribute__((always_inline)) {
    if constexpr (rows <= columns) {
      typename D::Operand g[rows];
#pragma GCC unroll 8
      for (int u = 0; u < rows; ++u) g[u] = D::load(grad - u * run.grad_row);
#pragma GCC unroll 8
      for (int v = 0; v < columns; ++v) {
        const auto a = D::load(x + v);
#pragma GCC unroll 8
        for (int u = 0; u < rows; ++u) sum[u][v] = D::add(a, g[u], sum[u][v]);
      }
    } else {
      typename D::Operand a[columns];
#pragma GCC unroll 8
      for (int v = 0; v < columns; ++v) a[v] = D::load(x + v);
#pragma GCC unroll 8
      for (int u = 0; u < rows; ++u) {
        const auto g = D::load(grad - u * run.grad_row);
#pragma GCC unroll 8
        for (int v = 0; v < columns; ++v) sum[u][v] = D::add(a[v], g, sum[u][v]);
      }
    }
  };
  const char* ahead = run.ahead;
  for (int64_t n = 0; n < run.images; ++n)
    for (int64_t j = 0; j < run.vectors; ++j) {
      const C* x = run.x + n * run.x_image + j * width_of<C>;
      const C* grad = run.grad + n * run.grad_image + j * width_of<C>;
      for (int64_t r = 0; r < run.rows; ++r, x += run.x_row, grad += run.grad_row, ahead += run.ahead_step) {
        fetch(ahead);
        fetch(ahead + run.ahead_other);
        step(x, grad);
      }
    }
#pragma GCC unroll 8
  for (int u = 0; u < rows; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < columns; ++v) store<SumOf<C>>(run.sums + (u * columns + v) * width_of<C>, sum[u][v]);
}

template <class C>
using AddTile = void (*)(const TileRun<C>&);

// add_tile for every rectangle that fits, at [rows - 1][columns - 1].
template <class C>
constexpr auto tile_table() {
  std::array<std::array<AddTile<C>, most_taps>, most_taps> table{};
  const auto fill = [&]<int... i>(std::integer_sequence<int, i...>) {
    const auto put = [&]<int rows, int columns>() {
      if constexpr (tile_fits(rows, columns)) table[rows - 1][columns - 1] = &add_tile<C, rows, columns>;
    };
    (put.template operator()<i / most_taps + 1, i % most_taps + 1>(), ...);
  };
  fill(std::make_integer_sequence<int, most_taps * most_taps>{});
  return table;
}

// How a range of taps along both axes is cut into rectangles of nearly equal sizes.
struct TileSizes {
  int rows, columns;  // at most

  // Products and loads both go two to a cycle; a load that crosses a cache line counts twice.
  static double cost(int rows, int columns) {
    return std::max({0.5 * rows * columns, 0.5 * (rows + 2 * columns), 4.0}) + 1;
  }

  static TileSizes cheapest(int64_t rows, int64_t columns) {
    TileSizes best{1, 1};
    double least = 0;
    for (int u = 1; u <= most_taps; ++u)
      for (int v = 1; v <= most_taps; ++v) {
        if (!tile_fits(u, v)) continue;
        double sum = 0;
        for (const auto [height, tall] : sizes(rows, u))
          for (const auto [width, wide] : sizes(columns, v)) sum += tall * wide * cost(height, width);
        if (least == 0 || sum < least) least = sum, best = {u, v};
      }
    return best;
  }

  // The two sizes of the parts that for_parts makes, and how many there are of each.
  static std::array<std::pair<int, double>, 2> sizes(int64_t taps, int most) {
    const int64_t parts = (taps + most - 1) / most, size = taps / parts, larger = taps % parts;
    return {{{static_cast<int>(size), static_cast<double>(parts - larger)},
             {static_cast<int>(size + 1), static_cast<double>(larger)}}};
  }

  // Calls body(begin, size) for the fewest parts of at most `most` taps.
  template <class Body>
  static void for_parts(int64_t taps, int most, const Body& body) {
    const int64_t parts = (taps + most - 1) / most;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = taps * i / parts;
      body(begin, static_cast<int>(taps * (i + 1) / parts - begin));
    }
  }
};

}  // namespace shiftconv::tapwise
