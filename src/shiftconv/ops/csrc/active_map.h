// Along one axis: which positions of the input each position of the output reads, and which of two taps weighs each.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "simd.h"
#include "shift_map.h"

namespace shiftconv {

// Output position o samples the coordinate first + o * step - offset of `size` pixels.
struct Sampling {
  int64_t size = 1, first = 0, count = 1, step = 1;
  bool plain() const { return first == 0 && step == 1 && count == size; }
};

// The pixel that an axis, extended without end by its padding, has at `at`; -1 for none.
[[gnu::noinline]] inline int64_t fold(int64_t at, int64_t size, Padding padding) {
  if (0 <= at && at < size) return at;
  if (padding == Padding::zeros) return -1;
  if (padding == Padding::replicate) return at < 0 ? 0 : size - 1;
  const int64_t period = padding == Padding::circular    ? size
                         : padding == Padding::symmetric ? 2 * size
                                                         : std::max<int64_t>(2 * size - 2, 1);
  at %= period;
  at += at < 0 ? period : 0;
  return at < size ? at : padding == Padding::symmetric ? period - 1 - at : period - at;
}

struct Tap {
  int64_t source;
  int index;
};

// Positions [begin, end) read position * step + delta, and the next one if there are two taps; the others have lists.
class AxisPlan {
 public:
  AxisPlan(const Sampling& s, int64_t cell, int taps, Padding padding, bool transpose)
      : taps_(taps), reversed_(transpose), count(transpose ? s.size : s.count), size(transpose ? s.count : s.size) {
    if (transpose)
      build_transpose(s, s.first + cell, padding);
    else
      build(s, s.first + cell, padding);
  }

  int taps() const { return taps_; }
  int64_t delta() const { return delta_; }
  int64_t step() const { return step_; }
  bool inside(int64_t position) const { return begin <= position && position < end; }
  // Which weight the b-th pixel of the interior takes.
  int tap(int b) const { return reversed_ ? taps_ - 1 - b : b; }

  // Calls body(source, tap) for all that a position reads.
  template <class Body>
  void visit(int64_t position, const Body& body) const {
    if (inside(position)) {
      for (int b = 0; b < taps_; ++b) body(position * step_ + delta_ + b, tap(b));
      return;
    }
    const int64_t rank = position < begin ? position : position - end + begin;
    for (int64_t i = first_[rank]; i < first_[rank + 1]; ++i) body(items_[i].source, items_[i].index);
  }

  // Calls body(position) for all outside the interior.
  template <class Body>
  void visit_border(const Body& body) const {
    for (int64_t i = 0; i < begin; ++i) body(i);
    for (int64_t i = end; i < count; ++i) body(i);
  }

 private:
  static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  void build(const Sampling& s, int64_t origin, Padding padding) {
    delta_ = origin;
    step_ = s.step;
    begin = std::clamp<int64_t>(-floor_divide(origin, step_), 0, count);
    end = std::clamp<int64_t>(floor_divide(size - taps_ - origin, step_) + 1, begin, count);
    first_.push_back(0);
    visit_border([&](int64_t position) {
      for (int r = 0; r < taps_; ++r)
        if (const int64_t at = fold(position * step_ + origin + r, size, padding); at >= 0) items_.push_back({at, r});
      first_.push_back(static_cast<int64_t>(items_.size()));
    });
  }

  void build_transpose(const Sampling& s, int64_t origin, Padding padding) {
    if (s.step == 1) {
      delta_ = -origin - (taps_ - 1);
      begin = std::clamp<int64_t>(-delta_, 0, count);
      end = std::clamp<int64_t>(size - taps_ - delta_ + 1, begin, count);
      if (padding != Padding::zeros) exclude_folded(origin, padding);
    }
    const auto rank = [&](int64_t q) { return q < begin ? q : q - end + begin; };
    first_.assign(count - (end - begin) + 1, 0);
    const auto each = [&](const auto& body) {
      for (int64_t p = 0; p < size; ++p)
        for (int r = 0; r < taps_; ++r)
          if (const int64_t q = fold(p * s.step + origin + r, count, padding); q >= 0 && !inside(q)) body(p, r, q);
    };
    each([&](int64_t, int, int64_t q) { ++first_[rank(q) + 1]; });
    for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
    items_.resize(first_.back());
    std::vector<int64_t> next(first_);
    each([&](int64_t p, int r, int64_t q) { items_[next[rank(q)]++] = {p, r}; });
  }

