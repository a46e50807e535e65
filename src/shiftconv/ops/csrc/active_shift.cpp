// shiftconv::active_shift and its backward on the CPU; see active_shift.py.
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <tuple>

#include "active_blocks.h"
#include "active_pixels.h"
#include "active_planes.h"
#include "active_program.h"
#include "active_sums.h"
#include "tensor.h"

namespace shiftconv {
namespace {

using Samplings = std::array<Sampling, 3>;

int64_t input_volume(const Samplings& s) { return s[0].size * s[1].size * s[2].size; }
int64_t output_volume(const Samplings& s) { return s[0].count * s[1].count * s[2].count; }

// What both operators are told besides their tensors.
struct Call {
  int64_t n, c, ndim;
  Samplings axes;              // absent ones first
  std::vector<double> offset;  // [3, C]
  Padding padding;

  Call(const Tensor& x, const Tensor& shifts, int64_t mode, const std::vector<int64_t>& geometry, bool transpose)
      : n(x.size(0)), c(x.size(1)), ndim(x.dim() - 2), offset(3 * c, 0.0), padding(static_cast<Padding>(mode)) {
    STD_TORCH_CHECK(0 <= mode && mode <= 4, "expected a mode from 0 to 4, got ", mode);
    STD_TORCH_CHECK(geometry.empty() || static_cast<int64_t>(geometry.size()) == 4 * ndim,
                    "expected 4 numbers of geometry per axis");
    for (int64_t i = 0; i < ndim; ++i) {
      const int64_t size = x.size(2 + i);
      Sampling& axis = axes[3 - ndim + i];
      axis = {size, 0, size, 1};
      if (geometry.empty()) continue;
      const int64_t* const g = &geometry[4 * i];
      axis = {g[0], g[1], g[2], g[3]};
      STD_TORCH_CHECK(size == (transpose ? g[2] : g[0]) && g[0] >= 0 && g[2] >= 0 && g[3] >= 1,
                      "geometry does not fit x on axis ", i);
    }
    read_offset(shifts);
  }

  std::vector<int64_t> sizes(bool of_output) const {
    std::vector<int64_t> sizes{n, c};
    for (int64_t i = 3 - ndim; i < 3; ++i) sizes.push_back(of_output ? axes[i].count : axes[i].size);
    return sizes;
  }

  template <class W>
  ActiveMap<W> map(Blend blend, int64_t derivative, bool transpose) const {
    std::array<Blend, 3> blends{Blend::linear, Blend::linear, Blend::linear};
    for (int64_t i = 0; i < ndim; ++i) blends[3 - ndim + i] = derivative >> i & 1 ? Blend::derivative : blend;
    return {axes, ndim, offset, padding, blends, transpose};
  }

 private:
  void read_offset(const Tensor& shifts) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(shifts.dim() == 2 && shifts.size(0) == c && shifts.size(1) == ndim, "expected offset [C, D] = [",
                    c, ", ", ndim, "]");
    const bool is_double = shifts.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(shifts.is_cpu() && (is_double || shifts.scalar_type() == ScalarType::Float),
                    "expected float32 or float64 offsets on the CPU");
    const void* const data = shifts.const_data_ptr();
    const int64_t row = shifts.stride(0), column = shifts.stride(1);
    for (int64_t i = 0; i < ndim; ++i)
      for (int64_t k = 0; k < c; ++k) {
        const int64_t at = k * row + i * column;
        const double o = is_double ? static_cast<const double*>(data)[at] : static_cast<const float*>(data)[at];
        STD_TORCH_CHECK(std::abs(o) < 2147483648.0,
                        "offset must be finite and less than 2**31 pixels either way, got ", o);
        offset[(3 - ndim + i) * c + k] = o;
      }
  }
};

// Calls body with a number of the dtype of x.
template <class Body>
void by_type(const Tensor& x, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(c10::Half{});
    case ScalarType::BFloat16:
      return body(c10::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "expected floating point x, but dtype ", dtype_of(x), " came");
  }
}

// Planes of a channels-first map as numbers to compute with, with memory of ours around.
template <class T>
class WidePlanes {
  using W = Wide<T>;
  static constexpr bool copies = !std::is_same_v<T, W>;

