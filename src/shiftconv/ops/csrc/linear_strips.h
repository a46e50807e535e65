// Output pixels of channels-first maps, sixteen side by side, and the lanes of the input that they read.
#pragma once

#include <array>
#include <vector>

#include "linear_problem.h"
#include "linear_vector.h"

#if defined(SHIFTCONV_LINEAR_VECTORS)
namespace shiftconv {

// Sixteen successive output pixels. They may begin in one image and end in the next.
struct Strip {
  int64_t image[2];
  int64_t pixel[2];  // that lane 0 has, or would have, in either image
  __mmask16 mask[2];
};

class Strips {
 public:
  explicit Strips(const LinearProblem& p) : volume_(p.out_volume()), whole_(p.images * volume_) {
    joined_ = p.is_linear() && volume_ >= lanes && volume_ % lanes != 0;
    per_image_ = (volume_ + lanes - 1) / lanes;
    count_ = joined_ ? (whole_ + lanes - 1) / lanes : p.images * per_image_;
  }
  int64_t count() const { return count_; }
  int64_t per_image() const { return per_image_; }

  Strip operator[](int64_t i) const {
    if (!joined_) {
      const int64_t image = i / per_image_, pixel = (i - image * per_image_) * lanes;
      return {{image, image}, {pixel, pixel}, {first_lanes(volume_ - pixel), 0}};
    }
    const int64_t first = i * lanes, image = first / volume_, pixel = first - image * volume_;
    const __mmask16 here = first_lanes(volume_ - pixel), all = first_lanes(whole_ - first);
    return {{image, image + 1}, {pixel, pixel - volume_}, {here, static_cast<__mmask16>(all & ~here)}};
  }

 private:
  int64_t volume_, whole_, per_image_, count_;
  bool joined_;
};

template <int width>
using Strided = std::array<Strip, width>;

// Coordinates of sixteen pixels from `pixel` on, which counts along w first; lanes before pixel 0 mean nothing.
struct Places {
  __m512i d, h, w;

  Places(int64_t pixel, const LinearProblem& p) {
    const int64_t from = std::max<int64_t>(pixel, 0), row = from / p.w.count, slice = row / p.h.count;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    w = _mm512_add_epi32(lane, set(from - row * p.w.count - (from - pixel)));
    h = set(row - slice * p.h.count);
    d = set(slice);
    carry(w, h, p.w.count);
    carry(h, d, p.h.count);
  }

 private:
  static __m512i set(int64_t value) { return _mm512_set1_epi32(static_cast<int32_t>(value)); }

