// Planes of up to a few pages with zeros beyond their border: what a plane reads is laid down once for all channels of
// the same cell, as masks by vectors, and many planes run in one loop.
#pragma once

#include <array>
#include <vector>

#include "active_planes.h"

namespace shiftconv {

// The bits of either row that a pack keeps near the upper and lower edge of a plane.
template <class T>
using Edge = std::array<BitPack<T>, 2>;

// Lane i of a plane reads i + distance, for each of two rows, and the number after it.
template <class T>
struct Program {
  std::array<int64_t, 2> distance{};
  int64_t begin = 0, end = 0;  // packs that read both rows throughout
  std::vector<Edge<T>> edges;  // of the others, and of one more pack than there are
  std::array<std::vector<BitPack<T>>, 2> columns{};  // what they keep, by tap; packs repeat

  bool whole(int64_t pack) const { return begin <= pack && pack < end; }
};

// Of planes that run programs.
template <class T>
struct ProgramShape {
  int64_t area, packs;
  BitPack<T> inside;  // of the last pack that lies in the plane
};

// What one channel runs.
template <class T>
struct Step {
  const Program<T>* program;
  std::array<Wide<T>, 2> row, column;
};

// Not for float64, whose speed is not worth the time to compile them.
template <class T>
constexpr bool has_programs = !std::is_same_v<T, double>;

template <class T>
class Programs {
  using W = Wide<T>;
  static constexpr int64_t size = pack_size<T>;

 public:
  Programs(const ActiveMap<W>& map, int64_t images) {
    const int64_t kinds = map.h.distinct() * map.w.distinct();
    if (!has_programs<T> || !map.plain || !map.zeros || map.ndim != 2 || 2 * kinds > images * map.channels) return;
    shape_.area = map.h[0].count * map.w[0].count;
    shape_.packs = (shape_.area + size - 1) / size;
    if (shape_.packs > most_packs) return;
    programs_.resize(kinds);
    steps_.reserve(map.channels);
    for (int64_t c = 0; c < map.channels; ++c) {
      const AxisPlan &h = map.h[c], &w = map.w[c];
      Program<T>& program = programs_[map.h.which(c) * map.w.distinct() + map.w.which(c)];
      if (program.edges.empty()) start(program, h, w);
      // A single row counts as two halves of it.
      const std::array<W, 2>&row = map.h.weights(c), &column = map.w.weights(c);
      const bool two = h.taps() == 2;
      steps_.push_back({&program, {two ? row[h.tap(0)] : row[0] / 2, two ? row[h.tap(1)] : row[0] / 2},
                        {column[w.tap(0)], column[w.tap(w.taps() - 1)]}});
      single_ = single_ && !two && w.taps() == 1;
    }
    finish(images * map.channels);
  }

  const ProgramShape<T>& shape() const { return shape_; }
  const Step<T>* step(int64_t channel) const { return &steps_[channel]; }
  // Whether no channel has more than one tap.
  bool single() const { return single_; }
  // Whether all that is loaded for a plane lies in the tensor, and how many planes from there on are alike.
  int64_t suitable(int64_t plane) const { return first_ <= plane ? std::max<int64_t>(last_ - plane, 0) : 0; }

 private:
  static constexpr int64_t most_packs = 1 << 16;

  static void fill(BitPack<T>& bits, int64_t begin, int64_t end) {
    for (int64_t i = std::max<int64_t>(begin, 0); i < std::min(end, size); ++i)
      bits[i % phases<T>][i / phases<T>] = -1;
  }

  void start(Program<T>& program, const AxisPlan& h, const AxisPlan& w) {
    for (int b = 0; b < 2; ++b) {
      program.distance[b] = (h.delta() + std::min(b, h.taps() - 1)) * w.count + w.delta();
      program.columns[b] = column_bits<T>(w, b);
    }
    program.edges.resize(1);
    const auto [low, high] = std::minmax(program.distance[0], program.distance[1]);
    set_whole(program, low, high);
    low_ = std::min(low_, low);
    high_ = std::max(high_, high);
  }

  // For programs that load from `low` to `high` numbers away.
  void set_whole(Program<T>& program, int64_t low, int64_t high) const {
    program.begin = std::clamp<int64_t>((size - 1 - low) / size, 0, shape_.packs);
    program.end = std::clamp((shape_.area - std::max<int64_t>(high, 0)) / size, program.begin, shape_.packs);
  }