 public:
  WidePlanes(int64_t planes, int64_t volume)
      : planes_(planes), volume_(volume), memory_(copies ? volume + 2 * lanes<W> : 0) {}

  const W* read(const T* from) {
    if constexpr (!copies) return from;
    for (int64_t i = 0; i < volume_; ++i) data()[i] = static_cast<W>(from[i]);
    return data();
  }

  W* target(T* to) {
    if constexpr (!copies) return to;
    return data();
  }

  void write(T* to) {
    if constexpr (copies)
      for (int64_t i = 0; i < volume_; ++i) to[i] = static_cast<T>(data()[i]);
  }

  // Whether less than a vector of memory surrounds plane i.
  bool exposed(int64_t i) const {
    return !copies && (i * volume_ < lanes<W> || (planes_ - 1 - i) * volume_ < lanes<W>);
  }

  // Whether a vector may be written behind plane i, of those before `end`.
  bool open(int64_t i, int64_t end) const { return copies || (end - 1 - i) * volume_ >= lanes<W>; }

 private:
  W* data() { return memory_.data() + lanes<W>; }

  int64_t planes_, volume_;
  std::vector<W> memory_;
};

template <class T>
void map_planes(T* to, const T* from, const Call& call, const ActiveMap<Wide<T>>& map, int64_t in, int64_t out) {
  const int64_t count = call.n * call.c;
  const Programs<T> programs(map, call.n);
  parallel_for(count, (in + out) * sizeof(T), [&](int64_t begin, int64_t end) {
    ActivePlane<Wide<T>> plane(map);
    WidePlanes<T> source(count, in), target(count, out);
    for (int64_t i = begin, planes = 1; i < end; i += planes) {
      const int64_t c = i % call.c;
      T* const t = to + i * out;
      const T* const f = from + i * in;
      planes = std::min({programs.suitable(i), end - i, call.c - c});
      if constexpr (has_programs<T>) {
        if (planes > 0) {
          run_programs<T>(t, (end - i) * out, f, planes, programs, c);
          continue;
        }
      }
      planes = 1;
      plane.select(c);
      plane.run(target.target(t), source.read(f), {source.exposed(i), target.open(i, end)});
      target.write(t);
    }
  });
}

// The same for channels-last maps, a few channels of one image at a time.
template <class T>
void map_blocks(T* to, const T* from, const Call& call, const ActiveMap<Wide<T>>& map, int64_t in, int64_t out) {
  using W = Wide<T>;
  const int64_t c = call.c, blocks = (c + lanes<W> - 1) / lanes<W>;
  parallel_for(call.n * blocks, lanes<W> * (in + out) * sizeof(T), [&](int64_t begin, int64_t end) {
    ActivePlane<W> plane(map);
    Planes<W> source(in), target(out);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, first = i % blocks * lanes<W>, channels = std::min(lanes<W>, c - first);
      source.gather(from + n * in * c + first, c, channels);
      for (int64_t k = 0; k < channels; ++k) {
        plane.select(first + k);
        plane.run(target[k], source[k], {false, true});
      }
      target.scatter(to + n * out * c + first, c, channels);
    }
  });
}

// Channels-last maps without scratch.
template <class T>
void map_pixels(T* to, const T* from, const Call& call, const PixelMap<Wide<T>>& map) {
  const PixelShape s{call.axes[1].size, call.axes[2].size, call.c};
  parallel_for(call.n * s.h, 2 * s.row() * sizeof(T), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // rows of one image
      const int64_t n = i / s.h, last = std::min(end, (n + 1) * s.h);
      walk_tiles<T>(s, i - n * s.h, last - n * s.h, [&](PixelTile tile) {
        blend_pixels<T>(to + n * s.image(), from + n * s.image(), s, map, tile);
      });
      i = last;
    }
  });
}

