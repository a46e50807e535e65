// shift_linear of channels-first maps: pixels are the lanes. A tile of the shifted map is packed, then every block of
// eight outputs is a product of rows of the weights, as they lie, with the tile.
#pragma once

#include "linear_strips.h"

#if defined(SHIFTCONV_LINEAR_VECTORS)
namespace shiftconv {

template <class T>
struct LinearTensors {
  const T* x;
  const T* weight;    // [O, C]
  const T* bias;      // [O] or null
  const T* residual;  // laid out as y, or null
  T* y;
  bool relu;
};

constexpr int64_t block = 8;  // outputs

// Packed pixels: a row of `strips` vectors per channel, or per two channels of bfloat16.
template <int width, class T, class Reader>
void pack_channels(__m512i* panel, const Reader& reader, int64_t channels) {
  reader.template read<width>([&](auto fetch, auto first, auto last) {
    constexpr int begin = first, end = last;
    if constexpr (depth<T> == 1) {
      for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 4
        for (int v = begin; v < end; ++v) panel[c * strips + v] = fetch(v, c);
      }
    } else {
      int64_t c = 0;
      for (; c + 1 < channels; c += 2) {
#pragma GCC unroll 4
        for (int v = begin; v < end; ++v)
          panel[c / 2 * strips + v] = _mm512_or_si512(fetch(v, c), _mm512_slli_epi32(fetch(v, c + 1), 16));
      }
      if (c < channels)
        for (int v = begin; v < end; ++v) panel[c / 2 * strips + v] = fetch(v, c);
    }
  });
}

template <class T>
class LinearPlanes {
 public:
  LinearPlanes(const LinearProblem& p, const LinearTensors<T>& t) : p_(p), t_(t), all_(p) {
    const int64_t whole = p.outputs / block * block;
    if (whole == p.outputs) return;
    last_.assign(block * p.channels, T{});  // the last block, filled up with zeros
    std::copy(t.weight + whole * p.channels, t.weight + p.outputs * p.channels, last_.begin());
  }

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
    int64_t o = 0;
    for (; o + block <= p_.outputs; o += block) {
      prefetch_outputs(tile[0], o);
      run_block<width>(tile, t_.weight + o * p_.channels, panel, o);
    }
    if (o < p_.outputs) run_block<width>(tile, last_.data(), panel, o);
  }

  void prefetch_outputs(const Strip& strip, int64_t o) const {
    T* const to = t_.y + (strip.image[0] * p_.outputs + o) * p_.out_volume() + strip.pixel[0];
    for (int i = 0; i < block; ++i)
      for (int64_t j = 0; j < tile; j += 64 / sizeof(T)) prefetch_write(to + i * p_.out_volume() + j);
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
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) {
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        const __mmask16 mask = tile[v].mask[part];
        if (part == 1 && !mask) continue;
        int64_t at = (tile[v].image[part] * p_.outputs + o) * p_.out_volume() + tile[v].pixel[part];
#pragma GCC unroll 8
        for (int i = 0; i < block; ++i, at += p_.out_volume()) {
          if (i >= rows) break;
          finish(sum[i][v], mask, at);
        }
      }
    }
  }

  void finish(__m512 sum, __mmask16 mask, int64_t at) const {
    if (t_.relu) sum = _mm512_max_ps(_mm512_setzero_ps(), sum);  // of a NaN and zero it gives the second
    if (t_.residual) sum = _mm512_add_ps(sum, load_floats(mask, t_.residual + at));
    store_floats(t_.y + at, mask, sum);
  }

  const LinearProblem& p_;
  const LinearTensors<T>& t_;
  Strips all_;
  std::vector<T> last_;
};

}  // namespace shiftconv
#endif
