// Depthwise convolution plane by plane: a channel of an image is laid out in a zero-padded scratch near the processor,
// from which tiles of the result are computed in registers. Lanes are columns.
#pragma once

#include <cstdint>
#include <vector>

#include "depthwise_planes_scratch.h"
#include "depthwise_planes_taps.h"
#include "depthwise_planes_tile.h"
#include "depthwise_problem.h"
#include "tensor.h"

namespace shiftconv {

// Numbers of type T are multiplied one by one, or in pairs where the processor can.
template <class T>
struct PlanesArithmetic {
  using Type = SingleTaps<Wide<T>>;
};
#if defined(SHIFTCONV_TAP_PAIRS)
template <>
struct PlanesArithmetic<c10::BFloat16> {
  using Type = PairTaps;
};
#endif

// What one call computes. Each output is a sum of kernels, on one source each.
template <class T>
struct PlanesCall {
  const DepthwiseProblem& problem;
  const std::vector<Map<const T>>& x;
  const std::vector<const T*>& weight;
  const T* bias;
  const std::vector<Map<T>>& y;
  std::vector<std::vector<TapBox>> outputs;  // the kernels of each
};

template <class T>
class Planes {
  using A = typename PlanesArithmetic<T>::Type;
  using Cell = typename A::Cell;
  using W = Wide<T>;

 public:
  explicit Planes(const PlanesCall<T>& call)
      : call_(call),
        p_(call.problem),
        interleaved_(call.x[0].column != 1 || call.y[0].column != 1),
        block_(interleaved_ ? std::min<int64_t>(lanes<W>, p_.channels) : 1),
        blocks_((p_.channels + block_ - 1) / block_) {
    rows_ = {INT64_MAX, INT64_MIN};
    for (const auto& boxes : call.outputs)
      for (const TapBox& box : boxes) {
        rows_.begin = std::min(rows_.begin, box.first_row);
        rows_.end = std::max(rows_.end, box.first_row + std::max<int64_t>(box.rows, 1));
        taps_ += box.taps();
      }
    const int64_t row_bytes = PaddedPlane<W>(p_.w, 1).stride * int64_t{sizeof(Cell)} * block_ * sources();
    const int64_t fit = scratch_bytes / row_bytes, reach = rows_.size() - 1;
    band_ = fit >= p_.h ? p_.oh : std::max({fit - reach, reach, int64_t{2} * most_rows});
    band_ = std::min(band_, p_.oh);
    bands_ = (p_.oh + band_ - 1) / band_;
  }

  void run() const {
    // What a step costs, as bytes to be copied: some ten of them are as dear as a vector of products.
    const int64_t cost = band_ * (p_.ow + lanes<W>) * block_ * (int64_t{sizeof(T)} + taps_);
    parallel_for(blocks_ * p_.images * bands_, cost, [&](int64_t begin, int64_t end) { work(begin, end); });
  }

 private:
  static constexpr int64_t scratch_bytes = int64_t{1} << 19;

  struct Memory {
    std::vector<Cell> cells;
    std::vector<T> results;
    std::vector<std::vector<TapProgram<T, A>>> programs;  // of a channel of the block; kernels of all outputs in turn
    std::vector<TileInput<Cell>> inputs;
  };

  // The steps of one thread: bands of rows of images of blocks of channels.
  void work(int64_t begin, int64_t end) const {
    const PaddedPlane<W> plane(p_.w, std::min(p_.h, band_ + rows_.size() - 1));
    Memory memory;
    memory.cells.assign(plane.cells() * block_ * sources(), Cell{});
    if (interleaved_) memory.results.resize(result_cells() * block_);
    memory.programs.resize(block_);
    int64_t known = -1;
    for (int64_t step = begin; step < end; ++step) {
      const int64_t block = step / (bands_ * p_.images), n = step / bands_ % p_.images, band = step % bands_;
      const int64_t c = block * block_, channels = std::min(block_, p_.channels - c);
      if (block != known)
        for (int64_t k = 0; k < channels; ++k) build(c + k, plane.stride, memory.programs[k]);
      known = block;
      run_band(n, c, channels, {band * band_, std::min(p_.oh, (band + 1) * band_)}, plane, memory);
    }
  }

  int64_t sources() const { return static_cast<int64_t>(call_.x.size()); }
  int64_t result_stride() const { return (p_.ow + lanes<W> - 1) / lanes<W> * lanes<W>; }
  int64_t result_cells() const { return (band_ * result_stride() / lanes<W> | 1) * lanes<W>; }

  void build(int64_t channel, int64_t stride, std::vector<TapProgram<T, A>>& programs) const {
    size_t i = 0;
    for (const auto& boxes : call_.outputs)
      for (const TapBox& box : boxes) {
        if (i == programs.size()) programs.emplace_back();
        programs[i++].build(p_, box, call_.weight, channel, stride);
      }
  }

