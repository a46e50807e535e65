// Products of one row of a map with one row of a kernel, whose lanes are channels.
//
// A tile of P columns of x and one of P columns of y (or of its gradient) meet in a Toeplitz matrix: column j of y
// takes column p of x by tap p - j. Both tiles stay in registers, a tap is loaded once for up to P products, and no
// product falls on padding. The mask says which of the 2 P - 1 taps exist.
#pragma once

#include "depthwise_lanes_vector.h"

#if defined(SHIFTCONV_AVX512) && defined(__AVX512BF16__)
#define SHIFTCONV_CHANNELS_PAIRS
#endif

namespace shiftconv::channelwise {

// One number per lane.
template <class W>
struct Single {
  using Value = W;
  using V = Vector<W>;
  static constexpr bool paired = false;
  static constexpr int64_t products = 1;
  static constexpr int x_slots(int tile) { return tile; }      // vectors that hold a tile of x
  static constexpr int grad_slots(int tile) { return tile; }   // of the gradient
  static constexpr int taps(int tile) { return 2 * tile - 1; }  // that forward may need, from 1 - tile on

  static V product(V a, V b, V sum) { return fma<W>(a, b, sum); }
};

#if defined(SHIFTCONV_CHANNELS_PAIRS)
// Two numbers of bfloat16 per lane: columns 2 q and 2 q + 1 of x, columns j - 1 and j of the gradient, taps t and
// t + 1. A tap that is missing beside one that exists is zero: next to an infinite pixel that makes a NaN.
struct Paired {
  using Value = float;
  using V = Vector<float>;
  static constexpr bool paired = true;
  static constexpr int64_t products = 2;
  static constexpr int x_slots(int tile) { return (tile + 1) / 2; }
  static constexpr int grad_slots(int tile) { return tile + 1; }
  static constexpr int taps(int tile) { return tile + 2 * x_slots(tile) - 2; }

