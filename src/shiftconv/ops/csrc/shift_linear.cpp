// shiftconv::shift_linear on the CPU, of shift_linear.py.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

#include "linear_planes.h"
#include "linear_problem.h"
#include "tensor.h"

namespace shiftconv {
namespace {

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Tensor shift_linear(Tensor x, Tensor offset, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    int64_t mode, std::vector<int64_t> stride, bool relu) {
  const Dense from(x);
  const LinearProblem p(x, offset, weight.size(0), mode, stride.data());
  std::vector<int64_t> sizes{p.images, p.outputs};
  const int64_t counts[3] = {p.d.count, p.h.count, p.w.count};
  sizes.insert(sizes.end(), counts + 5 - x.dim(), counts + 3);
  const Tensor y = empty_of(x, sizes, from.channels_last);
  if (y.numel() == 0) return y;
  const Tensor w = torch::stable::contiguous(weight);
  using T = float;
  LinearTensors<T> t{data<T>(from.tensor), data<T>(w), bias ? data<T>(*bias) : nullptr, residual ? data<T>(*residual) : nullptr, static_cast<T*>(y.mutable_data_ptr()), relu};
  if (x.scalar_type() == torch::headeronly::ScalarType::Float) LinearPlanes<float>(p, t).run();
  else { LinearTensors<BFloat16> u; memcpy(&u, &t, sizeof t); LinearPlanes<BFloat16>(p, u).run(); }
  return y;
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("shift_linear", TORCH_BOX(&shiftconv::shift_linear));
}
