// Kernels of the channels of one block, as tables of vectors that the tiles read.
#pragma once

#include <array>
#include <cstdlib>
#include <vector>

#include "depthwise_lanes_tile.h"

namespace shiftconv::channelwise {

// What all rows have in common: sizes, and their division into tiles. A turned grid has columns of the map as its rows.
struct Grid {
  bool turned;
  int64_t h, w, oh, ow, tile, tiles_in, tiles_out;

  // products: of a vector's lane
  Grid(const DepthwiseProblem& p, bool turned, int64_t products)
      : turned(turned), h(turned ? p.w : p.h), w(turned ? p.h : p.w), oh(turned ? p.ow : p.oh),
        ow(turned ? p.oh : p.ow), tile(best_tile(w, ow, products)), tiles_in((w + tile - 1) / tile),
        tiles_out((ow + tile - 1) / tile) {}

  int64_t deltas() const { return tiles_in + tiles_out - 1; }  // differences of two tiles, from 1 - tiles_out on
  int64_t row_step() const { return turned ? 1 : w; }  // of the map
  int64_t step() const { return turned ? h : 1; }
  int64_t out_row_step() const { return turned ? 1 : ow; }
  int64_t out_step() const { return turned ? oh : 1; }

  Branch turn(const Branch& b) const { return turned ? Branch{b.kw, b.kh, b.left, b.top} : b; }
};

// A rectangle of taps by how far they reach: rows [top, bottom) and columns [left, right) relative to the output pixel.
struct Reach {
  int64_t top, bottom, left, right;

  // The taps of a branch that meet any pixel.
  static Reach of(const Grid& grid, const Branch& branch) {
    const Branch b = grid.turn(branch);
    const Range u = Range::taps(b.kh, b.top, grid.oh, grid.h), v = Range::taps(b.kw, b.left, grid.ow, grid.w);
    if (u.size() == 0 || v.size() == 0) return {};
    return {u.begin - b.top, u.end - b.top, v.begin - b.left, v.end - b.left};
  }
  Reach with(const Reach& o) const {
    if (empty()) return o;
    if (o.empty()) return *this;
    return {std::min(top, o.top), std::max(bottom, o.bottom), std::min(left, o.left), std::max(right, o.right)};
  }
  bool empty() const { return top == bottom; }
  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
  int64_t size() const { return rows() * columns(); }

  // The taps that two tiles meet in whose numbers differ by delta - (tiles_out - 1).
  uint32_t mask(const Grid& grid, int64_t delta) const {
    uint32_t mask = 0;
    const int64_t first = (delta - (grid.tiles_out - 1)) * grid.tile - (grid.tile - 1);
    for (int64_t k = 0; k < 2 * grid.tile - 1; ++k)
      if (left <= first + k && first + k < right) mask |= 1u << k;
    return mask;
  }

  // Roughly the cycles that one image takes, at 2 * `products` products in a cycle.
  int64_t cost(const Grid& grid, int64_t products) const {
    int64_t pairs = 0, cycles = 0;
    for (int64_t u = top; u < bottom; ++u) pairs += Range::inside(grid.oh, u, grid.h).size();
    for (int64_t delta = 0; delta < grid.deltas(); ++delta) {
      const uint32_t taps = mask(grid, delta);
      if (!taps) continue;
      int64_t count = 0, sums = 20;
      for (int64_t k = 0; k < 2 * grid.tile - 1; ++k)
        if (taps >> k & 1) count += grid.tile - std::abs(k - (grid.tile - 1)), ++sums;
      const Range tiles = Range::inside(grid.tiles_out, delta - (grid.tiles_out - 1), grid.tiles_in);
      cycles += (sums + count / products) / 2 * tiles.size();
    }
    return pairs * cycles;
  }
};

// Both grids of a problem, and which of them adds up each branch.
struct Grids {
  std::array<Grid, 2> grid;
  std::vector<bool> turned;
  int64_t cycles;  // of an image and the channels of a vector

  // products: of a vector's lane; merged: branches in one grid share the taps that coincide
  Grids(const DepthwiseProblem& p, int64_t products, bool merged)
      : grid{Grid(p, false, products), Grid(p, true, products)} {
    std::array<int64_t, 3> total{};  // all plain, all turned, each the better way
    for (const Branch& branch : p.branches) {
      const int64_t plain = Reach::of(grid[0], branch).cost(grid[0], products);
      const int64_t other = Reach::of(grid[1], branch).cost(grid[1], products);
      total[0] += plain;
      total[1] += other;
      total[2] += std::min(plain, other);
      turned.push_back(other < plain);
    }
    const int64_t pass = p.h * p.w + p.oh * p.ow;
    total[1] += pass;
    total[2] += pass * (merged ? 5 : 2);
    const auto best = std::ranges::min_element(total) - total.begin();
    cycles = total[best] + 4 * pass;
    if (best < 2) turned.assign(turned.size(), best == 1);
  }
};

// The taps of one or several branches, added up where they coincide, and which of them are not zero in all channels.
template <class K>
class Table {
 public:
  using V = typename K::V;

