// shiftconv::shift on the CPU: y = S x, or y = S' x, of shift.py; shift_ in place; round_offset of sparse_shift.py.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <complex>
#include <cstring>

#include "shift_map.h"
#include "shift_pixels.h"
#include "shift_planes.h"
#include "shift_window.h"
#include "tensor.h"

namespace shiftconv {
namespace {

// Which channels go where, of an output as large as its input.
struct Plain {
  const Groups& groups;
  bool sums;
};

struct WindowMap {
  const std::array<Axis, 3>& axes;
  const std::array<Sources, 3>& sources;
  bool transpose;
};

struct Job {
  const Tensor& from;
  const Tensor& to;
  Shape shape;  // of from
  bool channels_last;
  const Plain* plain;
  const WindowMap* window;

  template <class T, class Sum = T>
  void run() const {
    T* const t = static_cast<T*>(to.mutable_data_ptr());
    const T* const f = static_cast<const T*>(from.const_data_ptr());
    if (window)
      shift_window<T, Sum>(t, f, shape.n, shape.c, channels_last, window->transpose, window->axes, window->sources);
    else if (channels_last)
      shift_pixels<T, Sum>(t, f, shape, plain->groups);
    else
      shift_planes<T, Sum>(t, f, shape, plain->groups, plain->sums);
  }
};

// Moving is by size alone. The types are those that `sum` compiles anyway: each takes a second of compilation.
void move(const Job& job) {
  switch (element_size(job.from)) {
    case 1:
      return job.run<uint8_t>();
    case 2:
      return job.run<c10::Half, float>();
    case 4:
      return job.run<float>();
    case 8:
      return job.run<double>();
    case 16:
      return job.run<std::complex<double>>();
  }
  STD_TORCH_CHECK(false, "expected elements of 1, 2, 4, 8 or 16 bytes, got ", element_size(job.from));
}

// Several pixels add up in one only in the transpose of a shift with a folding border, so only gradients are summed.
void sum(const Job& job) {
  using torch::headeronly::ScalarType;
  switch (job.from.scalar_type()) {
    case ScalarType::Float:
      return job.run<float>();
    case ScalarType::Double:
      return job.run<double>();
    case ScalarType::Half:
      return job.run<c10::Half, float>();
    case ScalarType::BFloat16:
      return job.run<c10::BFloat16, float>();
    case ScalarType::ComplexFloat:
      return job.run<std::complex<float>>();
    case ScalarType::ComplexDouble:
      return job.run<std::complex<double>>();
    default:
      STD_TORCH_CHECK(false, "a gradient is floating point or complex, but dtype ", dtype_of(job.from), " came");
  }
}

// Offsets [C, D] by axis from the innermost, zeros for the axes that a map does not have.
class Columns {
 public:
  Columns(const Tensor& offset, int64_t channels, int64_t axes) : axes_(axes), none_(axes < 3 ? channels : 0, 0) {
    STD_TORCH_CHECK(offset.dim() == 2 && offset.size(0) == channels && offset.size(1) == axes,
                    "expected offset [C, D] = [", channels, ", ", axes, "]");
    STD_TORCH_CHECK(offset.scalar_type() == torch::headeronly::ScalarType::Long && offset.is_cpu(),
                    "expected int64 offsets on the CPU");
    data_ = static_cast<const int64_t*>(offset.const_data_ptr());
    row_ = offset.stride(0);
    column_ = offset.stride(1);
  }

  const int64_t* operator[](int64_t axis) const {
    return axis < axes_ ? data_ + (axes_ - 1 - axis) * column_ : none_.data();
  }
  int64_t stride(int64_t axis) const { return axis < axes_ ? row_ : 1; }

