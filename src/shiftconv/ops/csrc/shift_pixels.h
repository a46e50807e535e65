// Shift of channels-last maps, in memory [N, D, H, W, C]: a pixel is gathered from a few pixels, one per distinct offset.
// Where only adjacent columns are read, as in a 3x3 window, rows are gathered first and each result serves three pixels:
// 3 reads a pixel in place of 9.
#pragma once

#include <array>
#include <cstdlib>
#include <utility>
#include <vector>

#include "gather.h"
#include "shift_map.h"
#include "tensor.h"

namespace shiftconv {

// How the bytes of a pixel belong to the groups, by windows; and, once deltas are known, how to gather them.
class Lanes {
 public:
  struct Plan {
    std::vector<Window> windows;
    std::vector<Step> steps;
    int64_t farthest = 0;        // the largest delta
    std::vector<int64_t> delta;  // by channel, where there are no windows
  };

  Lanes(const std::vector<int32_t>& group, int64_t size) : group_(group), size_(size) {
    bytes_ = static_cast<int64_t>(group.size()) * size;
    if (!has_windows || bytes_ < window_size) return;
    const uint64_t one = (uint64_t{1} << size) - 1;
    for (int64_t i = 0; i < count_windows(bytes_); ++i) {
      const int64_t at = window_at(i, bytes_);
      const size_t first = parts_.size();
      size_t channel = at / size;
      for (int64_t byte = 0; byte < window_size; byte += size) {
        const int32_t g = group[channel++];
        size_t k = first;
        while (k < parts_.size() && parts_[k].first != g) ++k;
        if (k == parts_.size()) parts_.push_back({g, 0});
        parts_[k].second |= one << byte;
      }
      ends_.push_back(parts_.size());
    }
  }

  int64_t plan_bytes() const {
    return static_cast<int64_t>(ends_.empty() ? group_.size() * sizeof(int64_t) : parts_.size() * sizeof(Step));
  }

  // `delta` by group, in bytes, or nothing for zeros.
  void resolve(const std::vector<int64_t>& delta, Plan& plan) const {
    plan.windows.clear();
    plan.steps.clear();
    plan.delta.clear();
    plan.windows.reserve(ends_.size());
    plan.steps.reserve(parts_.size());
    plan.farthest = 0;
    for (const int64_t d : delta) plan.farthest = std::max(plan.farthest, d);
    size_t i = 0;
    for (const size_t end : ends_) {
      const size_t first = plan.steps.size();
      uint64_t covered = 0;
      for (; i < end; ++i) {
        const int64_t d = delta[parts_[i].first];
        if (d == nothing) continue;
        covered |= parts_[i].second;
        size_t k = first;
        while (k < plan.steps.size() && plan.steps[k].delta != d) ++k;
        if (k == plan.steps.size()) plan.steps.push_back({d, 0});
        plan.steps[k].mask |= parts_[i].second;
      }
      if (plan.steps.size() == first) plan.steps.push_back({0, 0});
      const int64_t at = window_at(static_cast<int64_t>(plan.windows.size()), bytes_);
      plan.windows.push_back({at, static_cast<int64_t>(plan.steps.size() - first), covered});
    }
    if (ends_.empty())
      for (const int32_t g : group_) plan.delta.push_back(delta[g]);
  }

  // What the windows take from the pixels beside, for deltas of -1, 0 and 1.
  std::vector<Sides> sides(const std::vector<int64_t>& delta) const {
    std::vector<Sides> sides;
    size_t i = 0;
    for (const size_t end : ends_) {
      sides.push_back({0, 0});
      for (; i < end; ++i) {
        if (delta[parts_[i].first] < 0) sides.back().left |= parts_[i].second;
        if (delta[parts_[i].first] > 0) sides.back().right |= parts_[i].second;
      }
    }
    return sides;
  }

  // `pixels` <= 8 adjacent pixels that read from the rows of `plan` and from the pixels beside.
  void run(char* to, const char* from, int64_t pixels, const Plan& plan, const Sides* sides, Ends ends) const {
    constexpr std::array run{run_sides<1>, run_sides<2>, run_sides<3>, run_sides<4>,
                             run_sides<5>, run_sides<6>, run_sides<7>, run_sides<8>};
    run[pixels - 1](to, from, bytes_, plan.windows.data(), static_cast<int64_t>(plan.windows.size()),
                    plan.steps.data(), plan.farthest, sides, ends);
  }