  static V product(V a, V b, V sum) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  static V pair(V low, V high) {
    using Bits = typename Lanes<float>::Unsigned;
    return (V)(((Bits)low >> 16) | ((Bits)high & 0xffff0000));
  }
};
template <class T>
using Kind = std::conditional_t<std::is_same_v<T, c10::BFloat16>, Paired, Single<Wide<T>>>;
#else
template <class T>
using Kind = Single<Wide<T>>;
#endif

// Runs body(k) for the taps k that the mask has; a clear mask of several taps costs one branch.
template <int taps, uint32_t possible = ~0u, class Body>
[[gnu::always_inline]] inline void each_tap(uint32_t mask, const Body& body) {
  constexpr int group = 4;
  unrolled<(taps + group - 1) / group>([&](auto g) __attribute__((always_inline)) {
    constexpr uint32_t members = (((1u << group) - 1) << (g * group)) & possible;
    if constexpr (members != 0) {
      if (!(mask & members)) return;
      unrolled<group>([&](auto i) __attribute__((always_inline)) {
        constexpr int k = g * group + i;
        if constexpr (k < taps && (members >> k & 1))
          if (mask & (1u << k)) body(std::integral_constant<int, k>{});
      });
    }
  });
}

// The same address, of which the compiler does not know that: it loads from there anew instead of spilling registers.
template <class V>
[[gnu::always_inline]] inline const V* in_memory(const V* at) {
  __asm__("" : "+r"(at));
  return at;
}

// The taps next to either end connect so few columns that these are not worth keeping in registers.
constexpr int corner(int tile) { return tile >= 10 ? 4 : tile == 8 || (tile == 7 && vector_bytes < 64) ? 3 : 0; }

template <int taps, int tile>
constexpr uint32_t corners = ((1u << corner(tile)) - 1) | ((1u << corner(tile)) - 1) << (taps - corner(tile));

// sum[j] += tap[k] * x[p] with p - j = k - (tile - 1)
template <class K, int tile>
[[gnu::always_inline]] inline void add_row(typename K::V* sum, const typename K::V* x, const typename K::V* tap,
                                           uint32_t mask) {
  using V = typename K::V;
  constexpr int slots = K::x_slots(tile), taps = K::taps(tile);
  const auto add = [&](auto k, const V* column) __attribute__((always_inline)) {
    const V weight = tap[k];
    unrolled<slots>([&](auto q) __attribute__((always_inline)) {
      constexpr int j = (K::paired ? 2 * q : q) - (k - (tile - 1));
      if constexpr (0 <= j && j < tile) sum[j] = K::product(weight, column[q], sum[j]);
    });
  };
  if (!(mask & ~corners<taps, tile>))
    return each_tap<taps, corners<taps, tile>>(
        mask, [&](auto k) __attribute__((always_inline)) { add(k, in_memory(x)); });
  V column[slots];
  unrolled<slots>([&](auto q) __attribute__((always_inline)) { column[q] = x[q]; });
  each_tap<taps>(mask, [&](auto k) __attribute__((always_inline)) { add(k, column); });
}

// sum[k] += grad[j] * x[p] with p - j = k - (tile - 1)
template <class K, int tile>
[[gnu::always_inline]] inline void add_taps(typename K::V* sum, const typename K::V* x, const typename K::V* grad,
                                            uint32_t mask) {
  using V = typename K::V;
  constexpr int slots = K::x_slots(tile), grad_slots = K::grad_slots(tile), taps = 2 * tile - 1;
  const auto add = [&](auto k, const V* column, const V* from) __attribute__((always_inline)) {
    V part[2] = {};  // two chains of sums: they wait for each other
    unrolled<slots>([&](auto q) __attribute__((always_inline)) {
      constexpr int j = K::paired ? 2 * q - k + tile : q - k + tile - 1;  // paired: slot of columns j - 1 and j
      if constexpr (0 <= j && j < grad_slots) part[q % 2] = K::product(from[j], column[q], part[q % 2]);
    });
    sum[k] += part[0] + part[1];
  };
  if (!(mask & ~corners<taps, tile>))
    return each_tap<taps, corners<taps, tile>>(
        mask, [&](auto k) __attribute__((always_inline)) { add(k, in_memory(x), in_memory(grad)); });
  V column[slots], from[grad_slots];
  unrolled<grad_slots>([&](auto j) __attribute__((always_inline)) { from[j] = grad[j]; });
  unrolled<slots>([&](auto q) __attribute__((always_inline)) { column[q] = x[q]; });
  each_tap<taps>(mask, [&](auto k) __attribute__((always_inline)) { add(k, column, from); });
}

enum class Side { x, grad };

// Lays out rows of w pixels as rows of whole tiles; steps from row to row and from pixel to pixel.
template <class K, Side side>
void arrange(const typename K::V* from, int64_t rows, int64_t row_step, int64_t w, int64_t step, int64_t tile,
             typename K::V* to) {
  using V = typename K::V;
  for (int64_t r = 0; r < rows; ++r, from += row_step) {
    for (int64_t first = 0; first < w; first += tile) {
      const int64_t count = std::min(tile, w - first);
      const V* at = from + first * step;
      const auto pixel = [&](int64_t p) { return 0 <= p && p < count ? at[p * step] : V{}; };
      if constexpr (!K::paired) {
        for (int64_t p = 0; p < tile; ++p) *to++ = pixel(p);
      } else if constexpr (side == Side::x) {
        for (int64_t p = 0; p < tile; p += 2) *to++ = K::pair(pixel(p), pixel(p + 1));
      } else {
        for (int64_t p = 0; p <= tile; ++p) *to++ = K::pair(pixel(p - 1), pixel(p));
      }
    }
  }
}

// Tiles of x and of y fit into the registers together; the largest only if x comes in pairs.
#if defined(SHIFTCONV_AVX512)
using Tiles = std::integer_sequence<int, 4, 7, 8, 10, 12, 14, 16>;
constexpr int64_t largest_single = 14;
#else
using Tiles = std::integer_sequence<int, 4, 7>;
constexpr int64_t largest_single = 7;
#endif

// The tile that wastes least on rows of w and ow columns, for `products` of a vector's lane.
inline int64_t best_tile(int64_t w, int64_t ow, int64_t products) {
  int64_t best = 0, least = 0;
  const auto consider = [&](int64_t tile) {
    const int64_t pairs = ((w + tile - 1) / tile) * ((ow + tile - 1) / tile);
    const int64_t cost = pairs * (tile * tile / products + 2 * tile + 10);
    if (best == 0 || (cost < least && (products > 1 || tile <= largest_single))) best = tile, least = cost;
  };
  [&]<int... tile>(std::integer_sequence<int, tile...>) { (consider(tile), ...); }(Tiles{});
  return best;
}

// Runs body with the tile as a constant.
template <class K, class Body>
void with_tile(int64_t tile, const Body& body) {
  const auto consider = [&](auto known) {
    if constexpr (K::paired || known <= largest_single)
      if (tile == known) body(known);
  };
  [&]<int... known>(std::integer_sequence<int, known...>) {
    (consider(std::integral_constant<int, known>{}), ...);
  }(Tiles{});
}

}  // namespace shiftconv::channelwise
