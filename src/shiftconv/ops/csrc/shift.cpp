// shiftconv::shift on the CPU: y = S x, or y = S' x, of shift.py.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <complex>

#include "shift_map.h"
#include "shift_pixels.h"
#include "shift_planes.h"
#include "tensor.h"

namespace shiftconv {
namespace {

struct Job {
  const Tensor& from;
  const Tensor& to;
  Shape shape;
  bool channels_last;
  const Groups& groups;
  bool sums;

  template <class T, class Sum = T>
  void run() const {
    T* const t = static_cast<T*>(to.mutable_data_ptr());
    const T* const f = static_cast<const T*>(from.const_data_ptr());
    if (channels_last)
      shift_pixels<T, Sum>(t, f, shape, groups);
    else
      shift_planes<T, Sum>(t, f, shape, groups, sums);
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

Tensor shift(Tensor x, Tensor offset, int64_t mode, bool transpose) {
  const Shape s = shape_of(x);
  const int64_t axes = x.dim() - 2;
  STD_TORCH_CHECK(offset.dim() == 2 && offset.size(0) == s.c && offset.size(1) == axes,
                  "expected offset [C, D] = [", s.c, ", ", axes, "]");
  STD_TORCH_CHECK(offset.scalar_type() == torch::headeronly::ScalarType::Long && offset.is_cpu(),
                  "expected int64 offsets on the CPU");
  STD_TORCH_CHECK(0 <= mode && mode <= 4, "expected a mode from 0 to 4, got ", mode);
  const Dense from(x);
  const Tensor to = empty_as(from.tensor);
  if (x.numel() == 0) return to;

  const auto* const o = static_cast<const int64_t*>(offset.const_data_ptr());
  const int64_t row = offset.stride(0), column = offset.stride(1);
  const std::vector<int64_t> none(axes < 3 ? s.c : 0, 0);
  const auto maps = [&](int64_t axis, int64_t size) {  // axis counts from the innermost
    const auto padding = static_cast<Padding>(mode);
    return axis < axes ? AxisMaps(o + (axes - 1 - axis) * column, row, s.c, size, padding, transpose)
                       : AxisMaps(none.data(), 1, s.c, size, padding, transpose);
  };
  const AxisMaps w = maps(0, s.w), h = maps(1, s.h), d = maps(2, s.d);
  const Groups groups(s.c, d, h, w);
  const Job job{from.tensor, to, s, from.channels_last, groups, w.sums() || h.sums() || d.sums()};
  if (job.sums)
    sum(job);
  else
    move(job);
  return to;
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("shift", TORCH_BOX(&shiftconv::shift));
}
