// The gradient of a sum of depthwise convolutions to their kernels, for maps of any size in either memory format.
//
// A channel, or a block of channels where they lie innermost, is one piece of work: its images come in their order, so
// that the result does not depend on the number of threads. Planes are copied to where they lie padded and in the
// first-level cache; there every rectangle of taps visits the rows and columns that it can reach. Maps that are too
// large for that come in bands of rows of x, each with all rows of the gradient that it meets.
#pragma once

#include "depthwise_taps_load.h"
#include "tensor.h"

namespace shiftconv::tapwise {

// A rectangle of taps of one branch, and what it visits.
struct TapTile {
  int64_t u, v;       // first tap
  int rows, columns;  // of taps
  int64_t sums;       // index of its first sum
  Range visits;       // rows of x
  int64_t column, vectors;  // of the gradient
};

struct TapBranch {
  Branch kernel;
  Range u, v;  // taps that reach
  std::vector<TapTile> tiles;
};

// How the planes of one call are laid out, and its tiles.
template <class C>
class TapPlan {
 public:
  static constexpr int64_t width = width_of<C>;

  TapPlan(const DepthwiseProblem& p) : before(up(width + most_taps - 2)) {
    x_row = up(before + p.w + width + most_taps);
    grad_row = up(p.ow);
    for (const Branch& kernel : p.branches) add(p, kernel);
    band = std::clamp<int64_t>(band_bytes / (x_row * int64_t{sizeof(C)}), 16, std::max<int64_t>(p.h, 16));
    band = (p.h + (p.h + band - 1) / band - 1) / ((p.h + band - 1) / band);
    grad_rows = std::min(p.oh + 2 * pad, band + reach_.size() - 1);
    x_image = odd_lines(band * x_row);
    grad_image = odd_lines(std::max<int64_t>(grad_rows, 1) * grad_row);
    const int64_t bytes = (x_image + grad_image) * int64_t{sizeof(C)};
    const int64_t groups = (p.images + images_of<C> - 1) / images_of<C>;
    group = std::clamp<int64_t>(cache_bytes / bytes, 1, std::max<int64_t>(groups, 1));
  }

  // Rows of the gradient that rows of x meet, with the zeros around it that tiles touch.
  Range window(Range rows, int64_t oh) const {
    const int64_t begin = std::max(-pad, rows.begin + reach_.begin);
    return {begin, std::max(begin, std::min(oh + pad, rows.end - 1 + reach_.end))};
  }

  int64_t before;           // columns of zeros left of x
  int64_t x_row, grad_row;  // cells
  int64_t band;             // rows of x at a time
  int64_t grad_rows;        // that those meet at most
  int64_t x_image, grad_image;  // cells of a plane
  int64_t group;            // images, or pairs of them, at a time
  int64_t sums = 0;         // of a channel, each as many lanes as a vector has
  std::vector<TapBranch> branches;
  double cost = 0;  // cycles for all tiles of one plane of cells

 private:
  static constexpr int64_t pad = most_taps - 1, band_bytes = 1 << 16, cache_bytes = 40 << 10;

  static int64_t up(int64_t cells) { return (cells + width - 1) / width * width; }
  // Planes of several channels or images must not all fall into the same few sets of the cache.
  static int64_t odd_lines(int64_t cells) {
    const int64_t line = 64 / sizeof(C);
    return ((cells + line - 1) / line | 1) * line;
  }

  void add(const DepthwiseProblem& p, const Branch& k) {
    TapBranch branch{k, Range::taps(k.kh, k.top, p.oh, p.h), Range::taps(k.kw, k.left, p.ow, p.w), {}};
    const Range &u = branch.u, &v = branch.v;
    if (u.size() > 0 && v.size() > 0) {
      const Range reach{k.top - u.end + 1, k.top - u.begin + 1};
      reach_ = sums == 0 ? reach : Range{std::min(reach_.begin, reach.begin), std::max(reach_.end, reach.end)};
      const TileSizes size = TileSizes::cheapest(u.size(), v.size());
      TileSizes::for_parts(u.size(), size.rows, [&](int64_t row, int rows) {
        TileSizes::for_parts(v.size(), size.columns, [&](int64_t column, int columns) {
          const TapTile t = tile(p, k, {u.begin + row, v.begin + column, rows, columns, sums, {}, 0, 0});
          cost += static_cast<double>(t.visits.size() * t.vectors) * TileSizes::cost(rows, columns);
          branch.tiles.push_back(t);
          sums += rows * columns;
        });
      });
    }
    branches.push_back(std::move(branch));
  }

