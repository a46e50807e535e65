// Gradients to the kernels of depthwise convolutions of small maps; the lanes of a vector are channels.
#pragma once

#include <vector>

#include "depthwise_lanes_table.h"
#include "tensor.h"

namespace shiftconv::channelwise {

// Images are added one after the other by one thread, so the sums do not depend on the number of threads.
template <class T>
class WeightGradient {
  using K = Kind<T>;
  using W = Wide<T>;
  using V = Vector<W>;
  static constexpr int64_t lanes = width<W>;

 public:
  const DepthwiseProblem& problem;
  const std::vector<Map<const T>>& x;
  const std::vector<Map<const T>>& grad;
  const std::vector<T*>& gw;

  Grids grids;

  void run() const {
    int64_t cycles = problem.images * grids.cycles;
    for (const Branch& branch : problem.branches) cycles += 4 * branch.kh * branch.kw;
    const int64_t bytes = cycles * 16;  // that memory would move in that time
    parallel_for(Block::count(problem.channels, lanes), bytes,
                 [&](int64_t begin, int64_t end) { piece(begin, end); });
  }

 private:
  // The sums of a branch: its taps that meet any pixel, row by row of its grid.
  struct Sums {
    Reach reach;
    V* data;
    std::vector<uint32_t> masks;  // of each difference of two tiles
  };
  // Memory of a thread; maps in rows of either grid if a branch needs them.
  struct Scratch {
    std::vector<Sums> sums;
    std::vector<std::array<V*, 2>> x, grad;
    V* flat;
  };

  static int64_t x_size(const Grid& g) { return g.h * g.tiles_in * K::x_slots(static_cast<int>(g.tile)); }
  static int64_t grad_size(const Grid& g) { return g.oh * g.tiles_out * K::grad_slots(static_cast<int>(g.tile)); }
  static size_t of_branch(const auto& list, size_t b) { return list.size() == 1 ? 0 : b; }

  void piece(int64_t begin, int64_t end) const {
    Scratch s{{}, std::vector<std::array<V*, 2>>(x.size(), {nullptr, nullptr}),
              std::vector<std::array<V*, 2>>(grad.size(), {nullptr, nullptr}), nullptr};
    int64_t flat_size = std::max(problem.h * problem.w, problem.oh * problem.ow), total = 0;
    for (size_t b = 0; b < problem.branches.size(); ++b) {
      const Grid& grid = grids.grid[grids.turned[b]];
      const Branch& branch = problem.branches[b];
      Sums sums{Reach::of(grid, branch), nullptr, {}};
      for (int64_t delta = 0; delta < grid.deltas(); ++delta) sums.masks.push_back(sums.reach.mask(grid, delta));
      flat_size = std::max(flat_size, (grid.turned ? sums.reach.columns() : sums.reach.rows()) * branch.kw);
      total += sums.reach.size();
      s.sums.push_back(sums);
    }
    for (const Grid& grid : grids.grid)
      total += x_size(grid) * static_cast<int64_t>(x.size()) + grad_size(grid) * static_cast<int64_t>(grad.size());
    Workspace workspace((total + flat_size) * vector_bytes);
    s.flat = workspace.take<V>(flat_size);
    for (size_t b = 0; b < s.sums.size(); ++b) {
      const bool turned = grids.turned[b];
      s.sums[b].data = workspace.take<V>(s.sums[b].reach.size());
      V*& from = s.x[of_branch(x, b)][turned];
      if (!from) from = workspace.take<V>(x_size(grids.grid[turned]));
      V*& gradient = s.grad[of_branch(grad, b)][turned];
      if (!gradient) gradient = workspace.take<V>(grad_size(grids.grid[turned]));
    }
    for (int64_t index = begin; index < end; ++index) {
      const Block block = Block::at(index, problem.channels, lanes);
      for (Sums& sums : s.sums) std::fill_n(sums.data, sums.reach.size(), V{});
      for (int64_t n = 0; n < problem.images; ++n) image(n, block, s);
      for (size_t b = 0; b < s.sums.size(); ++b)
        write(s.sums[b], grids.turned[b], block, problem.branches[b], s.flat, gw[b]);
    }
  }

  void image(int64_t n, const Block& block, const Scratch& s) const {
    for (size_t i = 0; i < x.size(); ++i) {
      read_map<T>(x[i], n, block, problem.h, problem.w, s.flat);
      for (const Grid& g : grids.grid)
        if (V* const to = s.x[i][g.turned])
          arrange<K, Side::x>(s.flat, g.h, g.row_step(), g.w, g.step(), g.tile, to);
    }
    for (size_t i = 0; i < grad.size(); ++i) {
      read_map<T>(grad[i], n, block, problem.oh, problem.ow, s.flat);
      for (const Grid& g : grids.grid)
        if (V* const to = s.grad[i][g.turned])
          arrange<K, Side::grad>(s.flat, g.oh, g.out_row_step(), g.ow, g.out_step(), g.tile, to);
    }
    for (size_t b = 0; b < s.sums.size(); ++b) {
      const Grid& grid = grids.grid[grids.turned[b]];
      const V *from = s.x[of_branch(x, b)][grid.turned], *gradient = s.grad[of_branch(grad, b)][grid.turned];
      with_tile<K>(grid.tile, [&](auto tile) { rows<tile>(grid, s.sums[b], from, gradient); });
    }
  }

  template <int tile>
  [[gnu::noinline]] void rows(const Grid& grid, const Sums& sums, const V* x, const V* grad) const {
    const int64_t x_row = grid.tiles_in * K::x_slots(tile), grad_row = grid.tiles_out * K::grad_slots(tile);
    for (int64_t row = 0; row < sums.reach.rows(); ++row) {
      const int64_t shift = sums.reach.top + row;
      V* const to_row = sums.data + row * sums.reach.columns() - sums.reach.left - (tile - 1);
      const Range range = Range::inside(grid.oh, shift, grid.h);
      for (int64_t i = range.begin; i < range.end; ++i) {
        for (int64_t to = 0; to < grid.tiles_out; ++to) {
          for (int64_t from = 0; from < grid.tiles_in; ++from) {
            if (const uint32_t mask = sums.masks[from - to + grid.tiles_out - 1])
              add_taps<K, tile>(to_row + (from - to) * tile, x + (i + shift) * x_row + from * K::x_slots(tile),
                                grad + i * grad_row + to * K::grad_slots(tile), mask);
          }
        }
      }
    }
  }

  static void write(const Sums& sums, bool turned, const Block& block, const Branch& branch, V* flat, T* to) {
    const Reach& reach = sums.reach;
    const int64_t size = branch.kh * branch.kw, rows = turned ? reach.columns() : reach.rows();
    const int64_t columns = turned ? reach.rows() : reach.columns(), count = rows * branch.kw;
    const int64_t first = rows ? ((turned ? reach.left : reach.top) + branch.top) * branch.kw : size;
    const int64_t left = (turned ? reach.top : reach.left) + branch.left;
    const int64_t row_step = turned ? 1 : columns, step = turned ? rows : 1;
    to += block.first * size;
    for (int64_t l = block.fresh; l < block.valid; ++l) {
      std::fill_n(to + l * size, first, T(0));
      std::fill_n(to + l * size + first + count, size - first - count, T(0));
    }
    if (!rows) return;
    std::fill_n(flat, count, V{});
    for (int64_t u = 0; u < rows; ++u)
      for (int64_t v = 0; v < columns; ++v)
        flat[u * branch.kw + left + v] = sums.data[u * row_step + v * step];
    scatter<T>(flat, count, block, to + first, size);
  }
};

}  // namespace shiftconv::channelwise