  // Rows of the result, and the rows of the sources in the scratch that they need.
  void run_band(int64_t n, int64_t c, int64_t channels, Range out, const PaddedPlane<W>& plane, Memory& memory) const {
    Range in{std::clamp<int64_t>(out.begin + rows_.begin, 0, p_.h),
             std::clamp<int64_t>(out.end - 1 + rows_.end, 0, p_.h)};
    in.end = std::max(in.begin, in.end);
    for (int64_t s = 0; s < sources(); ++s) {
      Cell* const to = memory.cells.data() + s * block_ * plane.cells() + plane.margin;
      if (interleaved_)
        load_planes<T, A>(call_.x[s], n, c, channels, p_.w, in, to, plane);
      else
        load_plane<T, A>(call_.x[s], n, c, p_.w, in, to, plane.stride);
    }
    size_t first = 0;
    for (size_t o = 0; o < call_.outputs.size(); ++o) {
      const Map<T>& y = call_.y[o];
      for (int64_t k = 0; k < channels; ++k) {
        TileOutput<T> to{};
        if (interleaved_)
          to = {memory.results.data() + k * result_cells(), result_stride(), out.size(), lanes<W>, 0};
        else
          to = {y.plane(n, c) + out.begin * y.row, y.row, out.size(), p_.ow, 0};
        to.bias = call_.bias ? static_cast<W>(call_.bias[c + k]) : W{};
        run_plane(call_.outputs[o], memory.programs[k].data() + first, k, out.begin, in, plane, to, memory);
      }
      if (interleaved_)
        store_planes<T>(y, n, c, channels, p_.ow, out, memory.results.data(), result_stride(), result_cells());
      first += call_.outputs[o].size();
    }
  }

  // One channel: strips of columns, in tiles of rows. `to` is all rows of the band.
  void run_plane(const std::vector<TapBox>& boxes, const TapProgram<T, A>* programs, int64_t k, int64_t first_row,
                 Range in, const PaddedPlane<W>& plane, const TileOutput<T>& to, Memory& memory) const {
    memory.inputs.resize(boxes.size());
    const int64_t tiles = (to.rows + most_rows - 1) / most_rows;
    for (int64_t column = 0; column < p_.ow; column += lanes<W>) {
      const int64_t columns = std::min(lanes<W>, p_.ow - column);
      for (size_t i = 0; i < boxes.size(); ++i)
        programs[i].select(column, columns, p_.w, memory.inputs[i]);
      int64_t row = 0;
      for (int64_t left = tiles; left > 0; --left) {
        const int64_t rows = (to.rows - row + left - 1) / left;
        for (size_t i = 0; i < boxes.size(); ++i) {
          TileInput<Cell>& input = memory.inputs[i];
          input.stride = plane.stride;
          input.row = first_row + row - in.begin;
          input.rows = in.size();
          input.pixel = memory.cells.data() + (boxes[i].source * block_ + k) * plane.cells() + plane.margin +
                        input.row * plane.stride + column;
        }
        TileOutput<T> out = to;
        out.data += row * to.stride + column;
        out.rows = rows;
        out.columns = interleaved_ ? lanes<W> : columns;
        run_rows<T, A>(memory.inputs.data(), static_cast<int64_t>(boxes.size()), out);
        row += rows;
      }
    }
  }

  const PlanesCall<T>& call_;
  const DepthwiseProblem& p_;
  bool interleaved_;
  int64_t block_, blocks_;  // channels at a time, and how many times
  Range rows_;              // that the kernels reach, relative to the output's
  int64_t band_, bands_;    // output rows at a time, and how many times
  int64_t taps_ = 0;
};

// y: the sum of all kernels, on x[0] or on one source each.
template <class T>
void planes_sum(const DepthwiseProblem& p, const std::vector<Map<const T>>& x, const std::vector<const T*>& weight,
                const T* bias, const Map<T>& y) {
  using A = typename PlanesArithmetic<T>::Type;
  const int64_t count = static_cast<int64_t>(p.branches.size());
  std::vector<TapBox> boxes;
  if (x.size() == 1 && A::taps == 1) {  // sums of weights that are multiplied in pairs would have to be rounded
    std::vector<int64_t> all(count);
    for (int64_t b = 0; b < count; ++b) all[b] = b;
    boxes.emplace_back(p, all, 0, A::taps);
  } else {
    for (int64_t b = 0; b < count; ++b)
      boxes.emplace_back(p, std::vector<int64_t>{b}, x.size() == 1 ? 0 : b, A::taps);
  }
  const std::vector<Map<T>> ys{y};
  Planes<T>({p, x, weight, bias, ys, {boxes}}).run();
}

template <class T>
void planes_each(const DepthwiseProblem& p, const Map<const T>& x, const std::vector<const T*>& weight,
                 const std::vector<Map<T>>& y) {
  using A = typename PlanesArithmetic<T>::Type;
  std::vector<std::vector<TapBox>> outputs;
  for (int64_t b = 0; b < static_cast<int64_t>(p.branches.size()); ++b)
    outputs.push_back({TapBox(p, {b}, 0, A::taps)});
  const std::vector<Map<const T>> xs{x};
  Planes<T>({p, xs, weight, nullptr, y, outputs}).run();
}

}  // namespace shiftconv
