// Which of the two kernels for depthwise convolutions is faster: the one whose lanes are columns, or channels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "depthwise_planes.h"
#include "depthwise_problem.h"

namespace shiftconv {

// Pairs of an output and a tap that reach a pixel, along one axis.
inline int64_t pairs_along(int64_t taps, int64_t before, int64_t count, int64_t size) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < count; ++i) pairs += Range::inside(taps, i - before, size).size();
  return pairs;
}

// The same as columns of vectors see it: a tap that one lane needs is multiplied for all of them.
template <class T>
int64_t pairs_in_strips(const Branch& k, const DepthwiseProblem& p) {
  constexpr int64_t wide = lanes<Wide<T>>, each = PlanesArithmetic<T>::Type::taps;
  int64_t pairs = 0;
  for (int64_t j = 0; j < p.ow; j += wide) {
    const int64_t last = std::min(j + wide, p.ow) - 1;
    const int64_t begin = std::clamp<int64_t>(k.left - last, 0, k.kw), end = std::clamp(k.left - j + p.w, begin, k.kw);
    pairs += (end - begin + each - 1) / each * each * wide;
  }
  return pairs;
}

// Shares of the taps that are not dead, judged by the block of channels in the middle: for each channel by itself, and
// for all of them together.
template <class T>
std::array<double, 2> live_shares(const DepthwiseProblem& p, const std::vector<const T*>& weight) {
  constexpr int64_t wide = lanes<Wide<T>>;
  const int64_t first = p.channels / 2 / wide * wide, count = std::min(p.channels - first, wide);
  int64_t all = 0, alone = 0, together = 0;
  for (size_t b = 0; b < p.branches.size(); ++b) {
    const int64_t kh = p.branches[b].kh, kw = p.branches[b].kw;
    std::vector<bool> live(kh * kw);
    for (int64_t i = 0; i < count; ++i) {
      const T* const kernel = weight[b] + (first + i) * kh * kw;
      for (int64_t v = 0; v < kw; ++v)
        for (int64_t u = 0, zeros = 0; u < kh; ++u) {
          const bool zero = kernel[u * kw + v] == T(0);
          live[u * kw + v] = live[u * kw + v] || !zero;
          zeros = zero ? zeros + 1 : 0;
          alone += zeros < dead_run ? 1 : zeros == dead_run ? 1 - dead_run : 0;
        }
    }
    all += count * kh * kw;
    together += count * std::count(live.begin(), live.end(), true);
  }
  const double total = static_cast<double>(std::max<int64_t>(all, 1));
  return {static_cast<double>(alone) / total, static_cast<double>(together) / total};
}

// Lanes that are channels never meet padding, but those of the last block of channels may be empty, a tap is dead only
// if it is in all of them, and the maps of a whole block have to stay near. Constants were measured on AMD Zen 5.
template <class T>
bool lanes_are_channels(const DepthwiseProblem& p, const std::vector<const T*>& weight) {
  constexpr int64_t wide = lanes<Wide<T>>, near_bytes = int64_t{1} << 19;
  constexpr bool long_vectors = vector_bytes == 64;  // with 32 registers, which hold more pixels of all channels
  double by_channels = 0, by_columns = 0;
  for (const Branch& k : p.branches) {
    const double rows = static_cast<double>(pairs_along(k.kh, k.top, p.oh, p.h));
    by_channels += rows * static_cast<double>(pairs_along(k.kw, k.left, p.ow, p.w));
    // To begin another column of the kernel costs about as much as one of its rows.
    const double begin = (long_vectors ? 1 : 0.5) / static_cast<double>(std::max<int64_t>(k.kh, 1));
    by_columns += rows * static_cast<double>(pairs_in_strips<T>(k, p)) * (1 + begin);
  }
  const int64_t blocks = (p.channels + wide - 1) / wide;
  by_channels *= static_cast<double>(blocks * wide) / static_cast<double>(p.channels);
  if (!long_vectors) by_channels *= 1.3;
  if (p.h * p.w * vector_bytes > near_bytes) by_channels *= 1.4;
  const auto [alone, together] = live_shares(p, weight);
  constexpr double rest = 0.6;  // of the time of columns that is not spent on taps: maps in and out, blocks begun
  return by_channels * together <= by_columns * (alone + rest) / (1 + rest);
}

}  // namespace shiftconv