  TapTile tile(const DepthwiseProblem& p, const Branch& k, TapTile t) const {
    t.visits = {std::max<int64_t>(0, t.u - k.top), std::min(p.h, p.oh + t.u + t.rows - 1 - k.top)};
    const int64_t begin = std::max<int64_t>(0, k.left - t.v - t.columns + 1), end = std::min(p.ow, p.w + k.left - t.v);
    t.vectors = (end - begin + width - 1) / width;
    const int64_t aligned = begin / width * width;
    t.column = aligned + t.vectors * width >= end ? aligned : std::min(begin, grad_row - t.vectors * width);
    return t;
  }

  Range reach_{0, 0};  // rows of the gradient less rows of x
};

template <class T>
class TapSums {
  using C = Cell<T>;
  using W = SumOf<C>;

 public:
  TapSums(const DepthwiseProblem& p, const std::vector<Map<const T>>& x, const std::vector<Map<const T>>& grad,
          const std::vector<T*>& weight)
      : p_(p), plan_(p), x_(x), grad_(grad), weight_(weight) {
    for (const auto* maps : {&x, &grad})
      for (const Map<const T>& map : *maps)
        if (map.column != 1) block_ = channel_block, unit_ = std::max<int64_t>(channel_block, 64 / sizeof(T));
  }

  void run() const {
    const int64_t units = (p_.channels + unit_ - 1) / unit_;
    const int64_t bytes = unit_ * p_.images * (p_.h * p_.w + p_.oh * p_.ow) * int64_t{sizeof(T)};
    parallel_for(units, 8 * bytes, [&](int64_t begin, int64_t end) {
      static thread_local TapMemory memory;
      const int64_t images = block_ * plan_.group;
      const int64_t cells = images * (plan_.x_image + plan_.grad_image);
      char* const data = memory.bytes(cells * int64_t{sizeof(C)} + unit_ * sums_of_channel() * int64_t{sizeof(W)});
      std::memset(data, 0, cells * sizeof(C));
      C* const planes = reinterpret_cast<C*>(data);
      const Scratch scratch{planes, planes + images * plan_.x_image, reinterpret_cast<W*>(planes + cells)};
      for (int64_t i = begin; i < end; ++i) sum_unit(i, scratch);
    });
  }

 private:
  struct Scratch {
    C *x, *grad;  // [channels, images, rows, columns]
    W* sums;      // [channels, sums, lanes]
  };

  // What is computed with at a time.
  struct Piece {
    Range channels, images, rows;  // rows of x
  };

  Range channels_from(int64_t channel) const {
    const int64_t unit_end = (channel / unit_ + 1) * unit_;
    return {channel, std::min({p_.channels, unit_end, channel + block_})};
  }
  Range images_from(int64_t image) const {
    return {image, std::min(p_.images, image + plan_.group * images_of<C>)};
  }
  Range rows_from(int64_t row) const { return {row, std::min(p_.h, row + plan_.band)}; }

  // Calls body(piece, the piece after it) for all of a unit. Blocks that share cache lines of a pixel come in turn.
  template <class Body>
  void for_pieces(int64_t unit, const Body& body) const {
    const int64_t end = std::min(p_.channels, (unit + 1) * unit_);
    Piece piece{channels_from(unit * unit_), images_from(0), rows_from(0)};
    for (bool more = true; more;) {
      Piece after{channels_from(unit * unit_), piece.images, piece.rows};
      if (piece.channels.end < end) {
        after.channels = channels_from(piece.channels.end);
      } else if (piece.rows.end < p_.h) {
        after.rows = rows_from(piece.rows.end);
      } else {
        after.rows = rows_from(0);
        more = piece.images.end < p_.images;
        if (more)
          after.images = images_from(piece.images.end);
        else
          after = {channels_from(end), images_from(0), rows_from(0)};  // no channels behind the last unit
      }
      body(piece, after);
      piece = after;
    }
  }

  void sum_unit(int64_t unit, const Scratch& s) const {
    std::memset(static_cast<void*>(s.sums), 0, unit_ * sums_of_channel() * sizeof(W));
    for_pieces(unit, [&](const Piece& piece, const Piece& after) { add_piece(piece, after, s); });
    for (int64_t k = 0; k < unit_ && unit * unit_ + k < p_.channels; ++k)
      write(unit * unit_ + k, s.sums + k * sums_of_channel());
  }