  Table(const Grid& grid, const Reach& reach)
      : grid_(grid), reach_(reach), masks_(grid.deltas() * reach.rows()), live_(reach.size()) {}

  static int64_t stride(const Reach& reach) { return reach.columns() + 1; }
  static int64_t size(const Reach& reach) { return reach.rows() * stride(reach); }
  const Reach& reach() const { return reach_; }

  void start(V* memory) {
    data_ = memory;
    std::fill(live_.begin(), live_.end(), 0);
  }

  // Adds the branch's kernels of a block; `flat` has room for those that reach any pixel.
  template <class T>
  void add(const T* weight, const Block& block, const Branch& branch, V* flat) {
    const Reach own = Reach::of(grid_, branch);
    if (own.empty()) return;
    const int64_t size = branch.kh * branch.kw;
    const int64_t rows = grid_.turned ? own.columns() : own.rows(), columns = own.size() / rows;
    const int64_t top = grid_.turned ? own.left : own.top, left = grid_.turned ? own.top : own.left;
    const T* from = weight + block.first * size + (top + branch.top) * branch.kw + left + branch.left;
    if (columns == branch.kw) {
      gather<T>(from, size, block.valid, rows * columns, flat);
    } else {
      for (int64_t u = 0; u < rows; ++u)
        gather<T>(from + u * branch.kw, size, block.valid, columns, flat + u * columns);
    }
    const int64_t row_step = grid_.turned ? 1 : columns, step = grid_.turned ? columns : 1;
    for (int64_t u = 0; u < own.rows(); ++u) {
      const int64_t row = own.top + u - reach_.top, first = own.left - reach_.left;
      uint8_t* live = live_.data() + row * reach_.columns() + first;
      V* to = data_ + row * stride(reach_) + first;
      for (int64_t v = 0; v < own.columns(); ++v) {
        const V tap = flat[u * row_step + v * step];
        if (!any_nonzero<typename K::Value>(tap)) continue;
        to[v] = live[v] ? to[v] + tap : tap;
        live[v] = 1;
      }
    }
  }

  // To be called after the last branch.
  void finish() {
    if constexpr (K::paired) pair_up();
    const int64_t columns = reach_.columns(), taps = K::taps(static_cast<int>(grid_.tile));
    for (int64_t delta = 0; delta < grid_.deltas(); ++delta) {
      for (int64_t row = 0; row < reach_.rows(); ++row) {
        const uint8_t* live = live_.data() + row * columns;
        const int64_t first = column(delta);
        uint32_t mask = 0;
        for (int64_t k = 0; k < taps; ++k) {
          const auto is_live = [&](int64_t v) { return 0 <= v && v < columns && live[v]; };
          if (is_live(first + k) || (K::paired && is_live(first + k + 1))) mask |= 1u << k;
        }
        masks_[delta * reach_.rows() + row] = mask;
      }
    }
  }

  // Taps of a row for two tiles whose numbers differ by delta - (tiles_out - 1); only what the mask has may be read.
  const V* taps(int64_t row, int64_t delta) const {
    return data_ + row * stride(reach_) + column(delta) + (K::paired ? 1 : 0);
  }
  uint32_t mask(int64_t row, int64_t delta) const { return masks_[delta * reach_.rows() + row]; }

 private:
  // The column of the table that is the first tap of two tiles.
  int64_t column(int64_t delta) const {
    return (delta - (grid_.tiles_out - 1)) * grid_.tile - (grid_.tile - 1) - reach_.left;
  }

  void pair_up() {
    const int64_t columns = reach_.columns();
    for (int64_t row = 0; row < reach_.rows(); ++row) {
      const uint8_t* live = live_.data() + row * columns;
      V* at = data_ + row * stride(reach_);
      V high{};
      for (int64_t v = columns; v >= 0; --v) {  // slot v holds taps v - 1 and v
        const V low = v > 0 && live[v - 1] ? at[v - 1] : V{};
        at[v] = K::pair(low, high);
        high = low;
      }
    }
  }

  Grid grid_;
  Reach reach_;
  V* data_ = nullptr;
  std::vector<uint32_t> masks_;
  std::vector<uint8_t> live_;
};

}  // namespace shiftconv::channelwise
