// Channels-last maps whose channels all read a window of 3x3 pixels, as offsets up to a pixel do: vectors are adjacent
// channels, rows are blended first, and each result serves three pixels.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "active_planes.h"

namespace shiftconv {

constexpr int64_t window = 3;

// One row of a map as a block of channels sees it. A row beyond the border is one zero, at any column.
template <class T>
struct PixelRow {
  const T* at;
  int64_t pixel;
};

// The weights of all channels by their place in the window, for blocks of adjacent channels.
template <class W>
class PixelMap {
 public:
  int64_t low_row = 0, low_column = 0;  // the window's first pixel, from the output's

  // For blocks of `block` channels.
  PixelMap(const ActiveMap<W>& map, int64_t block, Padding padding, bool transpose) {
    const bool folds = padding != Padding::zeros && padding != Padding::circular;
    if (!map.plain || map.ndim != 2 || map.channels < block || (transpose && folds)) return;
    const auto [rows, first_row] = span(map.h, map.channels);
    const auto [columns, first_column] = span(map.w, map.channels);
    if (rows > window || columns > window) return;
    low_row = first_row;
    low_column = first_column;
    rows_.resize(window * map.channels);
    columns_.resize(window * map.channels);
    for (int64_t i = 0; i < map.h[0].count + window - 1; ++i)
      row_sources_.push_back(fold(i + low_row, map.h[0].count, padding));
    for (int64_t i = 0; i < map.w[0].count + window - 1; ++i)
      column_sources_.push_back(fold(i + low_column, map.w[0].count, padding));
    for (int64_t c = 0; c < map.channels; ++c) {
      place(rows_, map.h, map.channels, c, low_row);
      place(columns_, map.w, map.channels, c, low_column);
    }
  }

  bool empty() const { return rows_.empty(); }
  // [3, C]
  const W* rows() const { return rows_.data(); }
  const W* columns() const { return columns_.data(); }
  // The pixel that stands in the row or column `at` places from the window's first one, or -1.
  int64_t source_row(int64_t at) const { return row_sources_[at]; }
  int64_t source_column(int64_t at) const { return column_sources_[at]; }

 private:
  // How many pixels all channels together read, and the first of them.
  static std::pair<int64_t, int64_t> span(const AxisPlans<W>& axis, int64_t channels) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t c = 0; c < channels; ++c) {
      low = std::min(low, axis[c].delta());
      high = std::max(high, axis[c].delta() + axis[c].taps());
    }
    return {high - low, low};
  }

  static void place(std::vector<W>& weights, const AxisPlans<W>& axis, int64_t channels, int64_t c, int64_t low) {
    const AxisPlan& plan = axis[c];
    for (int b = 0; b < plan.taps(); ++b)
      weights[(plan.delta() - low + b) * channels + c] = axis.weights(c)[plan.tap(b)];
  }

  std::vector<W> rows_, columns_;
  std::vector<int64_t> row_sources_, column_sources_;
};

// An image in memory [H, W, C].
struct PixelShape {
  int64_t h, w, c;
  int64_t row() const { return w * c; }
  int64_t image() const { return h * row(); }
};

// Rows [first, last) of an image, of a block of channels from c on, of which the block before has some. What lies
// `ahead` elements on will be needed next.
struct PixelTile {
  int64_t c, shared, first, last, ahead;
};

// Calls body(tile) for tiles of the rows [first, last) of an image, small enough for the rows that a block of channels
// reads to stay in the L1 cache. The last block of channels overlaps the one before if they do not fit.
template <class T, class Body>
void walk_tiles(const PixelShape& s, int64_t first, int64_t last, const Body& body) {
  constexpr int64_t size = pack_size<T>, cache = 24576;
  const int64_t most = std::max<int64_t>(1, cache / (2 * s.w * 64) - 1), blocks = (s.c + size - 1) / size;
  const int64_t tiles = (last - first + most - 1) / most, rows = (last - first + tiles - 1) / tiles;
  for (; first < last; first += rows)
    for (int64_t k = 0; k < blocks; ++k) {
      const bool same = k + 2 < blocks;
      const int64_t next = std::min((same ? k + 2 : k + 2 - blocks) * size, s.c - size);
      const int64_t c = std::min(k * size, s.c - size);
      body(PixelTile{c, k * size - c, first, std::min(first + rows, last), next - c + (same ? 0 : rows * s.row())});
    }
}

