// shift_linear of channels-last maps: outputs are the lanes. Rows of channels, as the shift brings them together for
// every pixel, are multiplied with the transposed weights.
#pragma once

#include "linear_plain.h"
#include "linear_vector.h"

#if defined(SHIFTCONV_LINEAR_VECTORS)
namespace shiftconv {

// The channels of a shifted pixel, from those of several pixels: by windows of 64 bytes, blended where groups meet.
template <class T>
class RowReader {
 public:
  explicit RowReader(const LinearProblem& p) : p_(p), tables_(p), size_(std::min(window, p.channels)) {
    for (int64_t at = 0; at < p.channels; at += window) {
      const int64_t first = std::min(at, p.channels - size_);
      std::vector<int32_t> seen(p.groups.size(), -1);
      const size_t begin = parts_.size();
      for (int64_t i = 0; i < size_; ++i) {
        const int32_t group = p.of_channel[first + i];
        if (seen[group] < 0) {
          seen[group] = static_cast<int32_t>(parts_.size());
          parts_.push_back({group, 0});
        }
        parts_[seen[group]].mask |= pattern << i * depth_bits;
      }
      windows_.push_back({first, static_cast<int64_t>(parts_.size() - begin)});
    }
    from_.resize(p.groups.size());
    rows_.resize(p.groups.size());
    zeros_.resize(p.channels);
  }

  // All channels of `count` output pixels, from the channels of an input image.
  void read(T* to, const T* image, int64_t pixel, int64_t count) {
    for (const int64_t end = pixel + count; pixel < end;) {
      const int64_t row = pixel / p_.w.count, first = pixel - row * p_.w.count;
      const int64_t last = std::min(p_.w.count, first + end - pixel);
      find_rows(image, row / p_.h.count, row % p_.h.count);
      for (int64_t w = first; w < last; ++w, ++pixel, to += p_.channels) {
        for (size_t g = 0; g < from_.size(); ++g) {
          const int64_t x = rows_[g].columns[w];
          from_[g] = x < 0 || !rows_[g].row ? zeros_.data() : rows_[g].row + x * p_.channels;
        }
        if (size_ == window)
          blend<true>(to);
        else
          blend<false>(to);
      }
    }
  }

 private:
  struct Window {
    int64_t first, parts;
  };
  struct Part {
    int32_t group;
    __mmask32 mask;  // by 16 bits
  };
  struct Row {
    const T* row;  // of the input, or null for zeros
    const int32_t* columns;
  };

  void find_rows(const T* image, int64_t slice, int64_t h) {
    for (size_t g = 0; g < rows_.size(); ++g) {
      const int64_t i = static_cast<int64_t>(g), z = tables_.d.of_group(i)[slice], y = tables_.h.of_group(i)[h];
      rows_[g] = {(z | y) < 0 ? nullptr : image + (z * p_.h.size + y) * p_.w.size * p_.channels, tables_.w.of_group(i)};
    }
  }

  template <bool whole>
  void blend(T* to) const {
    const __mmask32 all = whole ? ~__mmask32{0} : (__mmask32{1} << size_ * depth_bits) - 1;
    const T* const* const from = from_.data();
    const Part* part = parts_.data();
    for (const Window& window : windows_) {
      __m512i bits = _mm512_setzero_si512();
      for (const Part* const end = part + window.parts; part < end; ++part) {
        const T* const at = from[part->group] + window.first;
        bits = _mm512_mask_mov_epi16(bits, part->mask, whole ? load_all(at) : _mm512_maskz_loadu_epi16(all, at));
      }
      _mm512_mask_storeu_epi16(to + window.first, all, bits);
    }
  }

  static constexpr int64_t window = 64 / sizeof(T), depth_bits = sizeof(T) / 2;
  static constexpr __mmask32 pattern = (1u << depth_bits) - 1;

  const LinearProblem& p_;
  SourceTables tables_;
  int64_t size_;
  std::vector<Window> windows_;
  std::vector<Part> parts_;
  std::vector<Row> rows_;        // by group, of the present row
  std::vector<const T*> from_;   // by group, of the present pixel
  std::vector<T> zeros_;
};

template <class T>
class LinearPixels {
 public:
  LinearPixels(const LinearProblem& p, const LinearTensors<T>& t)
      : p_(p), t_(t), depth_((p.channels + depth<T> - 1) / depth<T>), groups_((p.outputs + lanes - 1) / lanes),
        panels_((groups_ + strips - 1) / strips), weight_(scratch<0, __m512i>(panels_ * depth_ * strips)) {
    for (int64_t i = 0; i < panels_; ++i)
      for (int64_t group = begin(i); group < begin(i + 1); ++group)
        pack_weight(weight_ + i * depth_ * strips + group - begin(i), group * lanes);
  }