  static void carry(__m512i& low, __m512i& high, int64_t size) {
    const __m512i limit = set(size), one = _mm512_set1_epi32(1);
    for (__mmask16 over; (over = _mm512_cmpge_epi32_mask(low, limit)) != 0;) {
      low = _mm512_mask_sub_epi32(low, over, low, limit);
      high = _mm512_mask_add_epi32(high, over, high, one);
    }
  }
};

// Reads what lies a fixed distance away, or zero: padding with zeros, no stride.
template <class T>
class LinearReader {
 public:
  LinearReader(const LinearProblem& p, const T* x)
      : p_(p), x_(x), volume_(p.in_volume()), source_(p.channels), masks_(p.groups.size()) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const Offset& o = p.groups[p.of_channel[c]];
      const int64_t delta = -((o.d * p.h.size + o.h) * p.w.size + o.w);
      source_[c] = c * volume_ + delta;
      low_ = std::min(low_, delta);
      high_ = std::max(high_, delta);
    }
  }

  // Prepare to read for `width` strips; `next` begins the tile that will be read after this one.
  template <int width>
  void open(const std::array<Strip, width>& tile, const Strip& next) {
    const int64_t image = p_.channels * volume_;
    bool two = false, whole = true, row = true;
    for (int v = 0; v < width; ++v) {
      for (int i = 0; i < 2; ++i) {
        const bool any = tile[v].mask[i] != 0;
        base_[v][i] = tile[v].image[i] * image + tile[v].pixel[i];
        mask_groups(v, i, tile[v], any);
        if (!any) continue;
        two = two || i == 1;
        whole = whole && base_[v][i] + low_ >= 0 && base_[v][i] + image - volume_ + lanes + high_ <= p_.images * image;
      }
      row = row && base_[v][0] == base_[0][0] + v * lanes;
    }
    way_ = two ? split : row && whole ? straight : careful;
    next_ = next.image[0] * image + next.pixel[0];
  }

  // Calls body(fetch, first) until all strips were fetched; fetch(channel) is what some of them read, from `first` on.
  template <int width, class Body>
  void read(const Body& body) const {
    const auto fetch = [this](auto way) {
      constexpr int kind = way;
      return [masks = masks_.data(), base = base_, group = p_.of_channel.data(), x = x_,
              source = source_.data()](int64_t c) __attribute__((always_inline)) {
        const Masks mask = masks[group[c]];
        const T* const from = x + source[c];
        std::array<__m512i, width> strip;
#pragma GCC unroll 4
        for (int v = 0; v < width; ++v) {
          if constexpr (kind == straight) {
            strip[v] = load_whole(mask[0][v], from + base[0][0] + v * lanes);
          } else {
            strip[v] = load_lanes(mask[0][v], from + base[v][0]);
            if (kind == split) strip[v] = _mm512_or_si512(strip[v], load_lanes(mask[1][v], from + base[v][1]));
          }
        }
        return strip;
      };
    };
    if (way_ == straight)
      body(fetch(std::integral_constant<int, straight>()), 0);
    else if (way_ == careful)
      body(fetch(std::integral_constant<int, careful>()), 0);
    else
      body(fetch(std::integral_constant<int, split>()), 0);
  }

  // Put a strip of each vector where fetch(channel) would have read it.
  template <int width>
  void store(T* to, int64_t c, const __m512 (&strip)[width]) const {
    const Masks mask = masks_[p_.of_channel[c]];
    to += source_[c];
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) {
      store_floats(to + base_[v][0], mask[0][v], strip[v]);
      if (way_ == split) store_floats(to + base_[v][1], mask[1][v], strip[v]);
    }
  }

  void prefetch_here(int64_t c) const {
    const char* const first = reinterpret_cast<const char*>(x_ + base_[0][0] + source_[c]);
    for (int64_t at = 0; at < tile * int64_t{sizeof(T)}; at += 64) prefetch_write(first + at);
  }

  // Fetch what pixels from `pixel` on will read.
  void prefetch_span(int64_t c, int64_t image, int64_t pixel, int64_t count) const {
    if (c >= p_.channels) return;
    const T* const from = x_ + image * p_.channels * volume_ + pixel + source_[c];
    for (int64_t at = 0; at < count; at += 64 / sizeof(T)) prefetch(from + at);
  }

  // Fetch the lines that the next tile adds to this one's.
  void prefetch_next(int64_t c) const {
    const char* const last = reinterpret_cast<const char*>(x_ + next_ + source_[c] + tile) - 1;
    constexpr int64_t bytes = tile * sizeof(T);
    for (int64_t back = 0; back < bytes + 63; back += 64) prefetch(last - back);
  }

 private:
  using Masks = std::array<std::array<__mmask16, 4>, 2>;  // of the strips, in either image
  enum Way { straight, careful, split };                  // whole loads of one run; masked ones; two of them to a strip

  void mask_groups(int v, int i, const Strip& strip, bool any) {
    if (!any) {
      for (Masks& masks : masks_) masks[i][v] = 0;
      return;
    }
    const Places at(strip.pixel[i], p_);
    const auto inside = [](__mmask16 k, __m512i place, int64_t offset, int64_t size) {
      const __m512i from = _mm512_sub_epi32(place, _mm512_set1_epi32(static_cast<int32_t>(offset)));
      return _mm512_mask_cmplt_epu32_mask(k, from, _mm512_set1_epi32(static_cast<int32_t>(size)));
    };
    for (size_t g = 0; g < masks_.size(); ++g) {
      const Offset& o = p_.groups[g];
      const __mmask16 in_h = inside(strip.mask[i], at.h, o.h, p_.h.size), in_w = inside(in_h, at.w, o.w, p_.w.size);
      masks_[g][i][v] = inside(in_w, at.d, o.d, p_.d.size);
    }
  }

  const LinearProblem& p_;
  const T* x_;
  int64_t volume_;
  std::vector<int64_t> source_;  // of a channel's pixel 0 in image 0
  std::vector<Masks> masks_;     // of a group of channels
  std::array<std::array<int64_t, 2>, strips> base_{};
  int64_t next_ = 0, low_ = 0, high_ = 0;
  Way way_ = careful;
};

