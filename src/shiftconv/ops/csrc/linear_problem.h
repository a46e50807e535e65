// What shift_linear is asked to compute: sizes, strides, and the channels that read the same places.
#pragma once

#include <cstdint>
#include <vector>

#include "shift_map.h"
#include "tensor.h"

namespace shiftconv {

// One spatial axis: `count` positions of the output, `step` apart on the `size` positions of the input.
struct LinearAxis {
  int64_t size = 1, count = 1, step = 1;

  int64_t period(Padding padding) const {
    switch (padding) {
      case Padding::circular:
        return size;
      case Padding::reflect:
        return std::max<int64_t>(2 * size - 2, 1);
      case Padding::symmetric:
        return 2 * size;
      default:
        return 0;
    }
  }

  // The smallest offset that does the same.
  int64_t normal(int64_t offset, Padding padding) const {
    if (const int64_t p = period(padding)) return offset % p;
    const int64_t reach = count * step + size;  // from beyond, nothing inside is read
    return std::clamp(offset, -reach, reach);
  }

  // The position that x~ shows at `at`, -1 for zero.
  int64_t fold(int64_t at, Padding padding) const {
    if (padding == Padding::zeros) return 0 <= at && at < size ? at : -1;
    if (padding == Padding::replicate) return std::clamp<int64_t>(at, 0, size - 1);
    const int64_t p = period(padding);
    at %= p;
    if (at < 0) at += p;
    if (padding == Padding::reflect) return std::min(at, p - at);
    if (padding == Padding::symmetric) return std::min(at, p - 1 - at);
    return at;
  }
};

struct Offset {
  int64_t d, h, w;
  bool operator==(const Offset&) const = default;
};

struct LinearProblem {
  int64_t images, channels, outputs;
  LinearAxis d, h, w;
  Padding padding;
  std::vector<Offset> groups;       // the distinct offsets
  std::vector<int32_t> of_channel;  // which of them a channel has

  int64_t in_volume() const { return d.size * h.size * w.size; }
  int64_t out_volume() const { return d.count * h.count * w.count; }
  bool is_linear() const { return padding == Padding::zeros && d.step == 1 && h.step == 1 && w.step == 1; }
  bool is_still() const { return groups.size() == 1 && groups[0] == Offset{0, 0, 0} && is_linear(); }

  // Of a map that is not shifted.
  explicit LinearProblem(const Tensor& x) : outputs(0), padding(Padding::zeros) {
    const Shape s = shape_of(x);
    images = s.n;
    channels = s.c;
    d = {s.d, s.d, 1};
    h = {s.h, s.h, 1};
    w = {s.w, s.w, 1};
    groups = {{0, 0, 0}};
    of_channel.assign(channels, 0);
  }

  LinearProblem(const Tensor& x, const Tensor& offset, int64_t outputs, int64_t mode, const int64_t* stride)
      : outputs(outputs), padding(static_cast<Padding>(mode)) {
    const Shape s = shape_of(x);
    const int64_t axes = x.dim() - 2;
    images = s.n;
    channels = s.c;
    const int64_t sizes[3] = {s.d, s.h, s.w};
    for (int64_t axis = 3 - axes; axis < 3; ++axis) {
      const int64_t step = stride[axis - 3 + axes];
      STD_TORCH_CHECK(step >= 1, "expected strides of at least 1, got ", step);
      (axis == 0 ? d : axis == 1 ? h : w) = {sizes[axis], (sizes[axis] + step - 1) / step, step};
    }
    if (in_volume() == 0) return;
    group(static_cast<const int64_t*>(offset.const_data_ptr()), offset.stride(0), offset.stride(1), axes);
  }

 private:
  void group(const int64_t* offset, int64_t row, int64_t column, int64_t axes) {
    uint64_t capacity = 16;
    while (capacity < 2 * static_cast<uint64_t>(channels)) capacity *= 2;
    std::vector<int32_t> table(capacity, -1);
    of_channel.resize(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t* const o = offset + c * row + (axes - 1) * column;
      const Offset here{axes > 2 ? d.normal(o[-2 * column], padding) : 0, axes > 1 ? h.normal(o[-column], padding) : 0,
                        w.normal(o[0], padding)};
      uint64_t at = ((here.d * 31 + here.h) * 8191 + here.w) * uint64_t{0x9E3779B97F4A7C15} >> 32 & (capacity - 1);
      while (table[at] >= 0 && !(groups[table[at]] == here)) at = (at + 1) & (capacity - 1);
      if (table[at] < 0) {
        table[at] = static_cast<int32_t>(groups.size());
        groups.push_back(here);
      }
      of_channel[c] = table[at];
    }
  }
};

// For every distinct offset of one axis, the position of the input that each position of the output reads.
class SourceTable {
 public:
  SourceTable(const LinearProblem& p, const LinearAxis& axis, int64_t Offset::* component) : count_(axis.count) {
    for (const Offset& offset : p.groups) {
      const int64_t o = offset.*component;
      size_t known = 0;
      while (known < offsets_.size() && offsets_[known] != o && known < 64) ++known;
      if (known == offsets_.size() || known == 64) {
        known = offsets_.size();
        offsets_.push_back(o);
        for (int64_t i = 0; i < count_; ++i)
          items_.push_back(static_cast<int32_t>(axis.fold(i * axis.step - o, p.padding)));
      }
      start_.push_back(static_cast<int64_t>(known) * count_);
    }
  }
  const int32_t* of_group(int64_t g) const { return items_.data() + start_[g]; }

 private:
  int64_t count_;
  std::vector<int64_t> offsets_, start_;
  std::vector<int32_t> items_;
};

struct SourceTables {
  SourceTable d, h, w;
  explicit SourceTables(const LinearProblem& p)
      : d(p, p.d, &Offset::d), h(p, p.h, &Offset::h), w(p, p.w, &Offset::w) {}
};

}  // namespace shiftconv
