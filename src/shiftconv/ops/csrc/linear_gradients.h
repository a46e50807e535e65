// Gradients of shift_linear on channels-first maps: to x where zeros pad and no stride cuts, and to the weights.
#pragma once

#include "linear_planes.h"

#if defined(SHIFTCONV_LINEAR_VECTORS)
namespace shiftconv {

// grad_x = S' (W' grad): tiles of W' grad go where the shift has read from, and the rest of the plane is zero.
template <class T>
class LinearInputGradient {
 public:
  // `still` describes grad [N, O, *S], `p` x; weight is [C, O].
  LinearInputGradient(const LinearProblem& p, const LinearProblem& still, const T* grad, const T* weight, T* to)
      : p_(p), still_(still), grad_(grad), to_(to), all_(still), weight_(weight, p.channels, still.channels) {
    for (const Offset& o : p.groups) border_.push_back(border(o));
  }

  void run() const {
    const int64_t tiles = (all_.count() + strips - 1) / strips;
    parallel_for(tiles, std::max<int64_t>(1, p_.channels * still_.channels * 4), [&](int64_t begin, int64_t end) {
      LinearReader<T> reader(still_, grad_), target(p_, to_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * strips, left = all_.count() - first;
        const Strip next = all_[std::min(first + strips, all_.count() - 1)];
        if (left >= 3)
          run_tile<3>(reader, target, first, next);
        else if (left == 2)
          run_tile<2>(reader, target, first, next);
        else
          run_tile<1>(reader, target, first, next);
      }
    });
  }

 private:
  template <int width>
  void run_tile(LinearReader<T>& reader, LinearReader<T>& target, int64_t first, const Strip& next) const {
    std::array<Strip, width> tile;
    for (int v = 0; v < width; ++v) {
      tile[v] = all_[first + v];
      if (tile[v].mask[0] && tile[v].pixel[0] == 0) clear_border(tile[v].image[0]);
      if (tile[v].mask[1]) clear_border(tile[v].image[1]);  // it begins there
    }
    reader.template open<width>(tile, next);
    target.template open<width>(tile, next);
    __m512i* const panel = scratch<0, __m512i>((still_.channels + 1) / depth<T> * strips);
    pack_channels<width, T>(panel, reader, still_.channels);
    int64_t o = 0;
    for (int64_t c = 0; c < p_.channels; c += block) {
      for (const int64_t end = still_.channels * (c + block) / p_.channels; o < std::min(end, still_.channels); ++o)
        reader.prefetch_next(o);
      __m512 sum[block][width] = {};
      for (int64_t i = 0; i < std::min(block, p_.channels - c); ++i) target.prefetch_here(c + i);
      multiply<T, block, width>(sum, weight_.row(c), still_.channels, panel, still_.channels);
#pragma GCC unroll 8
      for (int i = 0; i < block; ++i)
        if (c + i < p_.channels) target.template store<width>(to_, c + i, sum[i]);
    }
  }

  // Zero where no pixel of the output has read.
  void clear_border(int64_t image) const {
    T* plane = to_ + image * p_.channels * p_.in_volume();
    for (int64_t c = 0; c < p_.channels; ++c, plane += p_.in_volume())
      for (const Run& run : border_[p_.of_channel[c]]) {
        if (run.size == 1)
          plane[run.at] = T{};
        else
          std::fill_n(plane + run.at, run.size, T{});
      }
  }

  struct Run {
    int64_t at, size;
  };

