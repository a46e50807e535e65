// shiftconv::shift_linear on the CPU, of shift_linear.py.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <vector>

#include "linear_pixels.h"
#include "linear_plain.h"
#include "linear_planes.h"
#include "linear_problem.h"
#include "tensor.h"

namespace shiftconv {
namespace {

using torch::headeronly::ScalarType;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// x laid out like the result, whose sizes may differ: a residual that is not is copied.
Tensor laid_out_as(const Tensor& x, const Tensor& y, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (!channels_last) return torch::stable::contiguous(x);
  return torch::stable::contiguous(x, y.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

struct Operands {
  Tensor x, weight, y;
  std::optional<Tensor> bias, residual;
  bool relu;

  template <class T>
  LinearTensors<T> as() const {
    return {data<T>(x), data<T>(weight), bias ? data<T>(*bias) : nullptr, residual ? data<T>(*residual) : nullptr,
            static_cast<T*>(y.mutable_data_ptr()), relu};
  }
};

template <class T, class Sum>
void run_plain(const LinearProblem& p, const Operands& operands, bool channels_last) {
  const auto tensors = operands.as<T>();
  LinearPlain<T, Sum>(p, tensors, channels_last).run();
}

template <class T>
void run(const LinearProblem& p, const Operands& operands, bool channels_last) {
#if defined(SHIFTCONV_LINEAR_VECTORS)
  const auto tensors = operands.as<T>();
  if (channels_last || p.in_volume() == 1) return LinearPixels<T>(p, tensors).run();
  if (std::max(p.in_volume(), p.out_volume()) < int64_t{1} << 30)  // 32-bit lanes count pixels
    return LinearPlanes<T>(p, tensors).run();
#endif
  run_plain<T, float>(p, operands, channels_last);
}

void check(const Tensor& x, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias, int64_t mode,
           const std::vector<int64_t>& stride) {
  const int64_t axes = x.dim() - 2;
  STD_TORCH_CHECK(1 <= axes && axes <= 3, "expected x [N, C, *S] with 3 to 5 axes, got ", x.dim());
  STD_TORCH_CHECK(offset.dim() == 2 && offset.size(0) == x.size(1) && offset.size(1) == axes,
                  "expected offset [C, D] = [", x.size(1), ", ", axes, "]");
  STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Long && offset.is_cpu(), "expected int64 offsets on the CPU");
  STD_TORCH_CHECK(0 <= mode && mode <= 4, "expected a mode from 0 to 4, got ", mode);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "expected weight [O, C] with C = ", x.size(1));
  STD_TORCH_CHECK(static_cast<int64_t>(stride.size()) == axes, "expected ", axes, " strides, got ", stride.size());
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "expected x and weight of one dtype");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == weight.size(0)),
                  "expected bias [O] in the dtype of x");
}

Tensor shift_linear(Tensor x, Tensor offset, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    int64_t mode, std::vector<int64_t> stride, bool relu) {
  check(x, offset, weight, bias, mode, stride);
  const Dense from(x);
  const LinearProblem p(x, offset, weight.size(0), mode, stride.data());
  std::vector<int64_t> sizes{p.images, p.outputs};
  const int64_t counts[3] = {p.d.count, p.h.count, p.w.count};
  sizes.insert(sizes.end(), counts + 5 - x.dim(), counts + 3);
  const Tensor y = empty_of(x, sizes, from.channels_last);
  if (y.numel() == 0) return y;

  Operands operands{from.tensor, torch::stable::contiguous(weight), y, {}, {}, relu};
  if (bias) operands.bias = torch::stable::contiguous(*bias);
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type() && std::ranges::equal(residual->sizes(), y.sizes()),
                    "expected a residual of the result's sizes in the dtype of x");
    operands.residual = laid_out_as(*residual, y, from.channels_last);
  }
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run<float>(p, operands, from.channels_last);
      break;
    case ScalarType::BFloat16:
      run<c10::BFloat16>(p, operands, from.channels_last);
      break;
    case ScalarType::Double:
      run_plain<double, double>(p, operands, from.channels_last);
      break;
    case ScalarType::Half:
      run_plain<c10::Half, float>(p, operands, from.channels_last);
      break;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, but dtype ", dtype_of(x), " came");
  }
  return y;
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("shift_linear", TORCH_BOX(&shiftconv::shift_linear));
}