  // `pixels` adjacent pixels that follow one plan.
  template <class T>
  void run(T* to, const T* from, int64_t pixels, const Plan& plan) const {
    char* t = reinterpret_cast<char*>(to);
    const char* f = reinterpret_cast<const char*>(from);
    const auto count = static_cast<int64_t>(plan.windows.size());
    if (count > 0) {
      for (; pixels >= 4; pixels -= 4, t += 4 * bytes_, f += 4 * bytes_)
        run_windows<4>(t, f, bytes_, plan.windows.data(), count, plan.steps.data(), plan.farthest);
      for (; pixels > 0; --pixels, t += bytes_, f += bytes_)
        run_windows<1>(t, f, 0, plan.windows.data(), count, plan.steps.data(), plan.farthest);
      return;
    }
    for (; pixels > 0; --pixels, to += group_.size(), f += bytes_)
      for (size_t c = 0; c < group_.size(); ++c) {
        T value{};
        if (plan.delta[c] != nothing) std::memcpy(&value, f + c * sizeof(T) + plan.delta[c], sizeof(T));
        to[c] = value;
      }
  }

 private:
  const std::vector<int32_t>& group_;
  int64_t size_, bytes_;
  std::vector<std::pair<int32_t, uint64_t>> parts_;  // group, and its bytes of the window
  std::vector<size_t> ends_;                         // of the windows, in parts_
};

// What the pixels of one row read. Columns of the interior share a plan; every other column has its own.
struct RowPlan {
  bool known = false;
  std::vector<Lanes::Plan> columns;  // or only one, of the rows, where all that is read lies in adjacent columns
  std::vector<std::pair<int64_t, int64_t>> sums;  // columns and groups that read several pixels
};

constexpr int64_t plan_budget = 1 << 20;  // bytes of plans that may be kept

template <class T, class Sum>
class Pixels {
 public:
  Pixels(T* to, const T* from, const Shape& s, const Groups& groups, const Lanes& lanes)
      : to_(to), from_(from), s_(s), groups_(groups.list), lanes_(lanes), end_(s.w), z_end_(s.d), y_end_(s.h) {
    for (const Group& g : groups_) {
      narrow(*g.w, begin_, end_);
      narrow(*g.d, z_begin_, z_end_);
      narrow(*g.h, y_begin_, y_end_);
    }
    columns_ = s.w - std::max<int64_t>(0, end_ - begin_) + 1;
    if (has_windows && s.c * int64_t{sizeof(T)} >= window_size) find_beside();
    const int64_t kinds = (s.d - std::max<int64_t>(0, z_end_ - z_begin_) + 1) *
                          (s.h - std::max<int64_t>(0, y_end_ - y_begin_) + 1);
    keep_ = kinds * columns_ * lanes.plan_bytes() <= plan_budget;
    rows_.resize(keep_ ? kinds : 1);
    delta_.resize(groups_.size());
  }

  // Rows [first, last) of all rows of all images. With plans for all kinds of rows they are visited as they lie in
  // memory; else the images are innermost, and a row is planned once for all of them.
  void run(int64_t first, int64_t last) {
    const int64_t height = s_.d * s_.h;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = keep_ ? unit % height : unit / s_.n, n = keep_ ? unit / height : unit % s_.n;
      const RowPlan& plan = plan_for(row, unit == first || n == 0);
      const int64_t image = n * s_.volume() * s_.c, at = image + row * s_.w * s_.c;
      if (beside_.empty())
        move_row(to_ + at, from_ + at, plan);
      else
        move_beside(to_ + at, from_ + at, plan.columns[0]);
      for (const auto& [x, g] : plan.sums) sum(to_ + at + x * s_.c, from_ + image, row, x, groups_[g]);
    }
  }

 private:
  static void narrow(const AxisMap& map, int64_t& begin, int64_t& end) {
    begin = std::max(begin, map.begin);
    end = std::min(end, map.end);
  }

  // The number of a position among the border and one for the interior.
  static int64_t kind(int64_t at, int64_t begin, int64_t end) {
    return at < begin || begin >= end ? at : at < end ? begin : at - end + begin + 1;
  }

  const RowPlan& plan_for(int64_t row, bool fresh) {
    const int64_t z = row / s_.h, y = row % s_.h;
    const int64_t y_kinds = s_.h - std::max<int64_t>(0, y_end_ - y_begin_) + 1;
    RowPlan& plan = rows_[keep_ ? kind(z, z_begin_, z_end_) * y_kinds + kind(y, y_begin_, y_end_) : 0];
    if (keep_ ? plan.known : !fresh) return plan;
    plan.known = true;
    plan.columns.resize(columns_);
    plan.sums.clear();
    for (int64_t x = 0; x < s_.w; x = begin_ <= x && x < end_ ? end_ : x + 1) {
      for (size_t g = 0; g < groups_.size(); ++g) delta_[g] = delta(plan, static_cast<int64_t>(g), z, y, x);
      if (beside_.empty()) lanes_.resolve(delta_, plan.columns[kind(x, begin_, end_)]);
    }
    if (beside_.empty()) return plan;
    for (size_t g = 0; g < groups_.size(); ++g) {
      const int64_t count = groups_[g].d->count(z) * groups_[g].h->count(y);
      delta_[g] = count == 1 ? row_delta(groups_[g], z, y) * s_.w * s_.c * int64_t{sizeof(T)} : nothing;
    }
    lanes_.resolve(delta_, plan.columns[0]);
    return plan;
  }

