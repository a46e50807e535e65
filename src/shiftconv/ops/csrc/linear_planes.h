// shift_linear of channels-first maps: pixels are the lanes. A tile of the shifted map is packed, then every block of
// eight outputs is a product of rows of the weights, as they lie, with the tile.
#pragma once

#include "linear_plain.h"
#include "linear_strips.h"

#if defined(SHIFTCONV_LINEAR_VECTORS)
namespace shiftconv {

constexpr int64_t block = 8;  // outputs

// Packed pixels: a row of `strips` vectors per channel, or per two channels of bfloat16.
template <int width, class T, class Reader>
void pack_channels(__m512i* panel, const Reader& reader, int64_t channels) {
  reader.template read<width>([=](auto fetch, int first) {
    __m512i* to = panel + first;
    for (int64_t c = 0; c < channels; c += depth<T>, to += strips) {
      auto strip = fetch(c);
      if (depth<T> == 2 && c + 1 < channels) {
        const auto other = fetch(c + 1);
#pragma GCC unroll 4
        for (size_t v = 0; v < strip.size(); ++v)
          strip[v] = _mm512_or_si512(strip[v], _mm512_slli_epi32(other[v], 16));
      }
#pragma GCC unroll 4
      for (size_t v = 0; v < strip.size(); ++v) to[v] = strip[v];
    }
  });
}

// Rows of a matrix in blocks; the last one is filled up with rows of zeros.
template <class T>
class PaddedRows {
 public:
  PaddedRows(const T* rows, int64_t count, int64_t length)
      : rows_(rows), whole_(count / block * block), length_(length) {
    if (whole_ == count) return;
    rest_.assign(block * length, T{});
    std::copy(rows + whole_ * length, rows + count * length, rest_.begin());
  }
  const T* row(int64_t i) const { return i < whole_ ? rows_ + i * length_ : rest_.data(); }

 private:
  const T* rows_;
  int64_t whole_, length_;
  std::vector<T> rest_;
};

template <class T>
class LinearPlanes {
 public:
  LinearPlanes(const LinearProblem& p, const LinearTensors<T>& t)
      : p_(p), t_(t), volume_(p.out_volume()), all_(p), weight_(t.weight, p.outputs, p.channels) {}

  void run() const {
    if (p_.is_linear()) return run_with([&] { return LinearReader<T>(p_, t_.x); });
    const SourceTables tables(p_);
    run_with([&] { return GatherReader<T>(p_, tables, t_.x); });
  }

 private:
  template <class Make>
  void run_with(const Make& make) const {
    const int64_t tiles = (all_.count() + strips - 1) / strips;
    parallel_for(tiles, std::max<int64_t>(1, p_.channels * p_.outputs * 4), [&](int64_t begin, int64_t end) {
      auto reader = make();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * strips, left = all_.count() - first;
        const Strip next = all_[std::min(first + strips, all_.count() - 1)];
        if (left >= 3)
          run_tile<3>(reader, first, next);
        else if (left == 2)
          run_tile<2>(reader, first, next);
        else
          run_tile<1>(reader, first, next);
      }
    });
  }

  template <int width, class Reader>
  void run_tile(Reader& reader, int64_t first, const Strip& next) const {
    std::array<Strip, width> tile;
    for (int v = 0; v < width; ++v) tile[v] = all_[first + v];
    reader.template open<width>(tile, next);
    __m512i* const panel = scratch<0, __m512i>((p_.channels + 1) / depth<T> * strips);
    pack_channels<width, T>(panel, reader, p_.channels);
    int64_t c = 0;
    for (int64_t o = 0; o < p_.outputs; o += block) {
      const int64_t end = std::min(p_.channels, p_.channels * (o + block) / p_.outputs);
      for (; c < end; ++c) reader.prefetch_next(c);
      prefetch_outputs(tile[0], o);
      run_block<width>(tile, weight_.row(o), panel, o);
    }
  }

  void prefetch_outputs(const Strip& strip, int64_t o) const {
    const T* to = t_.y + (strip.image[0] * p_.outputs + o) * volume_ + strip.pixel[0];
    for (int i = 0; i < block; ++i, to += volume_)
      for (int64_t j = 0; j < tile; j += 64 / sizeof(T)) prefetch_write(to + j);
  }

  template <int width>
  void run_block(const std::array<Strip, width>& tile, const T* weight, const __m512i* panel, int64_t o) const {
    __m512 sum[block][width];
    const int64_t rows = std::min(block, p_.outputs - o);
#pragma GCC unroll 8
    for (int i = 0; i < block; ++i) {
      const float start = t_.bias && i < rows ? static_cast<float>(t_.bias[o + i]) : 0;
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) sum[i][v] = _mm512_set1_ps(start);
    }
    multiply<T, block, width>(sum, weight, p_.channels, panel, p_.channels);
    if (t_.relu) {
#pragma GCC unroll 8
      for (int i = 0; i < block; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < width; ++v) sum[i][v] = relu(sum[i][v]);
    }
    const int64_t volume = volume_;  // every store could change what is no local variable, for all the compiler knows
    const T* const residual = t_.residual;
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) {
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        const __mmask16 mask = tile[v].mask[part];
        if (part == 1 && !mask) continue;
        const int64_t at = (tile[v].image[part] * p_.outputs + o) * volume + tile[v].pixel[part];
        T* const to = t_.y + at;
#pragma GCC unroll 8
        for (int i = 0; i < block; ++i) {
          if (i >= rows) break;
          const __m512 more = residual ? load_floats(mask, residual + at + i * volume) : _mm512_setzero_ps();
          store_floats(to + i * volume, mask, residual ? _mm512_add_ps(sum[i][v], more) : sum[i][v]);
        }
      }
    }
  }

  const LinearProblem& p_;
  const LinearTensors<T>& t_;
  const int64_t volume_;
  Strips all_;
  PaddedRows<T> weight_;
};

}  // namespace shiftconv
#endif