  // Shrink the interior to its longest part that no position folds onto.
  void exclude_folded(int64_t origin, Padding padding) {
    std::vector<bool> folded(count, false);
    for (int64_t p = 0; p < size; ++p)
      for (int r = 0; r < taps_; ++r)
        if (const int64_t at = p + origin + r; at < 0 || at >= count) folded[fold(at, count, padding)] = true;
    int64_t start = begin, best = begin, length = 0;
    for (int64_t q = begin; q <= end; ++q) {
      if (q < end && !folded[q]) continue;
      if (q - start > length) {
        best = start;
        length = q - start;
      }
      start = q + 1;
    }
    begin = best;
    end = best + length;
  }

  int taps_;
  bool reversed_;
  int64_t delta_ = 0, step_ = 1;
  std::vector<int64_t> first_;
  std::vector<Tap> items_;

 public:
  int64_t begin = 0, end = 0;
  int64_t count, size;  // of the output, of the input
};

// The bits of a map whose rows follow each other that a tap of the columns reads, by packs, which repeat. Without them
// it would read the neighbouring row.
template <class T>
std::vector<BitPack<T>> column_bits(const AxisPlan& w, int b) {
  std::vector<BitPack<T>> bits(w.count / std::gcd(w.count, pack_size<T>), BitPack<T>{});
  if (b >= w.taps()) return bits;
  int64_t at = w.delta() + b;
  const int64_t end = w.count + at;
  for (BitPack<T>& pack : bits)
    for (int64_t i = 0; i < pack_size<T>; ++i, at = at + 1 < end ? at + 1 : end - w.count)
      if (0 <= at && at < w.count) pack[i % phases<T>][i / phases<T>] = -1;
  return bits;
}

// How the two taps of an axis are weighed; `both` is linear, but leaves no tap out for having no weight.
enum class Blend { linear, rounded, derivative, both };

// One axis of all channels. Channels of the same cell share a plan.
template <class W>
class AxisPlans {
 public:
  AxisPlans(const Sampling& s, const double* offset, int64_t channels, Padding padding, Blend blend, bool transpose)
      : which_(channels), weights_(channels) {
    std::vector<int64_t> key(channels);
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t c = 0; c < channels; ++c) {
      const double at = -offset[c], cell = blend == Blend::rounded ? std::nearbyint(at) : std::floor(at);
      const double d = at - cell;
      const bool one = blend == Blend::rounded || (blend == Blend::linear && d == 0);
      weights_[c] = blend == Blend::derivative ? std::array<W, 2>{1, -1}
                    : one                      ? std::array<W, 2>{1, 0}
                                               : std::array<W, 2>{static_cast<W>(1 - d), static_cast<W>(d)};
      key[c] = 2 * normal(static_cast<int64_t>(cell), s, padding) + !one;
      low = std::min(low, key[c]);
      high = std::max(high, key[c]);
    }
    const bool small = channels > 0 && high - low < 32 * channels + 64;
    std::vector<int32_t> table(small ? high - low + 1 : 0, -1);
    std::unordered_map<int64_t, int32_t> map;
    for (int64_t c = 0; c < channels; ++c) {
      int32_t& known = small ? table[key[c] - low] : map.try_emplace(key[c], -1).first->second;
      if (known < 0) {
        known = static_cast<int32_t>(plans_.size());
        plans_.emplace_back(s, key[c] >> 1, 1 + static_cast<int>(key[c] & 1), padding, transpose);
      }
      which_[c] = known;
    }
  }

  // If rows follow each other, for `columns`.
  void prepare_columns() {
    for (const AxisPlan& plan : plans_) columns_.push_back({column_bits<W>(plan, 0), column_bits<W>(plan, 1)});
  }
  const std::array<std::vector<BitPack<W>>, 2>& columns(int64_t channel) const { return columns_[which_[channel]]; }

  const AxisPlan& operator[](int64_t channel) const { return plans_[which_[channel]]; }
  int64_t which(int64_t channel) const { return which_[channel]; }
  int64_t distinct() const { return static_cast<int64_t>(plans_.size()); }
  const std::array<W, 2>& weights(int64_t channel) const { return weights_[channel]; }

 private:
  // The cell closest to zero that does the same.
  static int64_t normal(int64_t cell, const Sampling& s, Padding padding) {
    const int64_t last = s.first + (s.count - 1) * s.step;
    if (padding == Padding::zeros || padding == Padding::replicate)
      return std::clamp(cell, std::min<int64_t>(0, -last - 2), std::max<int64_t>(0, s.size - s.first));
    const int64_t period = padding == Padding::circular    ? s.size
                           : padding == Padding::symmetric ? 2 * s.size
                                                           : std::max<int64_t>(2 * s.size - 2, 1);
    cell %= period;
    return 2 * cell > period ? cell - period : 2 * cell < -period ? cell + period : cell;
  }

  std::vector<AxisPlan> plans_;
  std::vector<std::array<std::vector<BitPack<W>>, 2>> columns_;
  std::vector<int32_t> which_;
  std::vector<std::array<W, 2>> weights_;
};

}  // namespace shiftconv