  void add_piece(const Piece& piece, const Piece& after, const Scratch& s) const {
    const auto& [channels, images, rows] = piece;
    const Range window = plan_.window(rows, p_.oh);
    const int64_t count = (images.size() + images_of<C> - 1) / images_of<C>;
    LinesAhead ahead;
    for (size_t b = 0; b < plan_.branches.size(); ++b) {
      const TapBranch& branch = plan_.branches[b];
      if (b == 0 || x_.size() > 1)
        fill(x_[b], piece, rows, p_.h, p_.w, {s.x + plan_.before, plan_.x_image, plan_.x_row});
      if (b == 0 || grad_.size() > 1)
        fill(grad_[b], piece, window, p_.oh, p_.ow, {s.grad, plan_.grad_image, plan_.grad_row});
      look_ahead(b, piece, after, ahead);
      for (int64_t k = 0; k < channels.size(); ++k) {
        W* const sums = s.sums + (channels.begin + k) % unit_ * sums_of_channel();
        for (const TapTile& tile : branch.tiles) {
          const Range visits{std::max(tile.visits.begin, rows.begin), std::min(tile.visits.end, rows.end)};
          if (visits.size() <= 0) continue;
          const int64_t meets = visits.begin + branch.kernel.top - tile.u - window.begin;
          const C* const x = s.x + k * plan_.group * plan_.x_image + plan_.before + tile.column + tile.v -
                             branch.kernel.left + (visits.begin - rows.begin) * plan_.x_row;
          const C* const grad = s.grad + k * plan_.group * plan_.grad_image + meets * plan_.grad_row + tile.column;
          TileRun<C> run{x, grad, plan_.x_row, plan_.grad_row, plan_.x_image, plan_.grad_image, count, visits.size(),
                         tile.vectors, sums + tile.sums * plan_.width, nullptr, 0, 0};
          ahead.hand_out(count * visits.size() * tile.vectors, run);
          table[tile.rows - 1][tile.columns - 1](run);
        }
      }
    }
  }

  // What is read after the tiles of a branch: the maps of the next one, or those of the next piece.
  void look_ahead(size_t b, const Piece& piece, const Piece& after, LinesAhead& ahead) const {
    const bool last = b + 1 == plan_.branches.size();
    const size_t branch = last ? 0 : b + 1;
    if (last && after.channels.size() <= 0) return;
    const Piece& then = last ? after : piece;
    for (int64_t n = then.images.begin; n < then.images.end; ++n) {
      if (last || x_.size() > 1) ahead.add<T>(x_[branch], n, then.channels, then.rows, p_.h, p_.w);
      if (last || grad_.size() > 1)
        ahead.add<T>(grad_[branch], n, then.channels, plan_.window(then.rows, p_.oh), p_.oh, p_.ow);
    }
  }

  // The planes of a channel lie image by image.
  void fill(const Map<const T>& map, const Piece& piece, Range rows, int64_t size, int64_t columns,
            const Planes<C>& to) const {
    int64_t at = 0;
    for (int64_t n = piece.images.begin; n < piece.images.end; n += images_of<C>, ++at)
      fill_planes<T>(map, n, p_.images, p_.channels, piece.channels, rows, size, columns,
                     {to.data + at * to.plane, plan_.group * to.plane, to.row});
  }

  void write(int64_t channel, const W* sums) const {
    for (size_t b = 0; b < plan_.branches.size(); ++b) {
      const TapBranch& branch = plan_.branches[b];
      const int64_t taps = branch.kernel.kh * branch.kernel.kw;
      T* const to = weight_[b] + channel * taps;
      int64_t reached = 0;
      for (const TapTile& tile : branch.tiles) reached += tile.rows * tile.columns;
      if (reached < taps) std::memset(static_cast<void*>(to), 0, taps * sizeof(T));
      for (const TapTile& tile : branch.tiles)
        for (int i = 0; i < tile.rows * tile.columns; ++i) {
          const auto v = load<W>(sums + (tile.sums + i) * plan_.width);
          to[(tile.u + i / tile.columns) * branch.kernel.kw + tile.v + i % tile.columns] =
              static_cast<T>(static_cast<W>(sum_lanes<W>(v)));
        }
    }
  }

  int64_t sums_of_channel() const { return plan_.sums * plan_.width; }

  static constexpr auto table = tile_table<C>();

  const DepthwiseProblem& p_;
  const TapPlan<C> plan_;
  const std::vector<Map<const T>>&x_, &grad_;
  const std::vector<T*>& weight_;
  int64_t block_ = 1;  // channels that are computed with at a time
  int64_t unit_ = 1;   // channels whose sums a thread keeps
};

}  // namespace shiftconv::tapwise

namespace shiftconv {

// gw[b][c, u, v] = sum over images and pixels of grad[n, c, i, j] * x[n, c, i + u - top, j + v - left]; either list may
// have one map for all branches.
template <class T>
void taps_weight(const DepthwiseProblem& p, const std::vector<Map<const T>>& x, const std::vector<Map<const T>>& grad,
                 const std::vector<T*>& weight) {
  tapwise::TapSums<T>(p, x, grad, weight).run();
}

}  // namespace shiftconv
