// Planes of up to a few pages with zeros beyond their border: what a plane reads is laid down once for all channels of
// the same cell, as masks by vectors, and many planes run in one loop.
#pragma once

#include <array>
#include <vector>

#include "active_planes.h"

namespace shiftconv {

// Which lanes of a vector read at all: by tap of the columns, and of the rows. Packs have one for each of their vectors.
struct Masks {
  std::array<uint16_t, 2> column, row;
};

// Lane i of a plane reads i + distance, for each of two rows, and the number after it.
template <class T>
struct Program {
  std::array<int64_t, 2> distance;
  int64_t begin, end;        // packs that read both rows throughout
  std::vector<Masks> masks;  // of one more pack than there are
  // In those packs, where masks would be slow: the columns by tap, packs repeating. An empty one keeps everything.
  std::array<std::vector<BitPack<T>>, 2> columns{};
};

// What one channel runs.
template <class T>
struct Step {
  const Program<T>* program;
  std::array<Wide<T>, 2> row, column;
};

template <class T>
class Programs {
  using W = Wide<T>;

 public:
  Programs(const ActiveMap<W>& map, int64_t images) {
    const int64_t kinds = map.h.distinct() * map.w.distinct();
    if (!map.plain || !map.zeros || map.ndim != 2 || 2 * kinds > images * map.channels) return;
    area_ = map.h[0].count * map.w[0].count;
    const int64_t packs = (area_ + pack_size<T> - 1) / pack_size<T>;
    if (packs * kinds * phases<T> > most_masks) return;
    programs_.resize(kinds);
    int64_t low = 0, high = 0;  // how far from its own place a plane loads
    for (int64_t c = 0; c < map.channels; ++c) {
      const AxisPlan &h = map.h[c], &w = map.w[c];
      Program<T>& program = programs_[map.h.which(c) * map.w.distinct() + map.w.which(c)];
      if (program.masks.empty()) {
        build(program, h, w, packs);
        low = std::min({low, program.distance[0], program.distance[1]});
        high = std::max({high, program.distance[0], program.distance[1]});
      }
      const std::array<W, 2>&row = map.h.weights(c), &column = map.w.weights(c);
      steps_.push_back({&program, {row[h.tap(0)], row[h.tap(h.taps() - 1)]},
                        {column[w.tap(0)], column[w.tap(w.taps() - 1)]}});
      single_ = single_ && h.taps() == 1 && w.taps() == 1;
    }
    const auto up = [&](int64_t elements) { return (elements + area_ - 1) / area_; };
    first_ = up(-low);
    last_ = images * map.channels - up(high + (packs + 1) * pack_size<T>) + 1;
  }

  const Step<T>& step(int64_t channel) const { return steps_[channel]; }
  // Whether no channel has more than one tap.
  bool single() const { return single_; }

  int64_t area() const { return area_; }
  // Whether all that is loaded for a plane lies in the tensor.
  bool suits(int64_t plane) const { return first_ <= plane && plane < last_; }

 private:
  static constexpr int64_t most_masks = 32768;

  static void build(Program<T>& program, const AxisPlan& h, const AxisPlan& w, int64_t packs) {
    const int64_t area = h.count * w.count;
    const auto row = [&](int64_t i, int b) { return 0 <= i + program.distance[b] && i + program.distance[b] < area; };
    for (int b = 0; b < 2; ++b)
      program.distance[b] = (h.delta() + std::min(b, h.taps() - 1)) * w.count + w.delta();
    program.masks.resize((packs + 1) * phases<T>);
    int64_t column = 0;
    for (int64_t i = 0; i < (packs + 1) * pack_size<T>; ++i, column = column + 1 < w.count ? column + 1 : 0) {
      Masks& masks = program.masks[i / pack_size<T> * phases<T> + i % phases<T>];
      const auto bit = static_cast<uint16_t>(1u << i % pack_size<T> / phases<T>);
      for (int b = 0; b < h.taps(); ++b)
        if (row(i, b)) masks.row[b] |= bit;
      for (int b = 0; b < w.taps(); ++b) {
        const int64_t at = column + w.delta() + b;
        if (i < area && 0 <= at && at < w.count && (h.taps() + w.taps() > 2 || row(i, 0))) masks.column[b] |= bit;
      }
    }
    for (int b = 0; b < 2; ++b)
      if (w.delta() + b != 0 || b >= w.taps()) program.columns[b] = column_bits<T>(w, b, packs);
    const auto up = [](int64_t i) { return (i + pack_size<T> - 1) / pack_size<T>; };
    const auto [near, far] = std::minmax(program.distance[0], program.distance[1]);
    program.begin = h.taps() == 2 ? std::clamp<int64_t>(up(-near), 0, packs + 1) : 0;
    program.end = h.taps() == 2 ? std::clamp((area - far) / pack_size<T>, program.begin, packs + 1) : 0;
  }

