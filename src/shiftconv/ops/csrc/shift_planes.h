// Shift of channels-first maps [N, C, D, H, W].
//
// Small planes run a program of windows, prepared once for all planes of equal offset. In the others the interior is one
// linear move by dh * W + dw elements, after which the border is mended.
#pragma once

#include <cstring>
#include <vector>

#include "gather.h"
#include "shift_map.h"
#include "tensor.h"

namespace shiftconv {

// T is what moves, Sum what sums of several T are taken in.
template <class T, class Sum>
class Plane {
 public:
  explicit Plane(const Group& g) : d_(*g.d), h_(*g.h), w_(*g.w) {}

  // One channel of one image, [D, H, W].
  void run(T* to, const T* from) const {
    const int64_t area = h_.size * w_.size;
    for (int64_t d = 0; d < d_.size; ++d, to += area) {
      if (d_.count(d) == 1)
        single(to, from + d_.source(d) * area);
      else
        for (int64_t h = 0; h < h_.size; ++h) sum_row(to + h * w_.size, from, d, h);
    }
  }

 private:
  void single(T* to, const T* from) const {
    const int64_t width = w_.size;
    move_rows(to + h_.begin * width, from + (h_.begin + h_.delta) * width, h_.end - h_.begin);
    for (int64_t r = 0; r < h_.specials(); ++r) {
      const int64_t h = h_.special(r);
      T* const row = to + h * width;
      const int64_t count = h_.count(h);
      if (count == 0) {
        std::memset(static_cast<void*>(row), 0, width * sizeof(T));
      } else if (count == 1) {
        move_rows(row, from + h_.source(h) * width, 1);
      } else {
        sources_.clear();
        for (int64_t k = 0; k < count; ++k) sources_.push_back(from + h_.source(h, k) * width);
        sum_sources(row);
      }
    }
  }

  // Rows that read one row each, adjacent ones.
  void move_rows(T* to, const T* from, int64_t rows) const {
    const int64_t width = w_.size, step = std::max<int64_t>(1, 16384 / (width * int64_t{sizeof(T)}));
    for (; rows > 0; rows -= step, to += step * width, from += step * width) {  // pieces that stay in the L1 cache
      const int64_t height = std::min(rows, step);
      if (w_.begin < w_.end) {
        const int64_t last = (height - 1) * width + w_.end;
        move_bytes(to + w_.begin, from + w_.begin + w_.delta, (last - w_.begin) * sizeof(T));
      }
      for (int64_t r = 0; r < w_.specials(); ++r) mend_column(to, from, height, w_.special(r));
    }
  }

  void mend_column(T* to, const T* from, int64_t height, int64_t column) const {
    const int64_t width = w_.size, count = w_.count(column);
    to += column;
    if (count == 0) {
      for (int64_t h = 0; h < height; ++h) to[h * width] = T{};
    } else if (count == 1) {
      from += w_.source(column);
      for (int64_t h = 0; h < height; ++h) to[h * width] = from[h * width];
    } else {
      for (int64_t h = 0; h < height; ++h) {
        Sum sum{};
        for (int64_t k = 0; k < count; ++k) sum += static_cast<Sum>(from[h * width + w_.source(column, k)]);
        to[h * width] = static_cast<T>(sum);
      }
    }
  }

  // A row that reads any number of rows from any number of depths.
  void sum_row(T* to, const T* from, int64_t d, int64_t h) const {
    sources_.clear();
    for (int64_t i = 0; i < d_.count(d); ++i)
      for (int64_t k = 0; k < h_.count(h); ++k)
        sources_.push_back(from + (d_.source(d, i) * h_.size + h_.source(h, k)) * w_.size);
    sum_sources(to);
  }

  void sum_sources(T* to) const {
    const int64_t width = w_.size;
    sum_.assign(width, Sum{});
    for (const T* row : sources_) {
      for (int64_t w = w_.begin; w < w_.end; ++w) sum_[w] += static_cast<Sum>(row[w + w_.delta]);
      for (int64_t r = 0; r < w_.specials(); ++r) {
        const int64_t column = w_.special(r);
        for (int64_t k = 0; k < w_.count(column); ++k) sum_[column] += static_cast<Sum>(row[w_.source(column, k)]);
      }
    }
    for (int64_t w = 0; w < width; ++w) to[w] = static_cast<T>(sum_[w]);
  }

  const AxisMap &d_, &h_, &w_;
  inline static thread_local std::vector<const T*> sources_;
  inline static thread_local std::vector<Sum> sum_;
};

// What one plane of `bytes` bytes gathers, for one group of channels.
class PlaneProgram {
 public:
  PlaneProgram(const Group& g, int64_t size) : bytes_(g.d->size * g.h->size * g.w->size * size) {
    lists_.resize(count_windows(bytes_));
    for (int64_t d = 0; d < g.d->size; ++d)
      for (int64_t h = 0; h < g.h->size; ++h)
        if (g.d->count(d) == 1 && g.h->count(h) == 1)
          add_row(g, d * g.h->size + h, g.d->source(d) * g.h->size + g.h->source(h), size);
    for (size_t i = 0; i < lists_.size(); ++i) close(window_at(static_cast<int64_t>(i), bytes_), lists_[i]);
    lists_.clear();
    if (!uniform_) return;
    for (const Window& w : windows_) masks_.push_back(w.covered);
    low_ = std::min(low_, delta_);
    high_ = std::max(high_, bytes_ + delta_);
  }

  // Windows of several steps lose against a linear move once the plane is larger than a page.
  bool pays() const { return uniform_ || bytes_ <= 4096; }

