// shift_linear for every dtype, memory format and processor: pixels are gathered one by one, products run on the
// compiler's own vectors.
#pragma once

#include <vector>

#include "linear_problem.h"

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

// T is what the tensors hold, Sum what the products are summed in.
template <class T, class Sum>
class LinearPlain {
 public:
  LinearPlain(const LinearProblem& p, const LinearTensors<T>& t, bool channels_last)
      : p_(p), t_(t), tables_(p), in_(p.channels, p.in_volume(), channels_last),
        out_(p.outputs, p.out_volume(), channels_last) {
    for (int64_t i = 0; i < p.outputs * p.channels; ++i) weight_.push_back(static_cast<Sum>(t.weight[i]));
    weight_.resize((p.outputs + rows - 1) / rows * rows * p.channels);
  }

  void run() const {
    const int64_t volume = p_.out_volume(), tiles = (volume + tile - 1) / tile;
    parallel_for(p_.images * tiles, p_.channels * p_.outputs * 64, [&](int64_t begin, int64_t end) {
      std::vector<Sum> panel(p_.channels * tile);
      std::vector<int64_t> index(p_.groups.size() * tile);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / tiles, first = i % tiles * tile, count = std::min(tile, volume - first);
        for (size_t g = 0; g < p_.groups.size(); ++g)
          for (int64_t j = 0; j < count; ++j) index[g * tile + j] = source(first + j, static_cast<int64_t>(g));
        gather(panel.data(), index.data(), image, count);
        for (int64_t o = 0; o < p_.outputs; o += rows) run_block(panel.data(), image, first, count, o);
      }
    });
  }

 private:
  typedef Sum Vector __attribute__((vector_size(32), aligned(alignof(Sum)), may_alias));
  static constexpr int64_t rows = 4, width = 2, tile = width * 32 / int64_t{sizeof(Sum)};

  struct Layout {
    int64_t image, channel, pixel;
    Layout(int64_t channels, int64_t volume, bool last)
        : image(channels * volume), channel(last ? 1 : volume), pixel(last ? channels : 1) {}
  };

  // The pixel of the input that pixel p of the output reads, -1 for zero.
  int64_t source(int64_t p, int64_t group) const {
    const int64_t w = tables_.w.of_group(group)[p % p_.w.count], row = p / p_.w.count;
    const int64_t h = tables_.h.of_group(group)[row % p_.h.count], d = tables_.d.of_group(group)[row / p_.h.count];
    return d < 0 || h < 0 || w < 0 ? -1 : (d * p_.h.size + h) * p_.w.size + w;
  }

  void gather(Sum* panel, const int64_t* index, int64_t image, int64_t count) const {
    for (int64_t c = 0; c < p_.channels; ++c, panel += tile) {
      const int64_t* const at = index + p_.of_channel[c] * tile;
      const T* const from = t_.x + image * in_.image + c * in_.channel;
      for (int64_t j = 0; j < count; ++j) panel[j] = at[j] < 0 ? Sum{} : static_cast<Sum>(from[at[j] * in_.pixel]);
    }
  }

  void run_block(const Sum* panel, int64_t image, int64_t first, int64_t count, int64_t o) const {
    Vector sum[rows][width] = {};
    const Sum* const weight = weight_.data() + o * p_.channels;
    for (int64_t c = 0; c < p_.channels; ++c, panel += tile) {
      const Vector* const right = reinterpret_cast<const Vector*>(panel);
#pragma GCC unroll 4
      for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int64_t v = 0; v < width; ++v) sum[i][v] += weight[i * p_.channels + c] * right[v];
    }
    for (int64_t i = 0; i < std::min(rows, p_.outputs - o); ++i) {
      const Sum* const row = reinterpret_cast<const Sum*>(sum[i]);
      const Sum bias = t_.bias ? static_cast<Sum>(t_.bias[o + i]) : Sum{};
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = image * out_.image + (o + i) * out_.channel + (first + j) * out_.pixel;
        Sum value = row[j] + bias;
        if (t_.relu && value < 0) value = 0;
        if (t_.residual) value += static_cast<Sum>(t_.residual[at]);
        t_.y[at] = static_cast<T>(value);
      }
    }
  }

  const LinearProblem& p_;
  const LinearTensors<T>& t_;
  SourceTables tables_;
  Layout in_, out_;
  std::vector<Sum> weight_;
};

}  // namespace shiftconv
