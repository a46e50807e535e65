// What is asked of shiftconv::depthwise_sum_direct and depthwise_each_direct, and the run for one type of elements.
//
// Each type is compiled in a file of its own, depthwise.<type>.cpp, since they take several seconds each.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "depthwise_problem.h"
#include "tensor.h"

namespace shiftconv {

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

template <class T>
void run_sum(const DepthwiseCall& call, const std::optional<Tensor>& bias, const Tensor& y);

template <class T>
void run_each(const DepthwiseCall& call, const std::vector<Tensor>& y);

}  // namespace shiftconv