  void run() const {
    const int64_t volume = p_.out_volume(), blocks = (volume + span - 1) / span;
    parallel_for(p_.images * blocks, p_.channels * p_.outputs * 4, [&](int64_t begin, int64_t end) {
      RowReader<T> reader(p_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / blocks, pixel = i % blocks * span, count = std::min(span, volume - pixel);
        const T* rows = t_.x + (image * volume + pixel) * p_.channels;
        if (!p_.is_still() || count < span) rows = gather(reader, image, pixel, count);
        for (int64_t panel = 0; panel < panels_; ++panel) run_panel(rows, image * volume + pixel, count, panel);
      }
    });
  }

 private:
  static constexpr int64_t span = 48;  // pixels

  int64_t begin(int64_t panel) const { return panel * groups_ / panels_; }

  // Sixteen outputs of the weights, one row per channel, or per two of bfloat16.
  void pack_weight(__m512i* to, int64_t output) {
    for (int64_t k = 0; k < depth_; k += lanes) {
      std::array<__m512i, lanes> row;
      const int64_t c = k * depth<T>, words = (p_.channels - c) * int64_t{sizeof(T)} / 2;
      const __mmask32 mask = words >= 32 ? ~__mmask32{0} : (__mmask32{1} << words) - 1;
      for (int64_t i = 0; i < lanes; ++i)
        row[i] = _mm512_maskz_loadu_epi16(output + i < p_.outputs ? mask : 0,
                                          t_.weight + std::min(output + i, p_.outputs - 1) * p_.channels + c);
      transpose(row);
      for (int64_t i = 0; i < std::min(lanes, depth_ - k); ++i) to[(k + i) * strips] = row[i];
    }
  }

  const T* gather(RowReader<T>& reader, int64_t image, int64_t pixel, int64_t count) const {
    T* const rows = scratch<1, T>(span * p_.channels);
    const T* const from = t_.x + image * p_.in_volume() * p_.channels;
    reader.read(rows, from, pixel, count);
    std::fill(rows + count * p_.channels, rows + span * p_.channels, T{});
    return rows;
  }

  void run_panel(const T* rows, int64_t pixel, int64_t count, int64_t panel) const {
    const int64_t width = begin(panel + 1) - begin(panel);
    if (width == 3)
      run_blocks<8, 3>(rows, pixel, count, panel);
    else if (width == 2)
      run_blocks<12, 2>(rows, pixel, count, panel);
    else
      run_blocks<24, 1>(rows, pixel, count, panel);
  }

  template <int height, int width>
  void run_blocks(const T* rows, int64_t pixel, int64_t count, int64_t panel) const {
    const int64_t output = begin(panel) * lanes, channels = p_.channels, outputs = p_.outputs;
    const __m512i* const weight = weight_ + panel * depth_ * strips;
    const T* const residual = t_.residual;
    T* const y = t_.y;
    __mmask16 mask[width];
    for (int v = 0; v < width; ++v) mask[v] = first_lanes(outputs - output - v * lanes);
    for (int64_t first = 0; first < count; first += height) {
      __m512 sum[height][width];
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        const __m512 bias = t_.bias ? load_floats(mask[v], t_.bias + output + v * lanes) : _mm512_setzero_ps();
#pragma GCC unroll 24
        for (int i = 0; i < height; ++i) sum[i][v] = bias;
      }
      multiply<T, height, width>(sum, rows + first * channels, channels, weight, channels);
      T* const to = y + (pixel + first) * outputs + output;
      const bool clip = t_.relu;
#pragma GCC unroll 24
      for (int i = 0; i < height; ++i) {
        if (first + i >= count) break;
#pragma GCC unroll 4
        for (int v = 0; v < width; ++v) {
          const int64_t at = i * outputs + v * lanes;
          __m512 value = clip ? relu(sum[i][v]) : sum[i][v];
          if (residual) value = _mm512_add_ps(value, load_floats(mask[v], residual + (to - y) + at));
          store_floats(to + at, mask[v], value);
        }
      }
    }
  }

  const LinearProblem& p_;
  const LinearTensors<T>& t_;
  int64_t depth_, groups_, panels_;  // rows of a panel; sixteens of outputs; panels of up to three of them
  __m512i* weight_;
};

}  // namespace shiftconv
#endif