  // The pixels of a plane with this offset that no pixel of the output has read.
  std::vector<Run> border(const Offset& o) const {
    const auto inner = [](const LinearAxis& axis, int64_t offset) {
      const int64_t begin = std::clamp<int64_t>(-offset, 0, axis.size);
      return std::pair(begin, std::max(begin, std::clamp<int64_t>(axis.size - offset, 0, axis.size)));
    };
    const auto d = inner(p_.d, o.d), h = inner(p_.h, o.h), w = inner(p_.w, o.w);
    std::vector<Run> runs;
    const auto add = [&](int64_t begin, int64_t end) {
      if (begin >= end) return;
      if (!runs.empty() && runs.back().at + runs.back().size == begin)
        runs.back().size = end - runs.back().at;
      else
        runs.push_back({begin, end - begin});
    };
    int64_t row = 0;
    for (int64_t z = 0; z < p_.d.size; ++z)
      for (int64_t y = 0; y < p_.h.size; ++y, row += p_.w.size) {
        const bool read = d.first <= z && z < d.second && h.first <= y && y < h.second;
        add(row, row + (read ? w.first : p_.w.size));
        if (read) add(row + w.second, row + p_.w.size);
      }
    return runs;
  }

  const LinearProblem &p_, &still_;
  const T* grad_;
  T* to_;
  Strips all_;
  PaddedRows<T> weight_;
  std::vector<std::vector<Run>> border_;  // by group of channels
};

// grad_weight = grad x~', summed over images and pixels, and the sum of grad: channels of x are the lanes.
template <class T>
class LinearWeightGradient {
 public:
  LinearWeightGradient(const LinearProblem& p, const T* x, const T* grad, T* weight, T* bias)
      : p_(p), x_(x), grad_(grad), weight_(weight), bias_(bias), tables_(p), volume_(p.out_volume()),
        groups_((p.channels + lanes - 1) / lanes), panels_((groups_ + strips - 1) / strips) {}

  void run() const {
    if (p_.is_linear()) return run_with([&] { return LinearReader<T>(p_, x_); });
    run_with([&] { return GatherReader<T>(p_, tables_, x_); });
  }

 private:
  static constexpr int64_t span = 64 * depth<T>;  // pixels that are summed in registers

  template <class Make>
  void run_with(const Make& make) const {
    const int64_t splits = std::max<int64_t>(1, p_.outputs / 64);
    const int64_t work = p_.images * volume_ * p_.channels * p_.outputs / (panels_ * splits);
    parallel_for(panels_ * splits, std::max<int64_t>(1, work / 4), [&](int64_t begin, int64_t end) {
      auto reader = make();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / splits, first = panel * groups_ / panels_, last = (panel + 1) * groups_ / panels_;
        const int64_t blocks = (p_.outputs + block - 1) / block, split = i % splits;
        const Range range{first * lanes, split * blocks / splits * block,
                          std::min(p_.outputs, (split + 1) * blocks / splits * block)};
        if (last - first == 3)
          run_panel<3>(reader, range);
        else if (last - first == 2)
          run_panel<2>(reader, range);
        else
          run_panel<1>(reader, range);
      }
    });
  }

  struct Range {
    int64_t channel, output, outputs_end;
  };

