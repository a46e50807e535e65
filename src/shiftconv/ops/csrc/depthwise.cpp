// shiftconv::depthwise_sum_direct and shiftconv::depthwise_each_direct on the CPU, of branches.py.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <optional>
#include <vector>

#include "depthwise_call.h"
#include "tensor.h"

namespace shiftconv {
namespace {

using torch::headeronly::ScalarType;

std::vector<Tensor> as(const std::vector<Tensor>& tensors, ScalarType type) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(torch::stable::to(t, type));
  return result;
}

// body is called with a null pointer of the type of x's elements.
template <class Body>
void with_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, but dtype ", dtype_of(x), " came");
  }
}

Tensor depthwise_sum_direct(std::vector<Tensor> x, std::vector<Tensor> weight, std::optional<Tensor> bias,
                            std::vector<int64_t> padding, bool transpose) {
  STD_TORCH_CHECK(!x.empty(), "expected at least one map");
  if (x[0].scalar_type() == ScalarType::Half) {  // whose sums are of float32, so all may be
    if (bias) bias = torch::stable::to(*bias, ScalarType::Float);
    const std::vector<Tensor> maps = as(x, ScalarType::Float), kernels = as(weight, ScalarType::Float);
    return torch::stable::to(depthwise_sum_direct(maps, kernels, bias, padding, transpose), ScalarType::Half);
  }
  const DepthwiseCall call(x, weight, padding, transpose);
  for (const auto& size : call.sizes)
    STD_TORCH_CHECK(size == call.sizes[0], "expected branches with results of one size");
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == x[0].scalar_type() && bias->dim() == 1 && bias->size(0) == call.channels,
                    "expected bias [C] with C = ", call.channels, " in the dtype of x");
    bias = torch::stable::contiguous(*bias);
  }
  const Tensor y = call.empty(0);
  if (y.numel() > 0) with_type(y, [&](auto* type) { run_sum<std::remove_pointer_t<decltype(type)>>(call, bias, y); });
  return y;
}

std::vector<Tensor> depthwise_each_direct(Tensor x, std::vector<Tensor> weight, std::vector<int64_t> padding,
                                          bool transpose) {
  if (x.scalar_type() == ScalarType::Half) {
    const Tensor wide = torch::stable::to(x, ScalarType::Float);
    return as(depthwise_each_direct(wide, as(weight, ScalarType::Float), padding, transpose), ScalarType::Half);
  }
  const DepthwiseCall call({x}, weight, padding, transpose);
  std::vector<Tensor> y;
  for (size_t b = 0; b < weight.size(); ++b) y.push_back(call.empty(b));
  with_type(x, [&](auto* type) { run_each<std::remove_pointer_t<decltype(type)>>(call, y); });
  return y;
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("depthwise_sum_direct", TORCH_BOX(&shiftconv::depthwise_sum_direct));
  library.impl("depthwise_each_direct", TORCH_BOX(&shiftconv::depthwise_each_direct));
}
