// Runs of adjacent positions: blends of up to four rows at two adjacent columns, and products of two runs.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "active_map.h"
#include "simd.h"

namespace shiftconv {

// What lane i of a run reads: at[i] if low <= i < high, else zero.
template <class W>
struct Source {
  const W* at;
  int64_t low, high;
  W weight;
};

// The bits that the two taps keep of the vectors of a run, which repeat.
template <class W>
class Columns {
 public:
  Columns(const std::array<std::vector<BitPack<W>>, 2>& bits)
      : left_(bits[0].data()), right_(bits[1].data()), count_(static_cast<int64_t>(bits[0].size())) {}

  Vector<W> left(Vector<W> v) const { return keep_bits<W>(left_[at_][0], v); }
  Vector<W> right(Vector<W> v) const { return keep_bits<W>(right_[at_][0], v); }
  void advance() { at_ = at_ + 1 < count_ ? at_ + 1 : 0; }

  // Of a run that ends where its row does.
  static Columns all(int taps) {
    static const std::array<std::vector<BitPack<W>>, 2> one{{{{~Index<W>{}}}, {{Index<W>{}}}}};
    static const std::array<std::vector<BitPack<W>>, 2> two{{{{~Index<W>{}}}, {{~Index<W>{}}}}};
    return taps == 1 ? one : two;
  }

 private:
  const BitPack<W>*left_, *right_;
  int64_t count_, at_ = 0;
};

// How far a run may overrun what it reads and writes. Vectors are loaded whole, so what lies beyond `low` and `high`
// must be memory of ours, up to a vector; where it is not, a run is guarded. With `spill`, the last vector is written
// whole, over what follows.
struct Care {
  bool guarded, spill;
};

template <class W>
inline Vector<W> load_checked(const Source<W>& s, int64_t i, bool guarded) {
  const int64_t begin = std::max<int64_t>(s.low - i, 0), end = std::min<int64_t>(s.high - i, lanes<W>);
  if (begin >= end) return Vector<W>{};
  if (guarded) {
    W some[lanes<W>] = {};
    std::memcpy(some + begin, s.at + i + begin, (end - begin) * sizeof(W));
    return load<W>(some);
  }
  return keep<W>(mask_of<W>(static_cast<uint16_t>((1u << end) - (1u << begin))), load<W>(s.at + i));
}

template <class W>
inline Vector<W> keep_first(Vector<W> v, int64_t count) {
  return count >= lanes<W> ? v : keep<W>(mask_of<W>(static_cast<uint16_t>((1u << count) - 1)), v);
}

constexpr int64_t fetch_ahead = 4096;  // bytes

// A call of a function that only prefetches would be dropped for having no effect.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + fetch_ahead);
}

// Walks over a run by vectors: body(i, checked), where `checked` is false_type if the `reach` numbers from i on lie
// inside all sources.
template <int64_t step, int64_t reach, class Body>
[[gnu::always_inline]] inline int64_t walk(int64_t i, int64_t count, int64_t first, int64_t last, const Body& body) {
  while (i < count) {
    for (const int64_t end = std::min(count, last - reach + 1); first <= i && i < end; i += step)
      body(i, std::false_type{});
    if (i >= count) break;
    body(i, std::true_type{});
    i += step;
  }
  return i;
}

template <class W, int rows>
struct Bounds {
  int64_t first = INT64_MIN, last = INT64_MAX;

  explicit Bounds(const Source<W>* source) {
    for (int a = 0; a < rows; ++a) {
      first = std::max(first, source[a].low);
      last = std::min(last, source[a].high);
    }
  }
};

