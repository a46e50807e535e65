// Vectors whose lanes are channels, and how maps of either memory format become rows of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "depthwise_problem.h"
#include "simd.h"

namespace shiftconv::channelwise {

template <class W>
constexpr int64_t width = lanes<W>;  // channels of a vector

template <class W>
inline bool any_nonzero(Vector<W> v) {
  const auto mask = mask_nonzero<W>(v);
#if defined(SHIFTCONV_AVX512)
  return mask != 0;
#else
  int64_t any = 0;
  for (int64_t i = 0; i < width<W>; ++i) any |= mask[i];
  return any != 0;
#endif
}

// Channels that one vector carries: `valid` of them from `first`; those before `fresh` belong to another block.
struct Block {
  int64_t first, fresh, valid;

  static int64_t count(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes; }
  static Block at(int64_t index, int64_t channels, int64_t lanes) {
    const int64_t first = std::min(index * lanes, std::max<int64_t>(channels - lanes, 0));
    return {first, index * lanes - first, std::min(channels, lanes)};
  }
};

// to[i] = numbers i of all channels, which lie `stride` apart, for 0 <= i < count. Lanes without a channel repeat one.
template <class T>
void gather(const T* from, int64_t stride, int64_t valid, int64_t count, Vector<Wide<T>>* to) {
  using W = Wide<T>;
  constexpr int64_t lanes = width<W>;
  const T* row[lanes];
  for (int64_t l = 0; l < lanes; ++l) row[l] = from + std::min(l, valid - 1) * stride;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) {
      W all[lanes];
      for (int64_t l = 0; l < lanes; ++l) all[l] = static_cast<W>(row[l][i]);
      to[i] = load<W>(all);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += lanes) {
    i = std::min(i, count - lanes);
    Vector<W> v[lanes];
    unrolled<lanes>([&](auto l) __attribute__((always_inline)) { v[l] = load<T>(row[l] + i); });
    transpose<W>(v);
    unrolled<lanes>([&](auto l) __attribute__((always_inline)) { to[i + l] = v[l]; });
  }
}

// The opposite, for the channels that this block is to write.
template <class T>
void scatter(const Vector<Wide<T>>* from, int64_t count, const Block& block, T* to, int64_t stride) {
  using W = Wide<T>;
  constexpr int64_t lanes = width<W>;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t l = block.fresh; l < block.valid; ++l) to[l * stride + i] = static_cast<T>(from[i][l]);
    return;
  }
  for (int64_t i = 0; i < count; i += lanes) {
    i = std::min(i, count - lanes);
    Vector<W> v[lanes];
    unrolled<lanes>([&](auto l) __attribute__((always_inline)) { v[l] = from[i + l]; });
    transpose<W>(v);
    unrolled<lanes>([&](auto l) __attribute__((always_inline)) {
      if (block.fresh <= l && l < block.valid) store<T>(to + l * stride + i, v[l]);
    });
  }
}

// Pixels of the block's channels of one image, one vector each, row by row.
template <class T>
void read_map(const Map<const T>& map, int64_t n, const Block& block, int64_t h, int64_t w, Vector<Wide<T>>* to) {
  constexpr int64_t lanes = width<Wide<T>>;
  const T* from = map.plane(n, block.first);
  if (map.column == 1 && map.row == w) return gather<T>(from, map.channel, block.valid, h * w, to);
  for (int64_t i = 0; i < h * w; ++i, from += map.column) {
    if (block.valid == lanes) {
      to[i] = load<T>(from);
    } else {
      T all[lanes] = {};
      std::copy_n(from, block.valid, all);
      to[i] = load<T>(all);
    }
  }
}

template <class T>
void write_map(const Vector<Wide<T>>* from, const Block& block, const Map<T>& map, int64_t n, int64_t h, int64_t w) {
  constexpr int64_t lanes = width<Wide<T>>;
  T* to = map.plane(n, block.first);
  if (map.column == 1 && map.row == w) return scatter<T>(from, h * w, block, to, map.channel);
  for (int64_t i = 0; i < h * w; ++i, to += map.column) {
    if (block.fresh == 0 && block.valid == lanes) {
      store<T>(to, from[i]);
    } else {
      T all[lanes];
      store<T>(all, from[i]);
      std::copy(all + block.fresh, all + block.valid, to + block.fresh);
    }
  }
}

// Memory of a thread, handed out piece by piece and kept for the next call. One at a time per thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= held().size) return;
    held().memory.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
    held().size = bytes;
  }

  template <class V>
  V* take(int64_t count) {
    V* piece = reinterpret_cast<V*>(held().memory.get() + used_);
    used_ += count * static_cast<int64_t>(sizeof(V));
    return piece;
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  struct Held {
    std::unique_ptr<char[], Free> memory;
    int64_t size = 0;
  };
  static Held& held() {
    static thread_local Held held;
    return held;
  }
  int64_t used_ = 0;
};

}  // namespace shiftconv::channelwise
