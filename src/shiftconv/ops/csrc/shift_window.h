// Shift whose output is not as large as its input: a window of it, or every few positions of one.
#pragma once

#include <cstring>
#include <vector>

#include "shift_map.h"
#include "tensor.h"

namespace shiftconv {

// One spatial axis: output position o samples first + o * step - offset of `size` pixels.
struct Axis {
  int64_t size = 1, first = 0, count = 1, step = 1;
};

// Which pixel an output position reads, -1 for none, for every distinct offset.
class Sources {
 public:
  Sources(const Axis& axis, const int64_t* offset, int64_t stride, int64_t channels, Padding padding)
      : count_(axis.count), which_(channels) {
    std::unordered_map<int64_t, int64_t> known;
    for (int64_t c = 0; c < channels; ++c) {
      const auto [entry, fresh] = known.try_emplace(offset[c * stride], static_cast<int64_t>(known.size()));
      which_[c] = entry->second * count_;
      if (!fresh) continue;
      for (int64_t o = 0; o < count_; ++o)
        index_.push_back(extend(axis.first + o * axis.step, entry->first, axis.size, padding));
    }
  }

  // [count] of a channel
  const int64_t* operator[](int64_t channel) const { return index_.data() + which_[channel]; }

 private:
  // The pixel at `position - offset` of an axis that its padding extends without end.
  static int64_t extend(int64_t position, int64_t offset, int64_t size, Padding padding) {
    if (padding == Padding::zeros || padding == Padding::replicate) {
      const int64_t reach = std::abs(position) + size;  // beyond it nothing changes, and the difference could overflow
      const int64_t at = position - std::clamp(offset, -reach, reach);
      if (padding == Padding::replicate) return std::clamp<int64_t>(at, 0, size - 1);
      return 0 <= at && at < size ? at : -1;
    }
    const int64_t period = padding == Padding::circular    ? size
                           : padding == Padding::symmetric ? 2 * size
                                                           : std::max<int64_t>(2 * size - 2, 1);
    int64_t at = (position % period - offset % period) % period;
    at += at < 0 ? period : 0;
    if (padding == Padding::reflect) return std::min(at, period - at);
    return padding == Padding::symmetric ? std::min(at, period - 1 - at) : at;
  }

  int64_t count_;
  std::vector<int64_t> which_, index_;
};

// A channel of an image is `plane(n, c)` elements from the start, its pixels `pixel` elements apart.
struct Layout {
  int64_t image, channel, pixel;

  Layout(bool channels_last, int64_t channels, int64_t volume)
      : image(channels * volume), channel(channels_last ? 1 : volume), pixel(channels_last ? channels : 1) {}
};

// Calls body(output element, input element) for every output position of one channel, the input negative for none.
template <class Body>
void visit_window(const std::array<Axis, 3>& axes, const std::array<const int64_t*, 3>& source, const Body& body) {
  const auto& [d, h, w] = axes;
  int64_t at = 0;
  for (int64_t i = 0; i < d.count; ++i)
    for (int64_t j = 0; j < h.count; ++j) {
      const bool none = source[0][i] < 0 || source[1][j] < 0;
      const int64_t row = none ? -1 : (source[0][i] * h.size + source[1][j]) * w.size;
      for (int64_t k = 0; k < w.count; ++k) body(at++, none || source[2][k] < 0 ? -1 : row + source[2][k]);
    }
}

// T is what moves, Sum what sums of several T are taken in. With `transpose`, `from` is an output and `to` an input.
template <class T, class Sum>
void shift_window(T* to, const T* from, int64_t images, int64_t channels, bool channels_last, bool transpose,
                  const std::array<Axis, 3>& axes, const std::array<Sources, 3>& sources) {
  const int64_t large = axes[0].size * axes[1].size * axes[2].size;
  const int64_t small = axes[0].count * axes[1].count * axes[2].count;
  const Layout out(channels_last, channels, transpose ? large : small);
  const Layout in(channels_last, channels, transpose ? small : large);
  parallel_for(images * channels, (large + small) * int64_t{sizeof(T)}, [&](int64_t begin, int64_t end) {
    std::vector<Sum> sum(transpose ? large : 0);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / channels, c = plane % channels;
      T* const t = to + n * out.image + c * out.channel;
      const T* const f = from + n * in.image + c * in.channel;
      const std::array source{sources[0][c], sources[1][c], sources[2][c]};
      if (!transpose) {
        visit_window(axes, source,
                     [&](int64_t o, int64_t i) { t[o * out.pixel] = i < 0 ? T{} : f[i * in.pixel]; });
        continue;
      }
      std::fill(sum.begin(), sum.end(), Sum{});
      visit_window(axes, source, [&](int64_t o, int64_t i) {
        if (i >= 0) sum[i] += static_cast<Sum>(f[o * in.pixel]);
      });
      for (int64_t i = 0; i < large; ++i) t[i * out.pixel] = static_cast<T>(sum[i]);
    }
  });
}

}  // namespace shiftconv
