// Interpolating shift of one channel of one image, [D, H, W] in memory.
#pragma once

#include <cstring>
#include <vector>

#include "active_map.h"
#include "active_rows.h"

namespace shiftconv {

// The linear map of all channels: the product of one map per axis.
template <class W>
struct ActiveMap {
  int64_t channels, ndim;
  AxisPlans<W> d, h, w;
  bool plain;  // the output is as large as the input, and equal offsets read equal distances away
  bool zeros;

  // offset [3, C], with zeros for absent axes, which come first
  ActiveMap(const std::array<Sampling, 3>& s, int64_t ndim, const std::vector<double>& offset, Padding padding,
            const std::array<Blend, 3>& blend, bool transpose)
      : channels(static_cast<int64_t>(offset.size()) / 3),
        ndim(ndim),
        d(s[0], offset.data(), channels, padding, blend[0], transpose),
        h(s[1], offset.data() + channels, channels, padding, blend[1], transpose),
        w(s[2], offset.data() + 2 * channels, channels, padding, blend[2], transpose),
        plain(s[0].plain() && s[1].plain() && s[2].plain()),
        zeros(padding == Padding::zeros) {
    if (plain && ndim > 1) w.prepare_columns();
  }

  // What a run over a whole slice keeps of its columns.
  Columns<W> columns(int64_t channel) const {
    return ndim > 1 ? Columns<W>(w.columns(channel)) : Columns<W>::all(w[channel].taps());
  }
};

// Room for a row of numbers, with a vector to spare on either side.
template <class W>
class Line {
 public:
  W* of(int64_t size) {
    memory_.resize(size + 2 * lanes<W>);
    return memory_.data() + lanes<W>;
  }

 private:
  std::vector<W> memory_;
};

// The linear map of one channel, to planes of the output from planes of the input.
template <class W>
class ActivePlane {
 public:
  ActivePlane(const ActiveMap<W>& map) : map_(map) {}

  void select(int64_t channel) {
    channel_ = channel;
    d_ = &map_.d[channel];
    h_ = &map_.h[channel];
    w_ = &map_.w[channel];
    depth_ = map_.d.weights(channel);
    row_ = map_.h.weights(channel);
    column_ = map_.w.weights(channel);
    if (w_->tap(0) != 0) std::swap(column_[0], column_[1]);
  }

  void run(W* to, const W* from, Care care) {
    const int64_t area = h_->count * w_->count;
    for (int64_t d = 0; d < d_->count; ++d, to += area) {
      std::array<std::pair<const W*, W>, 2> slice;
      size_t slices = 0, all = 0;
      d_->visit(d, [&](int64_t source, int tap) {
        if (all++ < 2) slice[slices++] = {from + source * h_->size * w_->size, depth_[tap]};
      });
      if (!map_.plain || all > 2) {
        for (int64_t h = 0; h < h_->count; ++h) general_row(to + h * w_->count, from, d, h);
        continue;
      }
      run_slice(to, slice.data(), slices, care);
      if (map_.zeros) continue;
      h_->visit_border([&](int64_t h) { general_row(to + h * w_->count, from, d, h); });
      for (int64_t h = h_->begin; h < h_->end; ++h) mend_row(to + h * w_->count, slice.data(), slices, h);
    }
  }

 private:
  // All that does not fold at the border is one run: positions are a constant distance from what they read.
  void run_slice(W* to, const std::pair<const W*, W>* slice, size_t slices, Care care) const {
    const int64_t width = w_->count, area = h_->count * width;
    std::array<Source<W>, 4> source;
    int count = 0;
    for (size_t i = 0; i < slices; ++i)
      for (int b = 0; b < h_->taps(); ++b) {
        const int64_t distance = (h_->delta() + b) * width + w_->delta();
        source[count++] = {slice[i].first + distance, -distance, area - distance, slice[i].second * row_[h_->tap(b)]};
      }
    if (count == 0) {
      std::memset(to, 0, area * sizeof(W));
      return;
    }
    blend<W>(to, area, source.data(), count, column_.data(), map_.columns(channel_), care);
  }

  // The columns of a row that fold; the row itself reads adjacent ones.
  void mend_row(W* to, const std::pair<const W*, W>* slice, size_t slices, int64_t h) const {
    w_->visit_border([&](int64_t w) {
      W sum = 0;
      for (size_t i = 0; i < slices; ++i)
        for (int b = 0; b < h_->taps(); ++b) {
          const W* const row = slice[i].first + (h + h_->delta() + b) * w_->count;
          sum += slice[i].second * row_[h_->tap(b)] * columns_at(row, w);
        }
      to[w] = sum;
    });
  }

  W columns_at(const W* row, int64_t w) const {
    W sum = 0;
    w_->visit(w, [&](int64_t source, int tap) { sum += column_[w_->tap(tap)] * row[source]; });
    return sum;
  }

  // A row that reads any number of rows, at any step.
  void general_row(W* to, const W* from, int64_t d, int64_t h) {
    W* const sum = sum_.of(w_->size);
    std::fill(sum, sum + w_->size, W{});
    d_->visit(d, [&](int64_t z, int i) {
      h_->visit(h, [&](int64_t y, int j) { add_row(sum, from + (z * h_->size + y) * w_->size, depth_[i] * row_[j]); });
    });
    const int64_t begin = w_->begin, count = w_->end - begin;
    if (w_->step() == 1 && count > 0) {
      const Source<W> source{sum + begin + w_->delta(), 0, count + w_->taps() - 1, 1};
      blend<W>(to + begin, count, &source, 1, column_.data(), Columns<W>::all(w_->taps()), {false, false});
    } else {
      for (int64_t w = begin; w < w_->end; ++w) to[w] = columns_at(sum, w);
    }
    w_->visit_border([&](int64_t w) { to[w] = columns_at(sum, w); });
  }

  void add_row(W* sum, const W* row, W weight) const {
    int64_t w = 0;
    for (; w + lanes<W> <= w_->size; w += lanes<W>)
      store<W>(sum + w, fma<W>(splat<W>(weight), load<W>(row + w), load<W>(sum + w)));
    for (; w < w_->size; ++w) sum[w] += weight * row[w];
  }

  const ActiveMap<W>& map_;
  int64_t channel_ = 0;
  const AxisPlan *d_ = nullptr, *h_ = nullptr, *w_ = nullptr;
  std::array<W, 2> depth_, row_, column_;  // by tap, but those of the columns in the order in which the interior reads
  Line<W> sum_;
};

}  // namespace shiftconv
