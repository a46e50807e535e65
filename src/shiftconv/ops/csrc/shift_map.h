// Along one axis: which positions of the input each position of the output reads, for every distinct offset.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

namespace shiftconv {

enum class Padding : int64_t { zeros, replicate, circular, reflect, symmetric };

// Positions [begin, end) read exactly position + delta; the few others have lists.
struct AxisMap {
  int64_t begin = 0, end = 0, delta = 0, size = 0;
  const int64_t* first = nullptr;  // by rank; list of rank r is item[first[r]] .. item[first[r + 1]]
  const int64_t* item = nullptr;
  bool sums = false;  // some list is longer than one, which happens in the transpose only

  bool inside(int64_t position) const { return begin <= position && position < end; }
  int64_t specials() const { return size - (end - begin); }
  int64_t special(int64_t rank) const { return rank < begin ? rank : rank - begin + end; }
  int64_t rank(int64_t position) const { return position < begin ? position : position - end + begin; }
  int64_t count(int64_t position) const {
    return inside(position) ? 1 : first[rank(position) + 1] - first[rank(position)];
  }
  int64_t source(int64_t position, int64_t k = 0) const {
    return inside(position) ? position + delta : item[first[rank(position)] + k];
  }
};

// The maps of all channels on one axis; channels of equal offset share one, at least while offsets are small.
class AxisMaps {
 public:
  AxisMaps(const int64_t* offset, int64_t stride, int64_t channels, int64_t size, Padding padding, bool transpose)
      : size_(size), padding_(padding), transpose_(transpose), which_(channels) {
    int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t o = normal(offset[c * stride]);
      which_[c] = o;
      low = std::min(low, o);
      high = std::max(high, o);
    }
    const bool share = channels > 0 && high - low < 16 * channels + 64;
    std::vector<int64_t> known(share ? high - low + 1 : 0, -1);
    for (int64_t& entry : which_) {
      const int64_t o = entry;
      if (share && known[o - low] >= 0) {
        entry = known[o - low];
        continue;
      }
      entry = static_cast<int64_t>(maps_.size());
      if (share) known[o - low] = entry;
      build(o);
    }
    for (size_t i = 0; i < maps_.size(); ++i) {
      maps_[i].first = pool_.data() + start_[2 * i];
      maps_[i].item = pool_.data() + start_[2 * i + 1];
      sums_ = sums_ || maps_[i].sums;
    }
  }

  const AxisMap& operator[](int64_t channel) const { return maps_[which_[channel]]; }
  int64_t which(int64_t channel) const { return which_[channel]; }
  int64_t distinct() const { return static_cast<int64_t>(maps_.size()); }
  bool sums() const { return sums_; }

 private:
  // The smallest offset that does the same; at most `size` either way, so that one fold finds every source.
  int64_t normal(int64_t o) const {
    int64_t period = size_;
    switch (padding_) {
      case Padding::zeros:
      case Padding::replicate:
        return std::clamp(o, -size_, size_);
      case Padding::circular:
        break;
      case Padding::reflect:
        period = std::max<int64_t>(2 * size_ - 2, 1);
        break;
      case Padding::symmetric:
        period = 2 * size_;
    }
    o %= period;
    return 2 * o > period ? o - period : 2 * o < -period ? o + period : o;
  }

  // What position p of S x reads when it lies in the border, -1 for nothing.
  int64_t fold(int64_t p, int64_t o) const {
    const int64_t at = p - o;
    switch (padding_) {
      case Padding::zeros:
        return -1;
      case Padding::replicate:
        return at < 0 ? 0 : size_ - 1;
      case Padding::circular:
        return at < 0 ? at + size_ : at - size_;
      case Padding::reflect:
        return at < 0 ? -at : 2 * (size_ - 1) - at;
      case Padding::symmetric:
        return at < 0 ? -1 - at : 2 * size_ - 1 - at;
    }
    return -1;
  }

  void build(int64_t o) {
    const int64_t begin = std::min(size_, std::max<int64_t>(0, o)), end = std::max(begin, std::min(size_, size_ + o));
    AxisMap map{begin, end, -o, size_};
    start_.push_back(pool_.size());
    if (transpose_)
      build_transpose(map, o);
    else
      build_forward(map, o);
    maps_.push_back(map);
  }