// The rows that the window of output row `row` covers, for channels from c on.
template <class T>
[[gnu::noinline]] std::array<PixelRow<T>, window> window_rows(const T* image, const PixelShape& s,
                                                              const PixelMap<Wide<T>>& map, int64_t row, int64_t c) {
  static const T zero[pack_size<T>] = {};
  std::array<PixelRow<T>, window> rows;
  for (int64_t r = 0; r < window; ++r) {
    const int64_t source = map.source_row(row + r);
    rows[r] = source < 0 ? PixelRow<T>{zero, 0} : PixelRow<T>{image + source * s.row() + c, s.c};
  }
  return rows;
}

// Calls body(x, inside) for all columns x of the output; `inside` is true_type where the last column of the window lies
// in the map.
template <class Body>
[[gnu::always_inline]] inline void walk_columns(int64_t width, int64_t low, const Body& body) {
  const int64_t reach = low + window - 1, begin = std::clamp<int64_t>(-reach, 0, width);
  const int64_t end = std::clamp<int64_t>(width - reach, begin, width);
  int64_t x = 0;
  for (; x < begin; ++x) body(x, std::false_type{});
  for (; x < end; ++x) body(x, std::true_type{});
  for (; x < width; ++x) body(x, std::false_type{});
}

// A tile of the output. A pixel of no weight may not be finite: `masked`, it is left out; else the result tells whether
// all that was written is finite.
template <class T, bool masked>
bool try_blend_pixels(T* to, const T* from, const PixelShape& s, const PixelMap<Wide<T>>& map, PixelTile tile) {
  using W = Wide<T>;
  using Masks = std::array<Mask<W>, phases<T>>;
  std::array<Pack<T>, window> w, u;
  std::array<Masks, window> row_mask, column_mask;
  for (int i = 0; i < window; ++i) {
    w[i] = load_beside<T>(map.rows() + i * s.c + tile.c);
    u[i] = load_beside<T>(map.columns() + i * s.c + tile.c);
    for (int f = 0; f < phases<T>; ++f) {
      row_mask[i][f] = mask_nonzero<W>(w[i][f]);
      column_mask[i][f] = mask_nonzero<W>(u[i][f]);
    }
  }
  const auto sum = [](const Masks& mask, const Pack<T>& a, Pack<T> b, const Pack<T>& rest)
      __attribute__((always_inline)) {
    each_phase<T>([&](auto f) __attribute__((always_inline)) {
      b[f] = masked ? fma<W>(mask[f], a[f], b[f], rest[f]) : fma<W>(a[f], b[f], rest[f]);
    });
    return b;
  };
  const int64_t low = map.low_column, width = s.w, channels = s.c;
  Pack<T> finite{};  // zero, or else NaN
  for (int64_t y = tile.first; y < tile.last; ++y) {
    const std::array<PixelRow<T>, window> row = window_rows(from, s, map, y, tile.c);
    const auto at = [&](int64_t x) __attribute__((always_inline)) {
      Pack<T> v = sum(row_mask[0], w[0], load_pack<T>(row[0].at + x * row[0].pixel), Pack<T>{});
      v = sum(row_mask[1], w[1], load_pack<T>(row[1].at + x * row[1].pixel), v);
      return sum(row_mask[2], w[2], load_pack<T>(row[2].at + x * row[2].pixel), v);
    };
    const auto folded = [&](int64_t place) {
      const int64_t source = map.source_column(place);
      return source < 0 ? Pack<T>{} : at(source);
    };
    T* const line = to + y * s.row() + tile.c;
    Pack<T> v0 = folded(0), v1 = folded(1);
    walk_columns(width, low, [&](int64_t x, auto inside) __attribute__((always_inline)) {
      const int64_t column = x + low + 2;
      const Pack<T> v2 = inside ? at(column) : folded(x + 2);
      if (inside) {
        __builtin_prefetch(row[2].at + column * row[2].pixel + tile.ahead);
        __builtin_prefetch(line + x * channels + tile.ahead);
      }
      Pack<T> result = sum(column_mask[0], u[0], v0, Pack<T>{});
      result = sum(column_mask[1], u[1], v1, result);
      result = sum(column_mask[2], u[2], v2, result);
      store_pack<T>(line + x * channels, result);
      if (!masked)
        each_phase<T>([&](auto f) __attribute__((always_inline)) {
          finite[f] = fma<W>(result[f], Vector<W>{}, finite[f]);
        });
      v0 = v1;
      v1 = v2;
    });
  }
  bool all = true;
  for (const Vector<W>& v : finite) all = all && sum_lanes<W>(v) == 0;
  return all;
}