// All that the loops need is local: every store could change the rest.
template <class W, int rows>
void blend_rows(W* to, int64_t count, const Source<W>* source, const W* weight, Columns<W> columns, Care care) {
  using V = Vector<W>;
  const Bounds<W, rows> bounds(source);
  std::array<Source<W>, rows> s;
  std::array<V, rows> row;
  for (int a = 0; a < rows; ++a) {
    s[a] = source[a];
    row[a] = splat<W>(s[a].weight);
  }
  const V first_tap = splat<W>(weight[0]), second_tap = splat<W>(weight[1]);
  const auto rows_at = [&](int64_t i, auto checked) __attribute__((always_inline)) {
    const auto read = [&](int a) __attribute__((always_inline)) {
      return checked ? load_checked<W>(s[a], i, care.guarded) : load<W>(s[a].at + i);
    };
    V sum = row[0] * read(0);
    for (int a = 1; a < rows; ++a) sum = fma<W>(row[a], read(a), sum);
    return sum;
  };
  V low = rows_at(0, std::true_type{});  // the rows at i, which each step hands to the next
  const auto step = [&](int64_t i, auto checked) __attribute__((always_inline)) {
    const V high = rows_at(i + lanes<W>, checked);
    const V y = fma<W>(second_tap, columns.right(next_lanes<W>(low, high)), columns.left(low) * first_tap);
    columns.advance();
    low = high;
    return y;
  };
  const int64_t i = walk<lanes<W>, 2 * lanes<W>>(
      0, care.spill ? count : count - lanes<W> + 1, bounds.first, bounds.last,
      [&](int64_t i, auto checked) __attribute__((always_inline)) {
        if (!checked) {
          prefetch(s[rows - 1].at + i);
          prefetch(to + i);
        }
        store<W>(to + i, step(i, checked));
      });
  if (i < count) store<W>(to + i, step(i, std::true_type{}), count - i);
}

// to[i] = sum over `rows` sources and two adjacent columns, for 0 <= i < count. What the columns leave out is not read,
// however it looks. `rows` is 1, 2 or 4.
template <class W>
void blend(W* to, int64_t count, const Source<W>* source, int rows, const W* weight, const Columns<W>& columns,
           Care care) {
  const auto run = rows == 1 ? blend_rows<W, 1> : rows == 2 ? blend_rows<W, 2> : blend_rows<W, 4>;
  run(to, count, source, weight, columns, care);
}

// sums[a][b] += the sum over 0 <= i < count of grad[i] times source a at i + b. Lanes add in vectors for a while, then
// in float64.
template <class W, int rows>
void correlate(const W* grad, int64_t count, const Source<W>* source, Columns<W> columns, bool guarded,
               double (*sums)[2]) {
  using V = Vector<W>;
  const Bounds<W, rows> bounds(source);
  const int64_t last = std::min(bounds.last, count + lanes<W>);
  const Source<W> g{grad, 0, count, 0};
  std::array<Source<W>, rows> s;
  std::array<V, rows> low;
  for (int a = 0; a < rows; ++a) {
    s[a] = source[a];
    low[a] = load_checked<W>(s[a], 0, guarded);
  }
  for (int64_t i = 0; i < count;) {
    std::array<std::array<V, 2>, rows> sum{};
    i = walk<lanes<W>, 2 * lanes<W>>(
        i, std::min(count, i + 64 * lanes<W>), bounds.first, last,
        [&](int64_t i, auto checked) __attribute__((always_inline)) {
          const V v = checked ? load_checked<W>(g, i, guarded) : load<W>(grad + i);
          for (int a = 0; a < rows; ++a) {
            const int64_t next = i + lanes<W>;
            const V high = checked ? load_checked<W>(s[a], next, guarded) : load<W>(s[a].at + next);
            V left = columns.left(low[a]), right = columns.right(next_lanes<W>(low[a], high));
            if (checked) {  // what lies behind the end of grad must not be multiplied, even by zero
              left = keep_first<W>(left, count - i);
              right = keep_first<W>(right, count - i);
            }
            sum[a][0] = fma<W>(v, left, sum[a][0]);
            sum[a][1] = fma<W>(v, right, sum[a][1]);
            low[a] = high;
          }
          if (!checked) prefetch(s[rows - 1].at + i);
          columns.advance();
        });
    for (int a = 0; a < rows; ++a)
      for (int b = 0; b < 2; ++b) sums[a][b] += sum_lanes<W>(sum[a][b]);
  }
}

}  // namespace shiftconv
