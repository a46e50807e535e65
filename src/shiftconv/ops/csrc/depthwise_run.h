// Hands a call to the kernels whose lanes are columns, or to those whose lanes are channels.
#pragma once

#include <type_traits>

#include "depthwise_call.h"
#include "depthwise_lanes.h"
#include "depthwise_planes.h"
#include "depthwise_planes_choice.h"

namespace shiftconv {

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

// The kernels whose lanes are channels are not compiled for float64, which is for checks.
template <class T>
constexpr bool has_lanes = !std::is_same_v<T, double>;

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
  if constexpr (has_lanes<T>)
    if (is_for_lanes<T>(p, kernels.all()))
      return lanes_sum<T>(p, call.maps<T>(), kernels.all(), offset, call.map_of<T>(y));
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
    if constexpr (has_lanes<T>)
      if (is_for_lanes<T>(p, weight)) {
        lanes_each<T>(p, call.maps<T>()[0], weight, results);
        continue;
      }
    planes_each<T>(p, call.maps<T>()[0], weight, results);
  }
}

}  // namespace shiftconv