template <class T>
void blend_pixels(T* to, const T* from, const PixelShape& s, const PixelMap<Wide<T>>& map, PixelTile tile) {
  if constexpr (phases<T> == 2)  // for which there are too few mask registers
    if (try_blend_pixels<T, false>(to, from, s, map, tile)) return;
  try_blend_pixels<T, true>(to, from, s, map, tile);
}

// sums[(3 * r + k) * C + c] += the sum over a tile of grad times the input at place (r, k) of the window, added in
// vectors first; for the channels that one vector of their packs holds.
template <class T, int phase>
void correlate_pixels(double* sums, const T* grad, const T* from, const PixelShape& s, const PixelMap<Wide<T>>& map,
                      PixelTile tile) {
  using W = Wide<T>;
  using V = Vector<W>;
  const int64_t low = map.low_column, width = s.w, channels = s.c;
  V s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{};
  for (int64_t y = tile.first; y < tile.last; ++y) {
    const std::array<PixelRow<T>, window> row = window_rows(from, s, map, y, tile.c);
    const auto at = [&](int r, int64_t x) __attribute__((always_inline)) {
      return load_phase<T, phase>(row[r].at + x * row[r].pixel);
    };
    const auto folded = [&](int r, int64_t place) {
      const int64_t source = map.source_column(place);
      return source < 0 ? V{} : at(r, source);
    };
    const T* const line = grad + y * s.row() + tile.c;
    V a0 = folded(0, 0), b0 = folded(1, 0), c0 = folded(2, 0);
    V a1 = folded(0, 1), b1 = folded(1, 1), c1 = folded(2, 1);
    walk_columns(width, low, [&](int64_t x, auto inside) __attribute__((always_inline)) {
      const int64_t column = x + low + 2;
      const auto read = [&](int r) { return inside ? at(r, column) : folded(r, x + 2); };
      const V a2 = read(0), b2 = read(1), c2 = read(2), g = load_phase<T, phase>(line + x * channels);
      if (inside) __builtin_prefetch(row[2].at + column * row[2].pixel + tile.ahead);
      s0 = fma<W>(g, a0, s0);
      s1 = fma<W>(g, a1, s1);
      s2 = fma<W>(g, a2, s2);
      s3 = fma<W>(g, b0, s3);
      s4 = fma<W>(g, b1, s4);
      s5 = fma<W>(g, b2, s5);
      s6 = fma<W>(g, c0, s6);
      s7 = fma<W>(g, c1, s7);
      s8 = fma<W>(g, c2, s8);
      a0 = a1, b0 = b1, c0 = c1;
      a1 = a2, b1 = b2, c1 = c2;
    });
  }
  const std::array<V, window * window> all{s0, s1, s2, s3, s4, s5, s6, s7, s8};
  for (const V& sum : all) {
    W each[lanes<W>];
    store<W>(each, sum);
    for (int64_t i = tile.shared + (tile.shared + phase) % phases<T>; i < pack_size<T>; i += phases<T>)
      sums[tile.c + i] += each[i / phases<T>];
    sums += s.c;
  }
}

// The derivatives by the offsets of channel c from the sums of correlate_pixels.
template <class W>
std::array<double, 2> derive_pixels(const double* sums, const ActiveMap<W>& map, const PixelMap<W>& pixels, int64_t c) {
  const std::array<W, 2>&row = map.h.weights(c), &column = map.w.weights(c);
  const int64_t place = window * (map.h[c].delta() - pixels.low_row) + map.w[c].delta() - pixels.low_column;
  const double* const corner = sums + place * map.channels + c;
  const auto difference = [&](int64_t r, int64_t k, int64_t step) {  // of a corner and the next one along an axis
    const double* const at = corner + (window * r + k) * map.channels;
    return at[0] - at[step * map.channels];
  };
  // A sum of no weight may be infinite.
  const auto weigh = [](double weight, double sum) { return weight == 0 ? 0 : weight * sum; };
  return {weigh(column[0], difference(0, 0, window)) + weigh(column[1], difference(0, 1, window)),
          weigh(row[0], difference(0, 0, 1)) + weigh(row[1], difference(1, 0, 1))};
}

}  // namespace shiftconv
