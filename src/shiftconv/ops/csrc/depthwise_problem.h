// A sum of depthwise convolutions of one feature map, as the kernels for the CPU see it.
//
//   y[n, c, i, j] = sum over u, v of weight[c, u, v] * x[n, c, i + u - top, j + v - left]        x is zero outside
//
// Transposes come as plain ones with flipped kernels; then top and left may have any sign.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace shiftconv {

// A dense map [N, C, H, W] in either memory format; strides count elements.
template <class T>
struct Map {
  T* data;
  int64_t image, channel, row, column;

  T* plane(int64_t n, int64_t c) const { return data + n * image + c * channel; }

  static Map of(T* data, int64_t channels, int64_t h, int64_t w, bool channels_last) {
    return channels_last ? Map{data, channels * h * w, 1, w * channels, channels}
                         : Map{data, channels * h * w, h * w, w, 1};
  }
};

// The kernel of one branch: its sizes, and how far its first tap lies before the output pixel.
struct Branch {
  int64_t kh, kw, top, left;
};

struct DepthwiseProblem {
  int64_t images, channels;
  int64_t h, w;    // of x
  int64_t oh, ow;  // of y; of a gradient to y
  std::vector<Branch> branches;
};

// The half-open range of indices 0 <= i < count for which 0 <= i + shift < size.
struct Range {
  int64_t begin, end;

  static Range inside(int64_t count, int64_t shift, int64_t size) {
    const int64_t begin = std::clamp<int64_t>(-shift, 0, count);
    return {begin, std::max(begin, std::min(count, size - shift))};
  }
  // The taps u of a kernel that reach from any of `count` outputs into `size` inputs when tap 0 lies `before` ahead.
  static Range taps(int64_t taps, int64_t before, int64_t count, int64_t size) {
    const int64_t begin = std::clamp<int64_t>(before - count + 1, 0, taps);
    return {begin, std::max(begin, std::min(taps, before + size))};
  }
  int64_t size() const { return end - begin; }
};

}  // namespace shiftconv