  void finish(int64_t planes) {
    // If that costs little, all programs take the same turns, which a processor can foresee.
    const bool alike = high_ - low_ < shape_.area / 2 || shape_.packs <= 8;
    fill(shape_.inside, 0, shape_.area - (shape_.packs - 1) * size);
    for (Program<T>& program : programs_) {
      if (program.edges.empty()) continue;
      program.edges.clear();
      if (alike) set_whole(program, low_, high_);
      for (int64_t k = 0; k <= shape_.packs; ++k) {
        if (program.whole(k)) continue;
        program.edges.push_back({});
        for (int b = 0; b < 2; ++b) {
          const int64_t at = k * size + program.distance[b];
          fill(program.edges.back()[b], -at, shape_.area - at);
        }
      }
    }
    const auto up = [&](int64_t elements) { return (elements + shape_.area - 1) / shape_.area; };
    first_ = up(-low_);
    last_ = planes - up(high_ + (shape_.packs + 1) * size) + 1;
  }

  std::vector<Program<T>> programs_;
  std::vector<Step<T>> steps_;
  bool single_ = true;
  ProgramShape<T> shape_{};
  int64_t low_ = 0, high_ = 0;  // how far from its own place a plane loads
  int64_t first_ = 0, last_ = 0;
};

// Bits of the columns, pack after pack.
template <class T>
class ColumnWalk {
 public:
  explicit ColumnWalk(const Program<T>& program)
      : left_(program.columns[0].data()),
        right_(program.columns[1].data()),
        count_(static_cast<int64_t>(program.columns[0].size())) {}

  Vector<Wide<T>> left(int f, Vector<Wide<T>> v) const { return keep_bits<Wide<T>>(left_[at_][f], v); }
  Vector<Wide<T>> right(int f, Vector<Wide<T>> v) const { return keep_bits<Wide<T>>(right_[at_][f], v); }
  void advance() { at_ = at_ + 1 < count_ ? at_ + 1 : 0; }

