// Whether a weight gradient goes to lanes that are channels or to lanes that are columns.
//
// Channels have nothing to pad, whatever the map; but there must be enough of them, and a vector for every pixel of a
// large map is too much for the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "depthwise_taps.h"

namespace shiftconv::tapwise {

// Cycles per element that both ways pass through before they multiply; the rest below is what they take after that, all
// as measured on Zen 5.
constexpr double lanes_pass = 0.25, taps_pass = 0.8;

// Cycles of depthwise_lanes.h for the channels of a vector, one image and a branch: rows of x meet rows of the kernel,
// tile by tile.
template <class T>
double lanes_cycles(const Branch& k, int64_t h, int64_t oh, int64_t w, int64_t ow) {
  const int64_t tiles = (std::max(w, ow) + 13) / 14, tile = (std::max(w, ow) + tiles - 1) / tiles;
  constexpr bool paired = images_of<Cell<T>> == 2;
  constexpr double product = paired ? 0.18 : 0.45, tap = 0.6, pair = paired ? 12 : 8;
  double rows = 0, row = 0;
  for (int64_t u = 0; u < k.kh; ++u) rows += static_cast<double>(Range::inside(oh, u - k.top, h).size());
  for (int64_t distance = 1 - tiles; distance < tiles; ++distance) {
    const int64_t middle = distance * tile;
    const int64_t first = std::max(-k.left, middle - tile + 1), last = std::min(k.kw - k.left, middle + tile);
    double products = 0;
    for (int64_t d = first; d < last; ++d) products += static_cast<double>(tile - std::abs(d - middle));
    if (first < last)
      row += (product * products + tap * static_cast<double>(last - first) + pair) *
             static_cast<double>(tiles - std::abs(distance));
  }
  return rows * row;
}

// Cycles for one plane, when lanes are channels.
template <class T>
double lanes_cost(const DepthwiseProblem& p) {
  double cycles = 0;
  for (const Branch& k : p.branches)
    cycles += std::min(lanes_cycles<T>(k, p.h, p.oh, p.w, p.ow),
                       lanes_cycles<T>({k.kw, k.kh, k.left, k.top}, p.w, p.ow, p.h, p.oh));
  const int64_t lanes = width_of<Wide<T>>, filled = (p.channels + lanes - 1) / lanes * lanes;
  cycles = cycles / static_cast<double>(lanes) + lanes_pass * static_cast<double>(p.h * p.w + p.oh * p.ow);
  return cycles * static_cast<double>(filled) / static_cast<double>(p.channels);
}

// Cycles for one plane, when lanes are columns.
template <class T>
double taps_cost(const DepthwiseProblem& p) {
  constexpr int64_t together = images_of<Cell<T>>;
  const int64_t groups = (p.images + together - 1) / together;
  const double each = TapPlan<Cell<T>>(p).cost + taps_pass * static_cast<double>(p.h * p.w + p.oh * p.ow);
  return each * static_cast<double>(groups) / static_cast<double>(p.images);
}

template <class T>
bool prefers_lanes(const DepthwiseProblem& p) {
  constexpr int64_t cached = 64 * 64, most = 128 * 128;
  const int64_t pixels = std::max(p.h * p.w, p.oh * p.ow);
  if (pixels > most) return false;
  return lanes_cost<T>(p) * (pixels > cached ? 1.3 : 1) < taps_cost<T>(p);
}

}  // namespace shiftconv::tapwise
