// shiftconv::depthwise_sum_direct and shiftconv::depthwise_each_direct on the CPU, of depthwise.py.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <vector>

#include "depthwise_lanes.h"
#include "depthwise_planes.h"
#include "depthwise_planes_choice.h"
#include "depthwise_problem.h"
#include "tensor.h"

namespace shiftconv {
namespace {

using torch::headeronly::ScalarType;

// The tensors of a call, dense, the maps in the memory format of the first; and what is asked of them, branch by
// branch. A transpose is a plain convolution with the kernels turned by half a turn.
struct DepthwiseCall {
  std::vector<Tensor> x, weight;
  bool channels_last, transpose;
  int64_t images, channels, h, w;
  std::vector<Branch> branches;
  std::vector<std::array<int64_t, 2>> sizes;  // height and width of each result

  DepthwiseCall(const std::vector<Tensor>& maps, const std::vector<Tensor>& kernels,
                const std::vector<int64_t>& padding, bool transpose)
      : channels_last(false), transpose(transpose) {
    check(maps, kernels, padding);
    const Dense first(maps[0]);
    channels_last = first.channels_last;
    x.push_back(first.tensor);
    for (size_t i = 1; i < maps.size(); ++i) x.push_back(laid_out(maps[i]));
    images = x[0].size(0), channels = x[0].size(1), h = x[0].size(2), w = x[0].size(3);
    for (size_t b = 0; b < kernels.size(); ++b) add(kernels[b], padding.data() + 4 * b);
  }

  Tensor empty(size_t b) const { return empty_of(x[0], {images, channels, sizes[b][0], sizes[b][1]}, channels_last); }

  // The branches `which`, whose results have one size.
  DepthwiseProblem problem(const std::vector<size_t>& which) const {
    DepthwiseProblem p{images, channels, h, w, sizes[which[0]][0], sizes[which[0]][1], {}};
    for (const size_t b : which) p.branches.push_back(branches[b]);
    return p;
  }

  template <class T>
  std::vector<Map<const T>> maps() const {
    std::vector<Map<const T>> maps;
    for (const Tensor& t : x)
      maps.push_back(Map<const T>::of(static_cast<const T*>(t.const_data_ptr()), channels, h, w, channels_last));
    return maps;
  }

  template <class T>
  Map<T> map_of(const Tensor& y) const {
    return Map<T>::of(static_cast<T*>(y.mutable_data_ptr()), channels, y.size(2), y.size(3), channels_last);
  }

 private:
  static void check(const std::vector<Tensor>& x, const std::vector<Tensor>& weight,
                    const std::vector<int64_t>& padding) {
    const size_t count = weight.size();
    STD_TORCH_CHECK(count > 0 && (x.size() == 1 || x.size() == count), "expected 1 or ", count, " maps for ", count,
                    " kernels, got ", x.size());
    STD_TORCH_CHECK(padding.size() == 4 * count, "expected 4 numbers of padding per kernel, got ", padding.size());
    for (const Tensor& t : x)
      STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu() && t.scalar_type() == x[0].scalar_type() &&
                          std::ranges::equal(t.sizes(), x[0].sizes()),
                      "expected maps [N, C, H, W] of one size and dtype on the CPU");
    for (const Tensor& t : weight)
      STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu() && t.scalar_type() == x[0].scalar_type() &&
                          t.size(0) == x[0].size(1) && t.size(1) == 1,
                      "expected kernels [C, 1, kh, kw] with C = ", x[0].size(1), " in the dtype of x");
  }

  Tensor laid_out(const Tensor& t) const {
    using torch::headeronly::MemoryFormat;
    return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  void add(const Tensor& kernel, const int64_t* pad) {
    const int64_t kh = kernel.size(2), kw = kernel.size(3);
    weight.push_back(torch::stable::contiguous(kernel));
    if (transpose) {
      branches.push_back({kh, kw, kh - 1 - pad[0], kw - 1 - pad[2]});
      sizes.push_back({h + kh - 1 - pad[0] - pad[1], w + kw - 1 - pad[2] - pad[3]});
    } else {
      branches.push_back({kh, kw, pad[0], pad[2]});
      sizes.push_back({h + pad[0] + pad[1] - kh + 1, w + pad[2] + pad[3] - kw + 1});
    }
    const auto [height, width] = sizes.back();
    STD_TORCH_CHECK(height >= 0 && width >= 0, "expected kernels no larger than the padded map, got ", kh, " x ", kw,
                    " for a result of ", height, " x ", width);
  }
};

// Contiguous kernels [C, kh, kw], turned if the call is a transpose.
template <class T>
class Kernels {
 public:
  explicit Kernels(const DepthwiseCall& call) {
    for (const Tensor& t : call.weight) {
      const T* const from = static_cast<const T*>(t.const_data_ptr());
      if (!call.transpose) {
        data_.push_back(from);
        continue;
      }
      const int64_t channels = t.size(0), taps = t.size(2) * t.size(3);
      std::vector<T>& to = turned_.emplace_back(channels * taps);
      for (int64_t c = 0; c < channels; ++c)
        std::reverse_copy(from + c * taps, from + (c + 1) * taps, to.data() + c * taps);
      data_.push_back(to.data());
    }
  }
  const T* operator[](size_t b) const { return data_[b]; }
  const std::vector<const T*>& all() const { return data_; }

 private:
  std::vector<std::vector<T>> turned_;
  std::vector<const T*> data_;
};

template <class T>
bool is_for_lanes(const DepthwiseProblem& p, const std::vector<const T*>& weight) {
  return p.h > 0 && p.w > 0 && lanes_are_channels<T>(p, weight);
}

template <class T>
void run_sum(const DepthwiseCall& call, const std::optional<Tensor>& bias, const Tensor& y) {
  std::vector<size_t> all(call.branches.size());
  for (size_t b = 0; b < all.size(); ++b) all[b] = b;
  const DepthwiseProblem p = call.problem(all);
  const Kernels<T> kernels(call);
  const T* const offset = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  if (is_for_lanes<T>(p, kernels.all()))
    lanes_sum<T>(p, call.maps<T>(), kernels.all(), offset, call.map_of<T>(y));
  else
    planes_sum<T>(p, call.maps<T>(), kernels.all(), offset, call.map_of<T>(y));
}

template <class T>
void run_each(const DepthwiseCall& call, const std::vector<Tensor>& y) {
  const Kernels<T> kernels(call);
  std::vector<bool> done(y.size());
  for (size_t first = 0; first < y.size(); ++first) {
    if (done[first] || y[first].numel() == 0) continue;
    std::vector<size_t> which;
    std::vector<const T*> weight;
    std::vector<Map<T>> results;
    for (size_t b = first; b < y.size(); ++b) {
      if (call.sizes[b] != call.sizes[first]) continue;
      done[b] = true;
      which.push_back(b);
      weight.push_back(kernels[b]);
      results.push_back(call.map_of<T>(y[b]));
    }
    const DepthwiseProblem p = call.problem(which);
    if (is_for_lanes<T>(p, weight))
      lanes_each<T>(p, call.maps<T>()[0], weight, results);
    else
      planes_each<T>(p, call.maps<T>()[0], weight, results);
  }
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
    case ScalarType::Half:
      return body(static_cast<c10::Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, but dtype ", dtype_of(x), " came");
  }
}

Tensor depthwise_sum_direct(std::vector<Tensor> x, std::vector<Tensor> weight, std::optional<Tensor> bias,
                            std::vector<int64_t> padding, bool transpose) {
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
