// Gradients of depthwise convolutions to their kernels on the CPU: shiftconv::depthwise_weight_direct.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "depthwise_lanes.h"
#include "depthwise_problem.h"
#include "depthwise_taps_choice.h"
#include "tensor.h"

namespace shiftconv {
namespace {

using torch::headeronly::ScalarType;

template <class Run>
void with_dtype(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return run(double{});
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(c10::BFloat16{});
    default: STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, but dtype ", dtype_of(x), " came");
  }
}

void check_maps(const std::vector<Tensor>& maps, const char* name, size_t branches, const Tensor& like) {
  STD_TORCH_CHECK(maps.size() == 1 || maps.size() == branches, "expected 1 or ", branches, " tensors as ", name,
                  ", but ", maps.size(), " came");
  for (const Tensor& map : maps)
    STD_TORCH_CHECK(map.dim() == 4 && map.is_cpu() && map.scalar_type() == like.scalar_type() &&
                        map.size(0) == like.size(0) && map.size(1) == like.size(1),
                    "expected ", name, " [N, C, H, W] on the CPU with N = ", like.size(0), " and C = ", like.size(1),
                    " in the dtype of x");
}

std::vector<Dense> dense(const std::vector<Tensor>& maps) { return {maps.begin(), maps.end()}; }

const Dense& of_branch(const std::vector<Dense>& maps, size_t branch) { return maps[maps.size() == 1 ? 0 : branch]; }

template <class T>
Map<const T> map_of(const Dense& map) {
  const auto s = map.tensor.sizes();
  return Map<const T>::of(static_cast<const T*>(map.tensor.const_data_ptr()), s[1], s[2], s[3], map.channels_last);
}

// Branches from `begin` on whose maps are as large as those of the first of them.
size_t alike(const std::vector<Dense>& x, const std::vector<Dense>& grad, size_t begin, size_t branches) {
  const auto same = [&](const std::vector<Dense>& maps, size_t b) {
    const auto first = of_branch(maps, begin).tensor.sizes(), other = of_branch(maps, b).tensor.sizes();
    return first[2] == other[2] && first[3] == other[3];
  };
  size_t end = begin + 1;
  while (end < branches && same(x, end) && same(grad, end)) ++end;
  return end;
}

// Whether the kernels whose lanes are channels took the call; they are not compiled for float64, which is for checks.
template <class T>
bool run_lanes(const DepthwiseProblem& p, const std::vector<Map<const T>>& x, const std::vector<Map<const T>>& grad,
               const std::vector<T*>& weight) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!tapwise::prefers_lanes<T>(p)) return false;
    lanes_weight<T>(p, x, grad, weight);
    return true;
  }
  return false;
}

// The gradients of branches `begin` to `end`, all of whose maps are of one size.
void sum_taps(const std::vector<Dense>& x, const std::vector<Dense>& grad, const std::vector<int64_t>& padding,
              const std::vector<Tensor>& weight, size_t begin, size_t end) {
  const auto in = of_branch(x, begin).tensor.sizes(), out = of_branch(grad, begin).tensor.sizes();
  DepthwiseProblem p{in[0], in[1], in[2], in[3], out[2], out[3], {}};
  for (size_t b = begin; b < end; ++b)
    p.branches.push_back({weight[b].size(2), weight[b].size(3), padding[4 * b], padding[4 * b + 2]});
  with_dtype(x[0].tensor, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Map<const T>> from, gradients;
    std::vector<T*> to;
    for (size_t b = begin; b < end; ++b) {
      if (b == begin || x.size() > 1) from.push_back(map_of<T>(of_branch(x, b)));
      if (b == begin || grad.size() > 1) gradients.push_back(map_of<T>(of_branch(grad, b)));
      to.push_back(static_cast<T*>(weight[b].mutable_data_ptr()));
    }
    if (std::min({p.images, p.channels, p.h, p.w, p.oh, p.ow}) == 0)
      for (size_t b = begin; b < end; ++b) std::fill_n(to[b - begin], weight[b].numel(), T(0.0f));
    else if (!run_lanes<T>(p, from, gradients, to))
      taps_weight<T>(p, from, gradients, to);
  });
}

std::vector<Tensor> as(const std::vector<Tensor>& tensors, ScalarType type) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(torch::stable::to(t, type));
  return result;
}

std::vector<Tensor> depthwise_weight(std::vector<Tensor> x, std::vector<Tensor> grad, std::vector<int64_t> padding) {
  const size_t branches = padding.size() / 4;
  STD_TORCH_CHECK(branches > 0 && padding.size() % 4 == 0, "expected 4 numbers of padding per branch, got ",
                  padding.size());
  STD_TORCH_CHECK(!x.empty(), "expected 1 or ", branches, " tensors as x, but 0 came");
  check_maps(x, "x", branches, x[0]);
  check_maps(grad, "grad", branches, x[0]);
  if (x[0].scalar_type() == ScalarType::Half)  // whose sums are of float32, so all may be
    return as(depthwise_weight(as(x, ScalarType::Float), as(grad, ScalarType::Float), padding), ScalarType::Half);
  const std::vector<Dense> maps = dense(x), gradients = dense(grad);
  std::vector<Tensor> weight;
  for (size_t b = 0; b < branches; ++b) {
    const auto in = of_branch(maps, b).tensor.sizes(), out = of_branch(gradients, b).tensor.sizes();
    const int64_t kh = in[2] + padding[4 * b] + padding[4 * b + 1] - out[2] + 1;
    const int64_t kw = in[3] + padding[4 * b + 2] + padding[4 * b + 3] - out[3] + 1;
    STD_TORCH_CHECK(kh > 0 && kw > 0, "expected grad no larger than the padded x, got ", out[2], " x ", out[3],
                    " for ", in[2], " x ", in[3], " with padding ", padding[4 * b], ", ", padding[4 * b + 1], ", ",
                    padding[4 * b + 2], ", ", padding[4 * b + 3]);
    weight.push_back(empty_of(x[0], {in[1], 1, kh, kw}, false));
  }
  for (size_t b = 0, end = 0; b < branches; b = end) {
    end = alike(maps, gradients, b, branches);
    sum_taps(maps, gradients, padding, weight, b, end);
  }
  return weight;
}

}  // namespace
}  // namespace shiftconv

STABLE_TORCH_LIBRARY_IMPL(shiftconv, CPU, library) {
  library.impl("depthwise_weight_direct", TORCH_BOX(&shiftconv::depthwise_weight));
}
