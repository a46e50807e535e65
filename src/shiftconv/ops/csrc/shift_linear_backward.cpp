// Gradients of shiftconv::shift_linear on the CPU, of shift_linear.py: float32 and bfloat16, channels first.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <tuple>
#include <vector>

#include "linear_gradients.h"
#include "linear_problem.h"
#include "tensor.h"

namespace shiftconv {
namespace {

using torch::headeronly::ScalarType;

template <class Run>
void with_dtype(const Tensor& x, const Run& run) {
#if defined(SHIFTCONV_LINEAR_VECTORS)
  if (x.scalar_type() == ScalarType::Float) return run(float{});
  if (x.scalar_type() == ScalarType::BFloat16) return run(c10::BFloat16{});
#endif
  STD_TORCH_CHECK(false, "expected float32 or bfloat16 on a processor with AVX-512, but dtype ", dtype_of(x), " came");
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void check(const Tensor& map, const Tensor& offset, int64_t channels) {
  STD_TORCH_CHECK(3 <= map.dim() && map.dim() <= 5, "expected [N, C, *S] with 3 to 5 axes, got ", map.dim());
  STD_TORCH_CHECK(offset.dim() == 2 && offset.size(0) == channels && offset.size(1) == map.dim() - 2,
                  "expected offset [C, D] = [", channels, ", ", map.dim() - 2, "]");
  STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Long && offset.is_cpu(), "expected int64 offsets on the CPU");
}

Tensor shift_linear_input(Tensor grad, Tensor offset, Tensor weight) {
  check(grad, offset, weight.size(1));
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == grad.size(1) && weight.scalar_type() == grad.scalar_type(),
                  "expected weight [O, C] with O = ", grad.size(1), " in the dtype of grad");
  const Tensor from = torch::stable::contiguous(grad);
  const Tensor rows = torch::stable::contiguous(torch::stable::transpose(weight, 0, 1));
  std::vector<int64_t> sizes(grad.sizes().begin(), grad.sizes().end());
  sizes[1] = weight.size(1);
  const Tensor to = empty_of(grad, sizes, false);
  STD_TORCH_CHECK(to.numel() > 0 && grad.numel() > 0, "expected maps that are not empty");
  const int64_t ones[3] = {1, 1, 1};
  const LinearProblem p(to, offset, grad.size(1), 0, ones), still(from);
  with_dtype(grad, [&](auto zero) {
    using T = decltype(zero);
    LinearInputGradient<T>(p, still, data<T>(from), data<T>(rows), data<T>(to)).run();
  });
  return to;
}

std::tuple<Tensor, Tensor> shift_linear_weight(Tensor grad, Tensor x, Tensor offset, int64_t mode,
                                               std::vector<int64_t> stride) {
  check(x, offset, x.size(1));
  STD_TORCH_CHECK(x.numel() > 0 && grad.numel() > 0, "expected maps that are not empty");
  const LinearProblem p(x, offset, grad.size(1), mode, stride.data());
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.numel() == p.images * p.outputs * p.out_volume() &&
                      grad.scalar_type() == x.scalar_type(),
                  "expected a gradient of the sizes of the result in the dtype of x");
  const Tensor from = torch::stable::contiguous(x), g = torch::stable::contiguous(grad);
  const Tensor weight = empty_of(x, {p.outputs, p.channels}, false), bias = empty_of(x, {p.outputs}, false);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    LinearWeightGradient<T>(p, data<T>(from), data<T>(g), data<T>(weight), data<T>(bias)).run();
  });
  return {weight, bias};
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("shift_linear_input", TORCH_BOX(&shiftconv::shift_linear_input));
  library.impl("shift_linear_weight", TORCH_BOX(&shiftconv::shift_linear_weight));
}