// Reads any positions of a plane, sixteen at a time, by whole vectors that are permuted, or one by one.
template <class T>
class GatherReader {
 public:
  GatherReader(const LinearProblem& p, const SourceTables& tables, const T* x)
      : p_(p), tables_(tables), x_(x), volume_(p.in_volume()), groups_(static_cast<int64_t>(p.groups.size())),
        per_image_((p.out_volume() + lanes - 1) / lanes) {
    keeps_ = per_image_ * groups_ * int64_t{sizeof(View)} <= (1 << 18);
    slots_.resize(keeps_ ? per_image_ : strips);
    views_.resize(slots_.size() * groups_);
  }

  template <int width>
  void open(const std::array<Strip, width>& tile, const Strip& next) {
    for (int v = 0; v < width; ++v) {
      at_[v] = keeps_ ? tile[v].pixel[0] / lanes : v;
      base_[v] = tile[v].image[0] * p_.channels * volume_;
      Slot& slot = slots_[at_[v]];
      if (!keeps_ || !slot.loads) look(slot, at_[v], tile[v]);
      const bool inside = base_[v] + (p_.channels - 1) * volume_ + slot.end <= p_.images * p_.channels * volume_;
      loads_[v] = inside ? slot.loads : scattered;
    }
    next_ = next;
  }

  // Calls body(fetch, first) until all strips were fetched; fetch(channel) is what some of them read, from `first` on.
  template <int width, class Body>
  void read(const Body& body) const {
    for (int v = 0; v < width; ++v) {
      if (loads_[v] == 1)
        read_strip<1>(v, body);
      else if (loads_[v] == 2)
        read_strip<2>(v, body);
      else if (loads_[v] == 4)
        read_strip<4>(v, body);
      else
        read_strip<scattered>(v, body);
    }
  }

  // Fetch what the next tile reads, as far as that is known.
  void prefetch_next(int64_t c) const {
    if (!keeps_) return;
    int64_t slot = next_.pixel[0] / lanes, image = next_.image[0];
    for (int v = 0; v < strips; ++v) {
      if (slots_[slot].loads) prefetch_view(views_[slot * groups_ + p_.of_channel[c]], c, image);
      if (++slot < per_image_) continue;
      slot = 0;
      image = std::min(image + 1, p_.images - 1);
    }
  }

  // Fetch what pixels from `pixel` on will read, as far as that is known.
  void prefetch_span(int64_t c, int64_t image, int64_t pixel, int64_t count) const {
    if (!keeps_ || c >= p_.channels) return;
    const int64_t end = std::min(per_image_, (pixel + count) / lanes);
    for (int64_t slot = pixel / lanes; slot < end; ++slot)
      if (slots_[slot].loads) prefetch_view(views_[slot * groups_ + p_.of_channel[c]], c, image);
  }

 private:
  struct View {  // of a strip, by a group of channels
    __m512i index;  // of each lane, from `first` on
    int64_t first, span;
    __mmask16 valid;
  };
  struct Slot {  // of a strip, for all groups
    int loads = 0;
    int64_t end = 0;  // of what is loaded, from the beginning of the plane
  };
  static constexpr int scattered = 5;