  void build_forward(AxisMap& map, int64_t o) {
    const int64_t specials = map.specials();
    const size_t first = pool_.size();
    pool_.resize(first + specials + 1);
    start_.push_back(pool_.size());
    for (int64_t r = 0; r < specials; ++r) {
      pool_[first + r] = static_cast<int64_t>(pool_.size() - start_.back());
      const int64_t source = fold(map.special(r), o);
      if (source >= 0) pool_.push_back(source);
    }
    pool_[first + specials] = static_cast<int64_t>(pool_.size() - start_.back());
  }

  // S' adds at q what S reads from q: p = q + o if p is no border, and the border positions that fold onto q.
  void build_transpose(AxisMap& map, int64_t o) {
    const AxisMap forward = map;
    const int64_t direct_begin = forward.begin - o, direct_end = forward.end - o;
    map.delta = o;
    map.begin = direct_begin;
    map.end = direct_end;
    for (int64_t r = 0; r < forward.specials(); ++r) {
      const int64_t p = forward.special(r), q = fold(p, o);
      if (q < direct_begin || q >= direct_end) continue;
      if (p < forward.begin)
        map.begin = std::max(map.begin, q + 1);
      else
        map.end = std::min(map.end, q);
    }
    if (map.begin >= map.end) map.begin = map.end = 0;

    const int64_t specials = map.specials();
    const size_t first = pool_.size();
    pool_.resize(first + specials + 1, 0);
    start_.push_back(pool_.size());
    const auto direct = [&](int64_t q) { return direct_begin <= q && q < direct_end; };
    int64_t* count = pool_.data() + first;
    for (int64_t r = 0; r < specials; ++r) count[r + 1] = direct(map.special(r));
    for (int64_t r = 0; r < forward.specials(); ++r) {
      const int64_t q = fold(forward.special(r), o);
      if (q >= 0) ++count[map.rank(q) + 1];
    }
    for (int64_t r = 0; r < specials; ++r) {
      map.sums = map.sums || count[r + 1] > 1;
      count[r + 1] += count[r];
    }
    const int64_t total = count[specials];
    pool_.resize(pool_.size() + total);
    int64_t* const start = pool_.data() + first;
    int64_t* const item = pool_.data() + start_.back();
    std::vector<int64_t> filled(start, start + specials);
    for (int64_t r = 0; r < specials; ++r)
      if (direct(map.special(r))) item[filled[r]++] = map.special(r) + o;
    for (int64_t r = 0; r < forward.specials(); ++r) {
      const int64_t p = forward.special(r), q = fold(p, o);
      if (q >= 0) item[filled[map.rank(q)]++] = p;
    }
  }

  int64_t size_;
  Padding padding_;
  bool transpose_;
  bool sums_ = false;
  std::vector<int64_t> which_;
  std::vector<AxisMap> maps_;
  std::vector<size_t> start_;  // two per map: its lists' bounds and its items, in pool_
  std::vector<int64_t> pool_;
};

// Channels that have the same offset on every axis, and so read the same places.
struct Group {
  const AxisMap *d, *h, *w;
  std::vector<int32_t> channels;
};

struct Groups {
  std::vector<Group> list;
  std::vector<int32_t> of_channel;

  Groups(int64_t channels, const AxisMaps& d, const AxisMaps& h, const AxisMaps& w) : of_channel(channels) {
    const int64_t heights = h.distinct(), widths = w.distinct(), kinds = d.distinct() * heights * widths;
    const bool small = kinds <= 16 * channels + 64;
    std::vector<int32_t> table(small ? kinds : 0, -1);
    std::unordered_map<int64_t, int32_t> map;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t kind = (d.which(c) * heights + h.which(c)) * widths + w.which(c);
      int32_t& g = small ? table[kind] : map.try_emplace(kind, -1).first->second;
      if (g < 0) {
        g = static_cast<int32_t>(list.size());
        list.push_back({&d[c], &h[c], &w[c], {}});
      }
      list[g].channels.push_back(static_cast<int32_t>(c));
      of_channel[c] = g;
    }
  }

  int64_t count() const { return static_cast<int64_t>(list.size()); }
};

}  // namespace shiftconv