 private:
  int64_t axes_, row_, column_;
  const int64_t* data_;
  std::vector<int64_t> none_;
};

void check_mode(int64_t mode) { STD_TORCH_CHECK(0 <= mode && mode <= 4, "expected a mode from 0 to 4, got ", mode); }

Tensor shift_to_window(const Dense& from, const Columns& offset, Padding padding, bool transpose,
                       const std::vector<int64_t>& geometry) {
  const Tensor& x = from.tensor;
  const int64_t rank = x.dim(), ndim = rank - 2;
  STD_TORCH_CHECK(static_cast<int64_t>(geometry.size()) == 4 * ndim, "expected 4 numbers of geometry per axis");
  std::array<Axis, 3> axes;
  std::vector<int64_t> sizes{x.size(0), x.size(1)};
  for (int64_t i = 0; i < ndim; ++i) {
    const int64_t* const g = &geometry[4 * i];
    axes[3 - ndim + i] = {g[0], g[1], g[2], g[3]};
    STD_TORCH_CHECK(x.size(2 + i) == (transpose ? g[2] : g[0]) && g[0] >= 0 && g[2] >= 0 && g[3] >= 1,
                    "geometry does not fit x on axis ", i);
    sizes.push_back(transpose ? g[0] : g[2]);
  }
  const Tensor to = empty_of(x, sizes, from.channels_last);
  if (to.numel() == 0) return to;
  if (x.numel() == 0) {
    std::memset(to.mutable_data_ptr(), 0, to.numel() * element_size(to));
    return to;
  }
  const Shape s = shape_of(x);
  const auto sources = [&](int64_t axis) {
    return Sources(axes[2 - axis], offset[axis], offset.stride(axis), s.c, padding);
  };
  const std::array all{sources(2), sources(1), sources(0)};
  const WindowMap window{axes, all, transpose};
  const Job job{x, to, s, from.channels_last, nullptr, &window};
  if (transpose)
    sum(job);
  else
    move(job);
  return to;
}

Tensor shift(Tensor x, Tensor offset, int64_t mode, bool transpose, std::vector<int64_t> geometry) {
  const Shape s = shape_of(x);
  const Columns o(offset, s.c, x.dim() - 2);
  check_mode(mode);
  const auto padding = static_cast<Padding>(mode);
  const Dense from(x);
  if (!geometry.empty()) return shift_to_window(from, o, padding, transpose, geometry);
  const Tensor to = empty_as(from.tensor);
  if (x.numel() == 0) return to;

  const AxisMaps w(o[0], o.stride(0), s.c, s.w, padding, transpose);
  const AxisMaps h(o[1], o.stride(1), s.c, s.h, padding, transpose);
  const AxisMaps d(o[2], o.stride(2), s.c, s.d, padding, transpose);
  const Groups groups(s.c, d, h, w);
  const Plain plain{groups, w.sums() || h.sums() || d.sums()};
  const Job job{from.tensor, to, s, from.channels_last, &plain, nullptr};
  if (plain.sums)
    sum(job);
  else
    move(job);
  return to;
}

// One plane [D, H, W] in place, zeros beyond the border: one linear move, after which the border is cleared.
template <class T>
void move_in_place(T* plane, const AxisMap& d, const AxisMap& h, const AxisMap& w) {
  const int64_t volume = d.size * h.size * w.size, delta = (d.delta * h.size + h.delta) * w.size + w.delta;
  const bool any = d.begin < d.end && h.begin < h.end && w.begin < w.end;  // and then |delta| < volume
  if (any && delta != 0)
    std::memmove(static_cast<void*>(plane + std::max<int64_t>(0, -delta)), plane + std::max<int64_t>(0, delta),
                 (volume - std::abs(delta)) * sizeof(T));
  for (int64_t row = 0; row < d.size * h.size; ++row, plane += w.size) {
    const bool inside = any && d.inside(row / h.size) && h.inside(row % h.size);
    std::fill(plane, plane + (inside ? w.begin : w.size), T{});
    if (inside) std::fill(plane + w.end, plane + w.size, T{});
  }
}

// Large planes move in place; small ones go through the cache, by the programs of shift_planes.h where there is one.
template <class T>
void shift_planes_in_place(T* data, const Shape& s, int64_t moving, const Groups& groups, bool zeros) {
  const int64_t volume = s.volume(), bytes = volume * int64_t{sizeof(T)};
  const bool small = bytes <= 4096;
  std::vector<Plane<T, T>> planes;
  std::vector<PlaneProgram> programs;
  for (const Group& g : groups.list) {
    planes.emplace_back(g);
    if (small && has_windows && bytes >= window_size) programs.emplace_back(g, sizeof(T));
  }
  const char* const first = reinterpret_cast<const char*>(data);
  const char* const last = first + s.n * s.c * bytes;
  parallel_for(s.n * moving, bytes, [&](int64_t begin, int64_t end) {
    std::vector<T> moved(small || !zeros ? volume : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / moving, c = i % moving;
      const int32_t g = groups.of_channel[c];
      T* const plane = data + (n * s.c + c) * volume;
      const char* const from = reinterpret_cast<const char*>(plane);
      if (!small && zeros) {
        move_in_place(plane, *groups.list[g].d, *groups.list[g].h, *groups.list[g].w);
        continue;
      }
      if (!programs.empty() && programs[g].pays() && programs[g].fits(from, first, last))
        programs[g].run(reinterpret_cast<char*>(moved.data()), from);
      else
        planes[g].run(moved.data(), plane);
      std::memcpy(static_cast<void*>(plane), moved.data(), bytes);
    }
  });
}

// The first channels of x, as many as there are offsets.
void shift_in_place(Tensor x, Tensor offset, int64_t mode) {
  const Shape s = shape_of(x);
  const int64_t moving = offset.size(0);
  STD_TORCH_CHECK(moving <= s.c, "expected at most ", s.c, " offsets, got ", moving);
  const Columns o(offset, moving, x.dim() - 2);
  check_mode(mode);
  if (x.numel() == 0 || moving == 0) return;
  if (!x.is_contiguous()) {
    Tensor part = torch::stable::narrow(x, 1, 0, moving);
    torch::stable::copy_(part, shift(part, offset, mode, false, {}));
    return;
  }
  const auto padding = static_cast<Padding>(mode);
  const AxisMaps w(o[0], o.stride(0), moving, s.w, padding, false);
  const AxisMaps h(o[1], o.stride(1), moving, s.h, padding, false);
  const AxisMaps d(o[2], o.stride(2), moving, s.d, padding, false);
  const Groups groups(moving, d, h, w);
  const auto run = [&]<class T>(T* data) {
    shift_planes_in_place(data, s, moving, groups, padding == Padding::zeros);
  };
  void* const data = x.mutable_data_ptr();
  switch (element_size(x)) {
    case 1:
      return run(static_cast<uint8_t*>(data));
    case 2:
      return run(static_cast<uint16_t*>(data));
    case 4:
      return run(static_cast<float*>(data));
    case 8:
      return run(static_cast<double*>(data));
    case 16:
      return run(static_cast<std::complex<double>*>(data));
  }
  STD_TORCH_CHECK(false, "expected elements of 1, 2, 4, 8 or 16 bytes, got ", element_size(x));
}

// Real offsets to whole ones, halves to even.
Tensor round_offset(Tensor offset) {
  using torch::headeronly::ScalarType;
  const Tensor real = torch::stable::contiguous(offset);
  const bool is_double = real.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || real.scalar_type() == ScalarType::Float, "expected float32 or float64 offsets");
  const Tensor whole = torch::stable::new_empty(real, real.sizes(), ScalarType::Long);
  auto* const to = static_cast<int64_t*>(whole.mutable_data_ptr());
  const void* const from = real.const_data_ptr();
  for (int64_t i = 0; i < real.numel(); ++i) {
    const double value = is_double ? static_cast<const double*>(from)[i] : static_cast<const float*>(from)[i];
    STD_TORCH_CHECK(std::abs(value) < 2147483648.0, "offset must be finite and less than 2**31 pixels either way, got ",
                    value);
    to[i] = static_cast<int64_t>(std::nearbyint(value));
  }
  return whole;
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("shift", TORCH_BOX(&shiftconv::shift));
  library.impl("shift_", TORCH_BOX(&shiftconv::shift_in_place));
  library.impl("round_offset", TORCH_BOX(&shiftconv::round_offset));
}