  void look(Slot& slot, int64_t at, const Strip& strip) {
    const Places places(strip.pixel[0], p_);
    int64_t span = 1, first = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const View& view = views_[at * groups_ + g] = look(places, strip.mask[0], g);
      span = std::max(span, view.span);
      first = std::max(first, view.first);
    }
    const int64_t loads = (span + lanes - 1) / lanes;
    slot.loads = loads <= 2 ? static_cast<int>(loads) : loads <= 4 ? 4 : scattered;
    slot.end = first + slot.loads * lanes;
  }

  View look(const Places& at, __mmask16 mask, int64_t g) const {
    const auto source = [&](const SourceTable& table, __m512i place) {
      return _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), mask, place, table.of_group(g), 4);
    };
    const auto times = [](__m512i a, int64_t b) {
      return _mm512_mullo_epi32(a, _mm512_set1_epi32(static_cast<int32_t>(b)));
    };
    const __m512i d = source(tables_.d, at.d), h = source(tables_.h, at.h), w = source(tables_.w, at.w);
    const __m512i index = _mm512_add_epi32(times(_mm512_add_epi32(times(d, p_.h.size), h), p_.w.size), w);
    View view{index, 0, 0, static_cast<__mmask16>(~_mm512_movepi32_mask(_mm512_or_si512(_mm512_or_si512(d, h), w)))};
    if (!view.valid) return view;
    view.first = _mm512_mask_reduce_min_epi32(view.valid, index);
    view.span = _mm512_mask_reduce_max_epi32(view.valid, index) - view.first + 1;
    view.index = _mm512_sub_epi32(index, _mm512_set1_epi32(static_cast<int32_t>(view.first)));
    return view;
  }

  void prefetch_view(const View& view, int64_t c, int64_t image) const {
    const char* const from = reinterpret_cast<const char*>(x_ + (image * p_.channels + c) * volume_ + view.first);
    const int64_t bytes = std::min<int64_t>(view.span, 4 * lanes) * sizeof(T);
    for (int64_t at = 0; at < bytes + 63; at += 64) prefetch(from + at);
  }

  template <int loads, class Body>
  void read_strip(int v, const Body& body) const {
    const View* const views = views_.data() + at_[v] * groups_;
    const T* const image = x_ + base_[v];
    body([views, image, group = p_.of_channel.data(), volume = volume_](int64_t c) __attribute__((always_inline)) {
      const View& view = views[group[c]];
      return std::array<__m512i, 1>{fetch<loads>(view, image + c * volume + view.first)};
    }, v);
  }

  template <int loads>
  static __m512i fetch(const View& view, const T* from) {
    const __mmask16 all = 0xffff, valid = view.valid;
    if constexpr (loads == scattered) {
      alignas(64) int32_t index[lanes], values[lanes];
      _mm512_store_si512(index, view.index);
      for (int i = 0; i < lanes; ++i) {
        values[i] = 0;
        if (valid >> i & 1) std::memcpy(&values[i], from + index[i], sizeof(T));
      }
      return _mm512_load_si512(values);
    }
    const __m512i a = load_whole(all, from);
    if constexpr (loads == 1) return _mm512_maskz_permutexvar_epi32(valid, view.index, a);
    const __m512i low = _mm512_maskz_permutex2var_epi32(valid, a, view.index, load_whole(all, from + lanes));
    if constexpr (loads == 2) return low;
    const __mmask16 upper = _mm512_test_epi32_mask(view.index, _mm512_set1_epi32(2 * lanes)) & valid;
    const __m512i c = load_whole(all, from + 2 * lanes), d = load_whole(all, from + 3 * lanes);
    return _mm512_mask_mov_epi32(low, upper, _mm512_permutex2var_epi32(c, view.index, d));
  }

  const LinearProblem& p_;
  const SourceTables& tables_;
  const T* x_;
  int64_t volume_, groups_, per_image_;
  bool keeps_;  // the views of all strips of an image, which are those of every image
  std::vector<Slot> slots_;
  std::vector<View> views_;
  std::array<int64_t, strips> at_{}, base_{};
  std::array<int, strips> loads_{};
  Strip next_{};
};

}  // namespace shiftconv
#endif