 private:
  const BitPack<T>*left_, *right_;
  int64_t count_, at_ = 0;
};

// Calls body(k, edge) for all packs; `edge` is that of pack k + 1, or null if that one reads both rows throughout.
template <class T, class Body>
[[gnu::always_inline]] inline void walk_packs(int64_t packs, const Program<T>& program, const Body& body) {
  const Edge<T>* edge = program.edges.data() + !program.whole(0);
  const int64_t begin = program.begin - 1, end = program.end - 1;
  for (int64_t k = 0; k < packs;) {
    for (; begin <= k && k < end; ++k) body(k, nullptr);
    if (k < packs) body(k++, edge++);
  }
}

// `planes` adjacent planes. The last pack of each is written whole, over what follows.
template <class T>
void run_steps(T* to, const T* from, int64_t planes, const Step<T>* step, const ProgramShape<T>& of_all) {
  using W = Wide<T>;
  using V = Vector<W>;
  constexpr int64_t size = pack_size<T>;
  const ProgramShape<T> shape = of_all;  // a store could change what is not local
  for (; planes > 0; --planes, ++step, to += shape.area, from += shape.area) {
    const Program<T>& p = *step->program;
    const T *const first = from + p.distance[0], *const second = from + p.distance[1];
    const V w0 = splat<W>(step->row[0]), w1 = splat<W>(step->row[1]);
    const V u0 = splat<W>(step->column[0]), u1 = splat<W>(step->column[1]);
    ColumnWalk<T> columns(p);
    const auto rows = [&](int64_t k, auto edge) __attribute__((always_inline)) {
      Pack<T> a = load_pack<T>(first + k * size), b = load_pack<T>(second + k * size);
      each_phase<T>([&](auto f) __attribute__((always_inline)) {
        if constexpr (!std::is_null_pointer_v<decltype(edge)>) {
          a[f] = keep_bits<W>((*edge)[0][f], a[f]);
          b[f] = keep_bits<W>((*edge)[1][f], b[f]);
        }
        a[f] = fma<W>(w1, b[f], w0 * a[f]);
      });
      return a;
    };
    Pack<T> low = p.whole(0) ? rows(0, nullptr) : rows(0, p.edges.data());
    walk_packs<T>(shape.packs, p, [&](int64_t k, auto edge) __attribute__((always_inline)) {
      prefetch(second + k * size);
      prefetch(to + k * size);
      const Pack<T> high = rows(k + 1, edge), next = next_pack<T>(low, high);
      Pack<T> y;
      each_phase<T>([&](auto f) __attribute__((always_inline)) {
        y[f] = fma<W>(u1, columns.right(f, next[f]), u0 * columns.left(f, low[f]));
      });
      columns.advance();
      store_pack<T>(to + k * size, y);
      low = high;
    });
  }
}

// The same where no channel has more than one tap, whose weight is one.
template <class T>
void move_steps(T* to, const T* from, int64_t planes, const Step<T>* step, const ProgramShape<T>& of_all) {
  constexpr int64_t size = pack_size<T>;
  const ProgramShape<T> shape = of_all;
  for (; planes > 0; --planes, ++step, to += shape.area, from += shape.area) {
    const Program<T>& p = *step->program;
    const T* const source = from + p.distance[0];
    ColumnWalk<T> columns(p);
    const Edge<T>* edge = p.edges.data();
    for (int64_t k = 0; k < shape.packs; ++k) {
      prefetch(source + k * size);
      prefetch(to + k * size);
      Pack<T> v = load_pack<T>(source + k * size);
      const bool whole = p.whole(k);
      each_phase<T>([&](auto f) __attribute__((always_inline)) {
        v[f] = columns.left(f, v[f]);
        if (!whole) v[f] = keep_bits<Wide<T>>((*edge)[0][f], v[f]);
      });
      edge += !whole;
      columns.advance();
      store_pack<T>(to + k * size, v);
    }
  }
}

// Writes the derivatives by the offsets of H and W, three numbers a plane of which the first is left out.
template <class T>
void correlate_steps(const T* grad, const T* x, int64_t planes, const Step<T>* step, const ProgramShape<T>& of_all,
                     double* derivative) {
  using W = Wide<T>;
  using V = Vector<W>;
  constexpr int64_t size = pack_size<T>;
  const ProgramShape<T> shape = of_all;
  for (; planes > 0; --planes, ++step, grad += shape.area, x += shape.area, derivative += 3) {
    const Program<T>& p = *step->program;
    const std::array<const T*, 2> row{x + p.distance[0], x + p.distance[1]};
    ColumnWalk<T> columns(p);
    const auto read = [&](int a, int64_t k, auto edge) __attribute__((always_inline)) {
      Pack<T> v = load_pack<T>(row[a] + k * size);
      if constexpr (!std::is_null_pointer_v<decltype(edge)>)
        each_phase<T>([&](auto f) __attribute__((always_inline)) { v[f] = keep_bits<W>((*edge)[a][f], v[f]); });
      return v;
    };
    Pack<T> low0 = p.whole(0) ? read(0, 0, nullptr) : read(0, 0, p.edges.data());
    Pack<T> low1 = p.whole(0) ? read(1, 0, nullptr) : read(1, 0, p.edges.data());
    V s00{}, s01{}, s10{}, s11{};  // by row and column
    walk_packs<T>(shape.packs, p, [&](int64_t k, auto edge) __attribute__((always_inline)) {
      prefetch(row[1] + k * size);
      const Pack<T> g = load_pack<T>(grad + k * size);
      const Pack<T> high0 = read(0, k + 1, edge), high1 = read(1, k + 1, edge);
      const Pack<T> next0 = next_pack<T>(low0, high0), next1 = next_pack<T>(low1, high1);
      // What lies behind the end must not be multiplied, even by zero. Only the last pack reaches it.
      const bool last = !std::is_null_pointer_v<decltype(edge)> && k == shape.packs - 1;
      each_phase<T>([&](auto f) __attribute__((always_inline)) {
        const auto inside = [&](V v) { return last ? keep_bits<W>(shape.inside[f], v) : v; };
        const V value = inside(g[f]);
        s00 = fma<W>(value, inside(columns.left(f, low0[f])), s00);
        s10 = fma<W>(value, inside(columns.left(f, low1[f])), s10);
        s01 = fma<W>(value, inside(columns.right(f, next0[f])), s01);
        s11 = fma<W>(value, inside(columns.right(f, next1[f])), s11);
      });
      columns.advance();
      low0 = high0;
      low1 = high1;
    });
    // A sum of no weight may be infinite.
    const auto weigh = [](W weight, V sum) { return weight == 0 ? V{} : splat<W>(weight) * sum; };
    derivative[1] = sum_lanes<W>(weigh(step->column[0], s00 - s10) + weigh(step->column[1], s01 - s11));
    derivative[2] = sum_lanes<W>(weigh(step->row[0], s00 - s01) + weigh(step->row[1], s10 - s11));
  }
}

// Adjacent planes of one image, from channel c on. `room`: how many numbers may be written, the planes being the first
// of them.
template <class T>
void run_programs(T* to, int64_t room, const T* from, int64_t planes, const Programs<T>& programs, int64_t c) {
  const ProgramShape<T>& shape = programs.shape();
  const auto run = programs.single() ? move_steps<T> : run_steps<T>;
  const int64_t together = shape.packs * pack_size<T>;
  const int64_t whole = room < together ? 0 : std::min((room - together) / shape.area + 1, planes);
  run(to, from, whole, programs.step(c), shape);
  if (whole == planes) return;
  std::vector<T> other(together);  // what the last pack would be written over is not ours
  for (int64_t i = whole; i < planes; ++i) {
    run(other.data(), from + i * shape.area, 1, programs.step(c + i), shape);
    std::memcpy(static_cast<void*>(to + i * shape.area), other.data(), shape.area * sizeof(T));
  }
}

}  // namespace shiftconv
