// Sums of depthwise convolutions of small maps: the lanes of a vector are channels.
//
// On small maps rows are shorter than vectors and kernels larger than the map. Sixteen channels (float32, AVX-512) of a
// map are transposed once into rows of vectors that the first-level cache holds; then each pair of an input and an
// output pixel that a tap connects costs one multiplication of vectors, and nothing else costs any.
#pragma once

#include "depthwise_lanes_table.h"
#include "depthwise_lanes_weight.h"
#include "tensor.h"

namespace shiftconv {
namespace channelwise {

// One or several maps y, each the sum of some terms.
template <class T>
class Forward {
  using K = Kind<T>;
  using W = Wide<T>;
  using V = Vector<W>;
  static constexpr int64_t lanes = width<W>;

 public:
  // Branches that one table holds, and the map that they read.
  struct Term {
    std::vector<size_t> branches;
    size_t x;
    bool turned;
  };
  struct Output {
    std::array<std::vector<size_t>, 2> terms;  // of either grid
    Map<T> y;
  };

  const DepthwiseProblem& problem;
  const std::vector<Map<const T>>& x;
  const std::vector<const T*>& weight;
  const T* bias;
  Grids grids;
  std::vector<Term> terms;
  std::vector<Output> outputs;

  void run() const {
    const int64_t bytes = grids.cycles * 16;  // that memory would move in that time
    parallel_for(Block::count(problem.channels, lanes) * problem.images, bytes,
                 [&](int64_t begin, int64_t end) { piece(begin, end); });
  }

 private:
  // Memory of a thread.
  struct Scratch {
    std::vector<Table<K>> tables;
    std::vector<V*> tables_at;
    std::vector<std::array<V*, 2>> maps;  // of each x, in rows of either grid if a term needs them
    V *flat, *y;
  };

  static int64_t size(const Grid& grid) { return grid.h * grid.tiles_in * K::x_slots(static_cast<int>(grid.tile)); }

  void piece(int64_t begin, int64_t end) const {
    const int64_t in = problem.h * problem.w, out = problem.oh * problem.ow;
    Scratch s{{}, {}, std::vector<std::array<V*, 2>>(x.size(), {nullptr, nullptr}), nullptr, nullptr};
    int64_t flat_size = in, total = out;
    for (const Term& term : terms) {
      const Grid& grid = grids.grid[term.turned];
      Reach reach{};
      for (const size_t b : term.branches) {
        const Reach own = Reach::of(grid, problem.branches[b]);
        flat_size = std::max(flat_size, own.size());
        reach = reach.with(own);
      }
      s.tables.emplace_back(grid, reach);
      total += Table<K>::size(reach);
    }
    const int64_t maps_size = size(grids.grid[0]) + size(grids.grid[1]);
    Workspace workspace((total + flat_size + maps_size * static_cast<int64_t>(x.size())) * vector_bytes);
    s.flat = workspace.take<V>(flat_size);
    s.y = workspace.take<V>(out);
    for (const auto& table : s.tables) s.tables_at.push_back(workspace.take<V>(Table<K>::size(table.reach())));
    for (const Term& term : terms) {
      V*& map = s.maps[term.x][term.turned];
      if (!map) map = workspace.take<V>(size(grids.grid[term.turned]));
    }
    int64_t built = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / problem.images;
      const Block block = Block::at(index, problem.channels, lanes);
      if (built != index) build(block, s);
      built = index;
      image(item % problem.images, block, s);
    }
  }

  void build(const Block& block, Scratch& s) const {
    for (size_t i = 0; i < terms.size(); ++i) {
      s.tables[i].start(s.tables_at[i]);
      for (const size_t b : terms[i].branches) s.tables[i].add(weight[b], block, problem.branches[b], s.flat);
      s.tables[i].finish();
    }
  }

  void image(int64_t n, const Block& block, const Scratch& s) const {
    for (size_t i = 0; i < x.size(); ++i) {
      const Grid& plain = grids.grid[0];
      const bool in_place = !K::paired && s.maps[i][0] && plain.tiles_in * plain.tile == plain.w;
      V* const flat = in_place ? s.maps[i][0] : s.flat;
      read_map<T>(x[i], n, block, problem.h, problem.w, flat);
      for (const bool turned : {false, true}) {
        const Grid& g = grids.grid[turned];
        if (V* const to = s.maps[i][turned]; to && to != flat)
          arrange<K, Side::x>(flat, g.h, g.row_step(), g.w, g.step(), g.tile, to);
      }
    }
    V start{};
    if (bias) gather<T>(bias + block.first, 1, block.valid, 1, &start);
    for (const Output& output : outputs) {
      bool first = true;
      for (const Grid& grid : grids.grid) {
        const std::vector<size_t>& which = output.terms[grid.turned];
        if (which.empty()) continue;
        with_tile<K>(grid.tile, [&](auto tile) { rows<tile>(grid, which, s, first, start); });
        first = false;
      }
      write_map<T>(s.y, block, output.y, n, problem.oh, problem.ow);
    }
  }