  // How many bytes away the one pixel is that the group reads at (z, y, x).
  int64_t delta(RowPlan& plan, int64_t g, int64_t z, int64_t y, int64_t x) const {
    const AxisMap &dm = *groups_[g].d, &hm = *groups_[g].h, &wm = *groups_[g].w;
    const int64_t count = dm.count(z) * hm.count(y) * wm.count(x);
    if (count == 0) return nothing;
    if (count == 1) {
      return (row_delta(groups_[g], z, y) * s_.w + wm.source(x) - x) * s_.c * int64_t{sizeof(T)};
    }
    const int64_t last = begin_ <= x && x < end_ ? end_ : x + 1;
    for (int64_t i = x; i < last; ++i) plan.sums.push_back({i, g});
    return nothing;
  }

  int64_t row_delta(const Group& g, int64_t z, int64_t y) const {
    return (g.d->source(z) - z) * s_.h + g.h->source(y) - y;
  }

  // Fills beside_ and sides_ if the groups read columns x - 1, x and x + 1 only, and agree in what stands for those
  // beyond the border. Sums do not matter, they are written over.
  void find_beside() {
    std::vector<int64_t> column(s_.w + 2, s_.w), deltas;
    for (int64_t x = 0; x < s_.w; ++x) column[x + 1] = x;
    constexpr int64_t unknown = -1;
    column.front() = column.back() = unknown;
    for (const Group& g : groups_) {
      deltas.push_back(g.w->delta);
      if (std::abs(g.w->delta) > 1) return;
      for (int64_t x = 0; x < s_.w; ++x) {
        if (g.w->count(x) > 1) continue;
        const int64_t source = g.w->count(x) == 1 ? g.w->source(x) : s_.w;
        int64_t& known = column[x + 1 + g.w->delta];
        if (known != unknown && known != source) return;
        known = source;
      }
    }
    beside_ = {column.front(), column.back()};
    sides_ = lanes_.sides(deltas);
  }

  // In pieces of nearly equal length.
  void move_beside(T* to, const T* from, const Lanes::Plan& plan) const {
    const int64_t pieces = (s_.w + 7) / 8, pixel = s_.c * int64_t{sizeof(T)};
    const auto end = [&](int64_t side, int64_t x) {  // from pixel x to the one that stands beyond the border
      const int64_t column = beside_[side];
      return column < 0 || column == s_.w ? nothing : (column - x) * pixel;
    };
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t x = i * s_.w / pieces, last = (i + 1) * s_.w / pieces;
      const Ends ends{x > 0 ? -pixel : end(0, x), last < s_.w ? (last - x) * pixel : end(1, x)};
      lanes_.run(reinterpret_cast<char*>(to + x * s_.c), reinterpret_cast<const char*>(from + x * s_.c), last - x, plan,
                 sides_.data(), ends);
    }
  }

  void move_row(T* to, const T* from, const RowPlan& plan) const {
    const int64_t c = s_.c;
    for (int64_t x = 0; x < s_.w;) {
      const Lanes::Plan& column = plan.columns[kind(x, begin_, end_)];
      const int64_t last = begin_ <= x && x < end_ ? end_ : x + 1;
      lanes_.run(to + x * c, from + x * c, last - x, column);
      x = last;
    }
  }

  void sum(T* to, const T* image, int64_t row, int64_t x, const Group& g) const {
    const int64_t z = row / s_.h, y = row % s_.h;
    for (const int32_t c : g.channels) {
      Sum total{};
      for (int64_t i = 0; i < g.d->count(z); ++i)
        for (int64_t j = 0; j < g.h->count(y); ++j) {
          const T* const line = image + (g.d->source(z, i) * s_.h + g.h->source(y, j)) * s_.w * s_.c + c;
          for (int64_t k = 0; k < g.w->count(x); ++k) total += static_cast<Sum>(line[g.w->source(x, k) * s_.c]);
        }
      to[c] = static_cast<T>(total);
    }
  }

  T* to_;
  const T* from_;
  Shape s_;
  const std::vector<Group>& groups_;
  const Lanes& lanes_;
  bool keep_ = true;
  int64_t columns_ = 0;
  int64_t begin_ = 0, end_, z_begin_ = 0, z_end_, y_begin_ = 0, y_end_;  // where all groups are in their interior
  std::vector<int64_t> delta_;
  std::vector<RowPlan> rows_;
  std::vector<int64_t> beside_;  // the columns that stand for -1 and for w; none if the pixels have plans
  std::vector<Sides> sides_;
};

template <class T, class Sum>
void shift_pixels(T* to, const T* from, const Shape& s, const Groups& groups) {
  const Lanes lanes(groups.of_channel, sizeof(T));
  parallel_for(s.n * s.d * s.h, s.w * s.c * sizeof(T), [&](int64_t begin, int64_t end) {
    Pixels<T, Sum>(to, from, s, groups, lanes).run(begin, end);
  });
}

}  // namespace shiftconv