  bool is_uniform() const { return uniform_; }
  Uniform uniform() const { return {delta_, masks_.data()}; }

  // Whether all loads for the plane at `from` stay inside the tensor [first, last).
  bool fits(const char* from, const char* first, const char* last) const {
    return from - first + low_ >= 0 && last - from - high_ >= 0;
  }

  void run(char* to, const char* from) const {
    if (uniform_) {
      constexpr int32_t only = 0;
      const Uniform uniform = this->uniform();
      return run_uniform<0>(to, from, bytes_, 1, &only, &uniform);
    }
    run_windows<1>(to, from, 0, windows_.data(), static_cast<int64_t>(windows_.size()), steps_.data(), 0);
  }

 private:
  void add_row(const Group& g, int64_t row, int64_t source, int64_t size) {
    const int64_t width = g.w->size * size, shift = (source - row) * width;
    add(row * width + g.w->begin * size, row * width + g.w->end * size, shift + g.w->delta * size);
    for (int64_t r = 0; r < g.w->specials(); ++r) {
      const int64_t column = g.w->special(r);
      if (g.w->count(column) == 0) continue;
      const int64_t at = row * width + column * size;
      add(at, at + size, shift + (g.w->source(column) - column) * size);
    }
  }

  // Bytes [begin, end) of the plane come from `delta` bytes away.
  void add(int64_t begin, int64_t end, int64_t delta) {
    if (begin >= end) return;
    const int64_t last = count_windows(bytes_) - 1;
    for (int64_t i = begin / window_size; i <= last && window_at(i, bytes_) < end; ++i) add(i, begin, end, delta);
    if (begin / window_size < last) return;
    for (int64_t i = last - 1; i >= 0 && begin < (i + 1) * window_size; --i) add(i, begin, end, delta);
  }

  void add(int64_t window, int64_t begin, int64_t end, int64_t delta) {
    const int64_t at = window_at(window, bytes_);
    begin = std::max<int64_t>(begin - at, 0);
    end = std::min<int64_t>(end - at, window_size);
    if (begin >= end) return;
    const uint64_t mask = (end == window_size ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & (~uint64_t{0} << begin);
    for (Step& s : lists_[window])
      if (s.delta == delta) {
        s.mask |= mask;
        return;
      }
    lists_[window].push_back({delta, mask});
  }

  void close(int64_t at, const std::vector<Step>& list) {
    Window window{at, std::max<int64_t>(1, list.size()), 0};
    for (const Step& s : list) {
      uniform_ = uniform_ && (!any_ || s.delta == delta_);
      any_ = true;
      delta_ = s.delta;
      window.covered |= s.mask;
      low_ = std::min(low_, at + s.delta);
      high_ = std::max(high_, at + s.delta + window_size);
    }
    if (list.empty()) steps_.push_back({0, 0});
    steps_.insert(steps_.end(), list.begin(), list.end());
    windows_.push_back(window);
  }

  int64_t bytes_, low_ = 0, high_ = 0, delta_ = 0;
  bool any_ = false, uniform_ = true;
  std::vector<std::vector<Step>> lists_;
  std::vector<Window> windows_;
  std::vector<Step> steps_;
  std::vector<uint64_t> masks_;  // of the windows, which is all there is to know when all steps have one delta
};

constexpr int64_t small_plane = 16384;  // bytes

template <class T, class Sum>
void shift_planes(T* to, const T* from, const Shape& s, const Groups& groups, bool sums) {
  const int64_t volume = s.volume(), bytes = volume * int64_t{sizeof(T)};
  std::vector<Plane<T, Sum>> planes;
  std::vector<PlaneProgram> programs;
  for (const Group& g : groups.list) planes.emplace_back(g);
  // A program pays when several planes share it, and while it does not push the plane out of the L1 cache.
  const bool small = has_windows && window_size <= bytes && bytes <= small_plane && s.n * s.c >= 2 * groups.count();
  if (small && !sums)
    for (const Group& g : groups.list) programs.emplace_back(g, sizeof(T));

  // With zeros beyond the border all programs are uniform, and a whole image is one loop.
  std::vector<Uniform> uniforms;
  for (const PlaneProgram& p : programs)
    if (p.is_uniform()) uniforms.push_back(p.uniform());
  const bool uniform = !programs.empty() && uniforms.size() == programs.size();
  const int64_t many = count_windows(bytes);
  const auto run_all = many == 4 ? run_uniform<4> : many == 3 ? run_uniform<3> : run_uniform<0>;

  const char* const first = reinterpret_cast<const char*>(from);
  const char* const last = first + s.n * s.c * bytes;
  parallel_for(s.n * s.c, bytes, [&](int64_t begin, int64_t end) {
    int64_t c = begin % s.c, count = 1;
    for (int64_t plane = begin; plane < end; plane += count, c = c + count < s.c ? c + count : 0) {
      const int32_t g = groups.of_channel[c];
      const char* const source = first + plane * bytes;
      char* const target = reinterpret_cast<char*>(to + plane * volume);
      count = std::min({end - plane, s.c - c, s.n * s.c - 1 - plane});
      if (uniform && plane > 0 && count > 0) {  // all but the tensor's first and last plane fit, as |delta| < bytes
        run_all(target, source, bytes, count, &groups.of_channel[c], uniforms.data());
        continue;
      }
      count = 1;
      if (!programs.empty() && programs[g].pays() && programs[g].fits(source, first, last))
        programs[g].run(target, source);
      else
        planes[g].run(to + plane * volume, from + plane * volume);
    }
  });
}

}  // namespace shiftconv