  std::vector<Program<T>> programs_;
  std::vector<Step<T>> steps_;
  bool single_ = true;
  int64_t area_ = 0, first_ = 0, last_ = 0;
};

// Calls body(k, whole) for 0 <= k < count, `whole` being true_type where begin <= k < end.
template <class Body>
[[gnu::always_inline]] inline void parts(int64_t count, int64_t begin, int64_t end, const Body& body) {
  int64_t k = 0;
  while (k < count) {
    for (; begin <= k && k < std::min(end, count); ++k) body(k, std::true_type{});
    if (k < count) body(k++, std::false_type{});
  }
}

// The columns of a program from a pack on.
template <class T>
class ColumnWalk {
 public:
  ColumnWalk(const std::vector<BitPack<T>>& columns, int64_t pack)
      : begin_(columns.data()), end_(begin_ + columns.size()), at_(begin_) {
    if (!columns.empty()) at_ += std::max<int64_t>(pack, 0) % columns.size();
  }

  Vector<Wide<T>> keep(int f, Vector<Wide<T>> v) const { return keep_bits<Wide<T>>((*at_)[f], v); }
  void advance() { at_ = at_ + 1 == end_ ? begin_ : at_ + 1; }

 private:
  const BitPack<T>*begin_, *end_, *at_;
};

// One plane. `left`, `right`: whether some columns of the first and second tap lie outside. The last pack is written
// whole, over what follows.
template <class T, bool left, bool right>
void run_step(T* to, const T* from, int64_t packs, const Step<T>& step) {
  using W = Wide<T>;
  using V = Vector<W>;
  constexpr int64_t size = pack_size<T>;
  const Program<T>& p = *step.program;
  const Masks* const masks = p.masks.data();
  const T *const first = from + p.distance[0], *const second = from + p.distance[1];
  const V w0 = splat<W>(step.row[0]), w1 = splat<W>(step.row[1]);
  const V u0 = splat<W>(step.column[0]), u1 = splat<W>(step.column[1]);
  ColumnWalk<T> lefts(p.columns[0], p.begin - 1), rights(p.columns[1], p.begin - 1);
  const auto rows = [&](int64_t k, auto whole) __attribute__((always_inline)) {
    Pack<T> a = load_pack<T>(first + k * size);
    const Pack<T> b = load_pack<T>(second + k * size);
#pragma GCC unroll 2
    for (int f = 0; f < phases<T>; ++f) {
      const auto& row = masks[k * phases<T> + f].row;
      if (whole)
        a[f] = fma<W>(w1, b[f], w0 * a[f]);
      else
        a[f] = fma<W>(mask_of<W>(row[1]), w1, b[f], keep<W>(mask_of<W>(row[0]), w0 * a[f]));
    }
    return a;
  };
  Pack<T> low = rows(0, std::false_type{});
  parts(packs, p.begin - 1, p.end - 1, [&](int64_t k, auto whole) __attribute__((always_inline)) {
    prefetch(second + k * size);
    prefetch(to + k * size);
    const Pack<T> high = rows(k + 1, whole), next = next_pack<T>(low, high);
    Pack<T> y;
#pragma GCC unroll 2
    for (int f = 0; f < phases<T>; ++f) {
      const auto& column = masks[k * phases<T> + f].column;
      if (whole)
        y[f] = fma<W>(u1, right ? rights.keep(f, next[f]) : next[f],
                      u0 * (left ? lefts.keep(f, low[f]) : low[f]));
      else
        y[f] = fma<W>(mask_of<W>(column[1]), u1, next[f], keep<W>(mask_of<W>(column[0]), u0 * low[f]));
    }
    if (whole && left) lefts.advance();
    if (whole && right) rights.advance();
    store_pack<T>(to + k * size, y);
    low = high;
  });
}

// The same where no channel has more than one tap, whose weight is one.
template <class T>
void move_step(T* to, const T* from, int64_t packs, const Step<T>& step) {
  using W = Wide<T>;
  constexpr int64_t size = pack_size<T>;
  const Program<T>& p = *step.program;
  const Masks* mask = p.masks.data();
  const T* const source = from + p.distance[0];
  for (int64_t k = 0; k < packs; ++k) {
    prefetch(source + k * size);
    prefetch(to + k * size);
    Pack<T> v = load_pack<T>(source + k * size);
#pragma GCC unroll 2
    for (int f = 0; f < phases<T>; ++f) v[f] = keep<W>(mask_of<W>((mask++)->column[0]), v[f]);
    store_pack<T>(to + k * size, v);
  }
}

// Writes the derivatives by the offsets of H and W, of one plane.
template <class T, bool left, bool right>
void correlate_step(const T* grad, const T* x, int64_t area, const Step<T>& step, double* derivative) {
  using W = Wide<T>;
  using V = Vector<W>;
  constexpr int64_t size = pack_size<T>;
  const Program<T>& p = *step.program;
  const Masks* const masks = p.masks.data();
  const std::array<const T*, 2> row{x + p.distance[0], x + p.distance[1]};
  ColumnWalk<T> lefts(p.columns[0], p.begin - 1), rights(p.columns[1], p.begin - 1);
  const auto read = [&](int a, int64_t k, auto whole) __attribute__((always_inline)) {
    Pack<T> v = load_pack<T>(row[a] + k * size);
#pragma GCC unroll 2
    for (int f = 0; f < phases<T>; ++f)
      if (!whole) v[f] = keep<W>(mask_of<W>(masks[k * phases<T> + f].row[a]), v[f]);
    return v;
  };
  Pack<T> low0 = read(0, 0, std::false_type{}), low1 = read(1, 0, std::false_type{});
  V s00{}, s01{}, s10{}, s11{};  // by row and column
  parts((area + size - 1) / size, p.begin - 1, std::min(p.end - 1, area / size), [&](int64_t k, auto whole) __attribute__((always_inline)) {
    prefetch(row[1] + k * size);
    const Pack<T> g = load_pack<T>(grad + k * size);
    const Pack<T> high0 = read(0, k + 1, whole), high1 = read(1, k + 1, whole);
    const Pack<T> next0 = next_pack<T>(low0, high0), next1 = next_pack<T>(low1, high1);
#pragma GCC unroll 2
    for (int f = 0; f < phases<T>; ++f) {
      const auto& column = masks[k * phases<T> + f].column;
      if (whole) {
        const auto l = [&](V v) { return left ? lefts.keep(f, v) : v; };
        const auto r = [&](V v) { return right ? rights.keep(f, v) : v; };
        s00 = fma<W>(g[f], l(low0[f]), s00);
        s10 = fma<W>(g[f], l(low1[f]), s10);
        s01 = fma<W>(g[f], r(next0[f]), s01);
        s11 = fma<W>(g[f], r(next1[f]), s11);
      } else {
        const auto l = mask_of<W>(column[0]), r = mask_of<W>(column[1]);
        s00 = fma<W>(l, g[f], low0[f], s00);
        s10 = fma<W>(l, g[f], low1[f], s10);
        s01 = fma<W>(r, g[f], next0[f], s01);
        s11 = fma<W>(r, g[f], next1[f], s11);
      }
    }
    if (whole && left) lefts.advance();
    if (whole && right) rights.advance();
    low0 = high0;
    low1 = high1;
  });
  // A sum of no weight may be infinite.
  const auto weigh = [](W weight, V sum) { return weight == 0 ? V{} : splat<W>(weight) * sum; };
  derivative[0] = sum_lanes<W>(weigh(step.column[0], s00 - s10) + weigh(step.column[1], s01 - s11));
  derivative[1] = sum_lanes<W>(weigh(step.row[0], s00 - s01) + weigh(step.row[1], s10 - s11));
}

// Which of the functions above channel c takes. `room`: how many numbers may be written, of which the plane is the first
// part.
template <class T>
void run_program(T* to, int64_t room, const T* from, const Programs<T>& programs, int64_t c) {
  const Step<T>& step = programs.step(c);
  const int64_t area = programs.area(), packs = (area + pack_size<T> - 1) / pack_size<T>;
  const bool left = !step.program->columns[0].empty(), right = !step.program->columns[1].empty();
  const auto run = programs.single() ? move_step<T>
                   : left && right   ? run_step<T, true, true>
                   : left            ? run_step<T, true, false>
                                     : run_step<T, false, true>;
  if (packs * pack_size<T> <= room) return run(to, from, packs, step);
  std::vector<T> other(packs * pack_size<T>);
  run(other.data(), from, packs, step);
  std::memcpy(static_cast<void*>(to), other.data(), area * sizeof(T));
}

template <class T>
void correlate_program(const T* grad, const T* x, const Programs<T>& programs, int64_t c, double* derivative) {
  const Step<T>& step = programs.step(c);
  const bool left = !step.program->columns[0].empty(), right = !step.program->columns[1].empty();
  const auto run = left && right ? correlate_step<T, true, true>
                   : left        ? correlate_step<T, true, false>
                                 : correlate_step<T, false, true>;
  run(grad, x, programs.area(), step, derivative);
}

}  // namespace shiftconv