Tensor active_shift(Tensor x, Tensor offset, int64_t mode, bool rounded, int64_t derivative, bool transpose,
                    std::vector<int64_t> geometry) {
  shape_of(x);  // refuses other ranks
  const Call call(x, offset, mode, geometry, transpose);
  const Dense from(x);
  const Tensor to =
      geometry.empty() ? empty_as(from.tensor) : empty_of(x, call.sizes(!transpose), from.channels_last);
  if (to.numel() == 0) return to;
  if (x.numel() == 0) {
    std::memset(to.mutable_data_ptr(), 0, to.numel() * element_size(to));
    return to;
  }
  by_type(x, [&]<class T>(T) {
    const Blend blend = rounded && derivative == 0 ? Blend::rounded : Blend::linear;
    const ActiveMap<Wide<T>> map = call.map<Wide<T>>(blend, derivative, transpose);
    T* const t = static_cast<T*>(to.mutable_data_ptr());
    const T* const f = static_cast<const T*>(from.tensor.const_data_ptr());
    const int64_t in = transpose ? output_volume(call.axes) : input_volume(call.axes);
    const int64_t out = transpose ? input_volume(call.axes) : output_volume(call.axes);
    if (!from.channels_last) return map_planes<T>(t, f, call, map, in, out);
    if constexpr (has_programs<T>) {
      const PixelMap<Wide<T>> pixels(map, pack_size<T>, call.padding, transpose);
      if (!pixels.empty()) return map_pixels<T>(t, f, call, pixels);
    }
    map_blocks<T>(t, f, call, map, in, out);
  });
  return to;
}

// What a backward pass reads and writes; `sums` [parts, C, 3] are the derivatives of each image or, for channels-last
// maps without scratch, of each band of rows.
template <class T>
struct Backward {
  using W = Wide<T>;
  T* grad_x;
  const T *grad, *x;
  const Call& call;
  ActiveMap<W> transposed, forward;
  std::vector<double>& sums;
  int64_t in, out;

  void planes() const {
    const int64_t count = call.n * call.c;
    const Programs<T> programs(transposed, call.n), sum_programs(forward, call.n);
    const int64_t together = std::max<int64_t>(1, 8192 / (in * int64_t{sizeof(T)}));  // stay in the L1 cache
    parallel_for(count, (2 * in + out) * sizeof(T), [&](int64_t begin, int64_t end) {
      ActivePlane<W> plane(transposed);
      ActiveSums<W> correlation(forward);
      WidePlanes<T> result(count, in), incoming(count, out), image(count, in);
      for (int64_t i = begin, planes = 1; i < end; i += planes) {
        const int64_t c = i % call.c;
        T* const t = grad_x + i * in;
        const T *const g = grad + i * out, *const f = x + i * in;
        planes = std::min({programs.suitable(i), sum_programs.suitable(i), end - i, call.c - c, together});
        if constexpr (has_programs<T>) {
          if (planes > 0) {
            run_programs<T>(t, (end - i) * in, g, planes, programs, c);
            correlate_steps<T>(g, f, planes, sum_programs.step(c), sum_programs.shape(), &sums[3 * i]);
            continue;
          }
        }
        planes = 1;
        const W* const from = incoming.read(g);
        plane.select(c);
        plane.run(result.target(t), from, {incoming.exposed(i), result.open(i, end)});
        result.write(t);
        correlation.select(c);
        correlation.run(from, image.read(f), incoming.exposed(i) || image.exposed(i), &sums[3 * i]);
      }
    });
  }

  // Channels-last maps without scratch, if both maps allow it.
  bool pixels() const {
    const PixelMap<W> back(transposed, pack_size<T>, call.padding, true);
    const PixelMap<W> there(forward, pack_size<T>, call.padding, false);
    if (back.empty() || there.empty()) return false;
    const PixelShape s{call.axes[1].size, call.axes[2].size, call.c};
    const int64_t rows = (s.h + (s.h + 15) / 16 - 1) / ((s.h + 15) / 16), bands = (s.h + rows - 1) / rows;
    sums.assign(call.n * bands * 3 * s.c, 0.0);
    parallel_for(call.n * bands, 3 * rows * s.row() * sizeof(T), [&](int64_t begin, int64_t end) {
      std::vector<double> sum(window * window * s.c);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i / bands * s.image(), first = i % bands * rows, last = std::min(first + rows, s.h);
        std::fill(sum.begin(), sum.end(), 0.0);
        walk_tiles<T>(s, first, last, [&](PixelTile tile) {
          blend_pixels<T>(grad_x + at, grad + at, s, back, tile);
          correlate_pixels<T, 0>(sum.data(), grad + at, x + at, s, there, tile);
          if constexpr (phases<T> == 2) correlate_pixels<T, 1>(sum.data(), grad + at, x + at, s, there, tile);
        });
        for (int64_t c = 0; c < s.c; ++c) {
          const auto derivative = derive_pixels<W>(sum.data(), forward, there, c);
          std::copy(derivative.begin(), derivative.end(), &sums[3 * (i * s.c + c) + 1]);
        }
      }
    });
    return true;
  }

  void blocks() const {
    const int64_t c = call.c, count = (c + lanes<W> - 1) / lanes<W>;
    parallel_for(call.n * count, lanes<W> * (2 * in + out) * sizeof(T), [&](int64_t begin, int64_t end) {
      ActivePlane<W> plane(transposed);
      ActiveSums<W> correlation(forward);
      Planes<W> g(out), image(in), result(in);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / count, first = i % count * lanes<W>, channels = std::min(lanes<W>, c - first);
        g.gather(grad + n * out * c + first, c, channels);
        image.gather(x + n * in * c + first, c, channels);
        for (int64_t k = 0; k < channels; ++k) {
          plane.select(first + k);
          plane.run(result[k], g[k], {false, true});
          correlation.select(first + k);
          correlation.run(g[k], image[k], false, &sums[3 * (n * c + first + k)]);
        }
        result.scatter(grad_x + n * in * c + first, c, channels);
      }
    });
  }
};

