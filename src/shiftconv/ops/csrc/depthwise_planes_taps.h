// The taps of a channel as a program for tiles: kernels that read one map added up, dead and unreachable taps left out.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "depthwise_planes_tile.h"
#include "depthwise_problem.h"

namespace shiftconv {

// Kernels that share a source, in the box around their taps. Tap (u, v) of the box reads the pixel that lies
// (first_row + u, first_column + v) from the output's.
class TapBox {
 public:
  // `each` taps of a row go into one cell.
  TapBox(const DepthwiseProblem& p, std::vector<int64_t> branches, int64_t source, int64_t each)
      : branches(std::move(branches)), source(source), each_(each) {
    int64_t last_row = INT64_MIN, last_column = INT64_MIN;
    first_row = first_column = INT64_MAX;
    for (const int64_t b : this->branches) {
      const Branch& k = p.branches[b];
      const Range rows = Range::taps(k.kh, k.top, p.oh, p.h), columns = Range::taps(k.kw, k.left, p.ow, p.w);
      reach_.push_back({rows, columns});
      if (rows.size() == 0 || columns.size() == 0) continue;
      first_row = std::min(first_row, rows.begin - k.top);
      first_column = std::min(first_column, columns.begin - k.left);
      last_row = std::max(last_row, rows.end - k.top);
      last_column = std::max(last_column, columns.end - k.left);
    }
    if (first_row == INT64_MAX) first_row = first_column = last_row = last_column = 0;
    rows = last_row - first_row;
    columns = (last_column - first_column + each - 1) / each;
    hull_.assign(columns, {rows, 0});
    for (size_t i = 0; i < this->branches.size(); ++i) {
      const Branch& k = p.branches[this->branches[i]];
      const auto& [r, c] = reach_[i];
      if (r.size() == 0) continue;
      for (int64_t v = c.begin; v < c.end; ++v) {
        Range& hull = hull_[(v - k.left - first_column) / each];
        hull.begin = std::min(hull.begin, r.begin - k.top - first_row);
        hull.end = std::max(hull.end, r.end - k.top - first_row);
      }
    }
  }

  std::vector<int64_t> branches;
  int64_t source, rows, columns, first_row, first_column;  // columns count cells

  const Range& hull(int64_t column) const { return hull_[column]; }
  // Taps of the branch with the number i that reach anything.
  const std::pair<Range, Range>& reach(size_t i) const { return reach_[i]; }
  int64_t each() const { return each_; }
  int64_t taps() const {
    int64_t count = 0;
    for (const Range& hull : hull_) count += std::max<int64_t>(hull.size(), 0);
    return count;
  }

 private:
  int64_t each_;
  std::vector<Range> hull_;
  std::vector<std::pair<Range, Range>> reach_;
};

// As many zeros are not worth to be multiplied: to begin another block of taps costs as much as two of them.
constexpr int64_t dead_run = 3;

template <class T, class A>
class TapProgram {
 public:
  using Cell = typename A::Cell;

  // `stride` is that of the rows in the scratch.
  void build(const DepthwiseProblem& p, const TapBox& box, const std::vector<const T*>& weight, int64_t channel,
             int64_t stride) {
    box_ = &box;
    cells_.resize(box.rows * box.columns);
    for (int64_t v = 0; v < box.columns; ++v)
      if (box.hull(v).size() > 0)
        std::fill(at(v, box.hull(v).begin), at(v, box.hull(v).end), Cell{});
    for (size_t i = 0; i < box.branches.size(); ++i) {
      const Branch& k = p.branches[box.branches[i]];
      const auto& [rows, columns] = box.reach(i);
      const T* const kernel = weight[box.branches[i]] + channel * k.kh * k.kw;
      for (int64_t u = rows.begin; u < rows.end; ++u)
        for (int64_t v = columns.begin; v < columns.end; ++v)
          add(u - k.top - box.first_row, v - k.left - box.first_column, kernel[u * k.kw + v]);
    }
    blocks_.clear();
    first_.clear();
    for (int64_t v = 0; v < box.columns; ++v) {
      first_.push_back(static_cast<int32_t>(blocks_.size()));
      find_blocks(v, stride);
    }
    first_.push_back(static_cast<int32_t>(blocks_.size()));
  }

  // Points `input` to the blocks that reach into [0, size) from any of the `count` columns from `column` on.
  void select(int64_t column, int64_t count, int64_t size, TileInput<Cell>& input) const {
    const int64_t each = box_->each(), before = -column - box_->first_column;
    const int64_t begin = before - (count - 1) - (each - 1), end = before + size;  // of the taps, in the box
    const auto cell = [&](int64_t tap) { return std::clamp<int64_t>((tap + each - 1) / each, 0, box_->columns); };
    input.begin = blocks_.data() + first_[begin <= 0 ? 0 : cell(begin)];
    input.end = blocks_.data() + first_[end <= 0 ? 0 : cell(end)];
    if (input.end < input.begin) input.end = input.begin;
    input.weights = cells_.data();
  }

 private:
  // Cells of a column lie together.
  Cell* at(int64_t column, int64_t row) { return cells_.data() + column * box_->rows + row; }

  void add(int64_t u, int64_t v, T weight) {
    if constexpr (A::taps == 2) {
      uint16_t bits;
      std::memcpy(&bits, &weight, sizeof(bits));
      *at(v / 2, u) |= static_cast<Cell>(bits) << (v % 2 * 16);
    } else {
      *at(v, u) += static_cast<Cell>(weight);
    }
  }

  static bool is_zero(Cell cell) {
    if constexpr (A::taps == 2) return (cell & 0x7fff7fff) == 0;
    return cell == Cell{};
  }

  // Runs of taps that end before a dead run of zeros, or at the last tap.
  void find_blocks(int64_t column, int64_t stride) {
    const Range hull = box_->hull(column);
    const Cell* const cell = at(column, 0);
    int64_t u = hull.begin;
    while (u < hull.end) {
      if (is_zero(cell[u])) {
        ++u;
        continue;
      }
      int64_t end = u + 1;
      for (int64_t i = end; i < hull.end && i < end + dead_run; ++i)
        if (!is_zero(cell[i])) end = i + 1;
      add_run(column, u, end, stride);
      u = end;
    }
  }

  void add_run(int64_t column, int64_t begin, int64_t end, int64_t stride) {
    for (int64_t left = (end - begin + most_taps - 1) / most_taps; left > 0; --left) {
      const int64_t count = (end - begin + left - 1) / left, row = box_->first_row + begin;
      blocks_.push_back({row * stride + box_->first_column + column * A::taps, column * box_->rows + begin,
                         static_cast<int32_t>(row), static_cast<int32_t>(count)});
      begin += count;
    }
  }

  const TapBox* box_ = nullptr;
  std::vector<Cell> cells_;
  std::vector<TapBlock> blocks_;
  std::vector<int32_t> first_;  // block of every column
};

}  // namespace shiftconv