  template <int width, class Reader>
  void run_panel(Reader& reader, const Range& r) const {
    const int64_t blocks = (r.outputs_end - r.output + block - 1) / block;
    __m512* const sums = scratch<1, __m512>(blocks * block * width);
    std::fill(sums, sums + blocks * block * width, _mm512_setzero_ps());
    double* const totals = scratch<3, double>(blocks * block);
    std::fill(totals, totals + blocks * block, 0.0);
    __m512i* const panel = scratch<0, __m512i>(span / depth<T> * strips);
    T* const padded = scratch<2, T>(block * span);
    for (int64_t image = 0; image < p_.images; ++image)
      for (int64_t pixel = 0; pixel < volume_; pixel += span) {
        const int64_t count = std::min(span, volume_ - pixel);
        pack_pixels(panel, reader, width, r.channel, {{image, image}, {pixel, pixel + count}, {}});
        int64_t c = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t o = r.output + b * block, rows = std::min(block, r.outputs_end - o);
          const T* from = grad_ + (image * p_.outputs + o) * volume_ + pixel;
          int64_t stride = volume_;
          prefetch_rows(from + block * volume_, count);
          const bool more = pixel + span < volume_;
          const int64_t next = more ? pixel + span : 0, next_image = std::min(p_.images - 1, image + !more);
          for (const int64_t end = width * lanes * (b + 1) / blocks; c < end; ++c)
            reader.prefetch_span(r.channel + c, next_image, next, std::min(span, volume_ - next) + lanes);
          if (rows < block) {
            std::fill(padded, padded + block * span, T{});
            for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * volume_, count, padded + i * span);
            from = padded;
            stride = span;
          }
          add_block<width>(sums + b * block * width, from, stride, panel, count);
          if (r.channel == 0) add_totals(totals + b * block, from, stride, count);
        }
      }
    for (int64_t o = r.output; o < r.outputs_end; ++o) {
      for (int v = 0; v < width; ++v) {
        const int64_t c = r.channel + v * lanes;
        store_floats(weight_ + o * p_.channels + c, first_lanes(p_.channels - c), sums[(o - r.output) * width + v]);
      }
      if (r.channel == 0) bias_[o] = static_cast<T>(static_cast<float>(totals[o - r.output]));
    }
  }

  template <int width>
  static void add_block(__m512* sums, const T* from, int64_t stride, const __m512i* panel, int64_t count) {
    __m512 sum[block][width];
#pragma GCC unroll 24
    for (int i = 0; i < block * width; ++i) sum[i / width][i % width] = sums[i];
    multiply<T, block, width>(sum, from, stride, panel, count);
#pragma GCC unroll 24
    for (int i = 0; i < block * width; ++i) sums[i] = sum[i / width][i % width];
  }

  static void add_totals(double* totals, const T* from, int64_t stride, int64_t count) {
    __m512 sum[block] = {};
    for (int64_t at = 0; at < count; at += lanes)
#pragma GCC unroll 8
      for (int i = 0; i < block; ++i)
        sum[i] = _mm512_add_ps(sum[i], load_floats(first_lanes(count - at), from + i * stride + at));
    for (int i = 0; i < block; ++i) totals[i] += _mm512_reduce_add_ps(sum[i]);
  }

  void prefetch_rows(const T* from, int64_t count) const {
    for (int i = 0; i < block; ++i, from += volume_)
      for (int64_t at = 0; at < count; at += 64 / sizeof(T)) prefetch(from + at);
  }

  // A row of `strips` vectors per pixel, or per two pixels of bfloat16.
  template <class Reader>
  void pack_pixels(__m512i* panel, Reader& reader, int width, int64_t channel, const Strip& all) const {
    const int64_t image = all.image[0], count = all.pixel[1] - all.pixel[0], pixel = all.pixel[0];
    for (int64_t i = 0; i < count; i += lanes) {
      const Strip strip{{image, image}, {pixel + i, pixel + i}, {first_lanes(count - i), 0}};
      reader.template open<1>({strip}, strip);
      __m512i* const to = panel + i / depth<T> * strips;
      reader.template read<1>([=, channels = p_.channels](auto fetch, int) {
#pragma GCC unroll 1
        for (int v = 0; v < width; ++v) {
          std::array<__m512i, lanes> row;
          const int64_t first = channel + v * lanes;
#pragma GCC unroll 1
          for (int j = 0; j < lanes; ++j) row[j] = first + j < channels ? fetch(first + j)[0] : _mm512_setzero_si512();
          transpose(row);
#pragma GCC unroll 16
          for (int j = 0; j < lanes; j += depth<T>)
            to[j / depth<T> * strips + v] =
                depth<T> == 1 ? row[j] : _mm512_or_si512(row[j], _mm512_slli_epi32(row[j + depth<T> - 1], 16));
        }
      });
    }
  }

  const LinearProblem& p_;
  const T *x_, *grad_;
  T *weight_, *bias_;
  SourceTables tables_;
  int64_t volume_, groups_, panels_;
};

}  // namespace shiftconv
#endif