// The sum over the parts, in their order.
void reduce(const Tensor& grad_offset, const std::vector<double>& sums, const Call& call) {
  const bool is_double = grad_offset.scalar_type() == torch::headeronly::ScalarType::Double;
  void* const data = grad_offset.mutable_data_ptr();
  std::vector<double> total(3 * call.c, 0.0);
  for (size_t i = 0; i < sums.size(); i += total.size())
    for (size_t k = 0; k < total.size(); ++k) total[k] += sums[i + k];
  for (int64_t c = 0; c < call.c; ++c)
    for (int64_t i = 0; i < call.ndim; ++i) {
      const double sum = total[3 * c + 3 - call.ndim + i];
      if (is_double)
        static_cast<double*>(data)[c * call.ndim + i] = sum;
      else
        static_cast<float*>(data)[c * call.ndim + i] = static_cast<float>(sum);
    }
}

std::tuple<Tensor, Tensor> active_shift_backward(Tensor grad, Tensor x, Tensor offset, int64_t mode, bool rounded,
                                                 std::vector<int64_t> geometry) {
  shape_of(x);
  const Call call(x, offset, mode, geometry, false);
  const std::vector<int64_t> sizes = call.sizes(true);
  STD_TORCH_CHECK(grad.dim() == x.dim() && std::equal(sizes.begin(), sizes.end(), grad.sizes().begin()) &&
                      grad.scalar_type() == x.scalar_type(),
                  "expected grad of the output's sizes and dtype");
  const Dense from(x);
  const Tensor grad_x = empty_as(from.tensor);
  const Tensor grad_offset = empty_of(offset, {call.c, call.ndim}, false);
  std::vector<double> sums(3 * call.n * call.c, 0.0);
  if (grad.numel() == 0 || x.numel() == 0) {
    std::memset(grad_x.mutable_data_ptr(), 0, grad_x.numel() * element_size(grad_x));
  } else {
    using torch::headeronly::MemoryFormat;
    const auto last = x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    const Tensor g = torch::stable::contiguous(grad, from.channels_last ? last : MemoryFormat::Contiguous);
    by_type(x, [&]<class T>(T) {
      using W = Wide<T>;
      const Backward<T> backward{static_cast<T*>(grad_x.mutable_data_ptr()),
                                 static_cast<const T*>(g.const_data_ptr()),
                                 static_cast<const T*>(from.tensor.const_data_ptr()),
                                 call,
                                 call.map<W>(rounded ? Blend::rounded : Blend::linear, 0, true),
                                 call.map<W>(Blend::both, 0, false),
                                 sums,
                                 input_volume(call.axes),
                                 output_volume(call.axes)};
      if (!from.channels_last) return backward.planes();
      if constexpr (has_programs<T>)
        if (backward.pixels()) return;
      backward.blocks();
    });
  }
  reduce(grad_offset, sums, call);
  return {grad_x, grad_offset};
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("active_shift", TORCH_BOX(&shiftconv::active_shift));
  library.impl("active_shift_backward", TORCH_BOX(&shiftconv::active_shift_backward));
}