  // Adds some terms of one grid to y, which is `start` at first.
  template <int tile>
  [[gnu::noinline]] void rows(const Grid& grid, const std::vector<size_t>& which, const Scratch& s, bool first,
                              V start) const {
    const int64_t row = grid.tiles_in * K::x_slots(tile), step = grid.out_step();
    for (int64_t i = 0; i < grid.oh; ++i) {
      for (int64_t to = 0; to < grid.tiles_out; ++to) {
        const int64_t count = grid.ow - to * tile;
        V* const at = s.y + i * grid.out_row_step() + to * tile * step;
        // Few sums wait for each other: two sets of them take turns, if there are registers for that.
        constexpr bool turns = tile <= 8 && (vector_bytes == 64 || tile == 4);
        V sum[tile], odd[tile];
        if (first)
          unrolled<tile>([&](auto j) __attribute__((always_inline)) { sum[j] = start; });
        else
          unrolled<tile>([&](auto j) __attribute__((always_inline)) { sum[j] = j < count ? at[j * step] : V{}; });
        unrolled<tile>([&](auto j) __attribute__((always_inline)) { odd[j] = V{}; });
        for (const size_t t : which) {
          const Table<K>& table = s.tables[t];
          const Reach& reach = table.reach();
          const V* const map = s.maps[terms[t].x][grid.turned];
          const auto add = [&](V* to_sum, int64_t r) __attribute__((always_inline)) {
            for (int64_t from = 0; from < grid.tiles_in; ++from) {
              const int64_t u = r - i - reach.top, delta = from - to + grid.tiles_out - 1;
              if (const uint32_t mask = table.mask(u, delta))
                add_row<K, tile>(to_sum, map + r * row + from * K::x_slots(tile), table.taps(u, delta), mask);
            }
          };
          const int64_t end = std::min(grid.h, i + reach.bottom);
          int64_t r = std::max<int64_t>(0, i + reach.top);
          if constexpr (turns) {
            for (; r + 1 < end; r += 2) {
              add(sum, r);
              add(odd, r + 1);
            }
          }
          for (; r < end; ++r) add(sum, r);
        }
        unrolled<tile>([&](auto j) __attribute__((always_inline)) {
          if (j < count) at[j * step] = turns ? sum[j] + odd[j] : sum[j];
        });
      }
    }
  }
};

}  // namespace channelwise

// y = sum of branches of x, which all read one map or each its own, + bias [C] if there is one
template <class T>
void lanes_sum(const DepthwiseProblem& p, const std::vector<Map<const T>>& x, const std::vector<const T*>& weight,
               const T* bias, Map<T> y) {
  using channelwise::Grids, channelwise::Kind;
  // Sums of numbers of bfloat16 are not numbers of bfloat16, so kernels that are multiplied as such stay apart.
  const bool merge = x.size() == 1 && !Kind<T>::paired;
  channelwise::Forward<T> forward{p, x, weight, bias, Grids(p, Kind<T>::products, merge), {}, {{{}, y}}};
  for (size_t b = 0; b < p.branches.size(); ++b) {
    const bool turned = forward.grids.turned[b];
    std::vector<size_t>& terms = forward.outputs[0].terms[turned];
    if (terms.empty() || !merge) {
      terms.push_back(forward.terms.size());
      forward.terms.push_back({{}, x.size() == 1 ? 0 : b, turned});
    }
    forward.terms[terms.back()].branches.push_back(b);
  }
  forward.run();
}

// y[b] = branch b of x
template <class T>
void lanes_each(const DepthwiseProblem& p, Map<const T> x, const std::vector<const T*>& weight,
                const std::vector<Map<T>>& y) {
  const std::vector<Map<const T>> maps{x};
  const channelwise::Grids grids(p, channelwise::Kind<T>::products, false);
  channelwise::Forward<T> forward{p, maps, weight, nullptr, grids, {}, {}};
  for (size_t b = 0; b < p.branches.size(); ++b) {
    const bool turned = forward.grids.turned[b];
    forward.terms.push_back({{b}, 0, turned});
    forward.outputs.push_back({{}, y[b]});
    forward.outputs[b].terms[turned] = {b};
  }
  forward.run();
}

// gw[b][c, u, v] = sum over images and pixels of grad[n, c, i, j] * x[n, c, i + u - top, j + v - left]; either list may
// have one map for all branches.
template <class T>
void lanes_weight(const DepthwiseProblem& p, const std::vector<Map<const T>>& x, const std::vector<Map<const T>>& grad,
                  const std::vector<T*>& gw) {
  channelwise::WeightGradient<T>{p, x, grad, gw, channelwise::Grids(p, channelwise::Kind<T>::products, false)}.run();
}

}  // namespace shiftconv
