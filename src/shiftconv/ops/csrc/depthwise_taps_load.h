// Planes of maps in either memory format, copied to where the sums of the weight gradient read them.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "depthwise_problem.h"
#include "depthwise_taps_tile.h"

namespace shiftconv::tapwise {

constexpr int64_t channel_block = 16;  // channels of a channels_last map that are read together

// One image of a map, or two that share cells; the second may be absent.
template <class T>
struct Images {
  const T *first, *second;
};

template <class T>
inline Cell<T> cell_of(const T* first, const T* second) {
  if constexpr (images_of<Cell<T>> == 2)
    return {*first, second ? *second : T(0.0f)};
  else
    return static_cast<Cell<T>>(*first);
}

#if defined(SHIFTCONV_PAIRS)
inline __m512i load_pairs(const c10::BFloat16* first, const c10::BFloat16* second) {
  const auto half = [](const void* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  };
  return second ? _mm512_or_si512(half(first), _mm512_slli_epi32(half(second), 16)) : half(first);
}
#endif

// As many cells as a vector holds.
template <class T>
inline typename Dot<Cell<T>>::Operand load_cells(const T* first, [[maybe_unused]] const T* second) {
#if defined(SHIFTCONV_PAIRS)
  if constexpr (std::is_same_v<Cell<T>, Pair>)
    return load_pairs(first, second);
  else
#endif
    return load<T>(first);
}

// Cells of a row that lies densely. Up to a vector is written behind rows that are shorter than that.
template <class T>
inline void copy_row(Images<T> from, int64_t columns, Cell<T>* to) {
  constexpr int64_t width = width_of<Cell<T>>;
  const auto copy = [&](int64_t at) {
    const auto cells = load_cells<T>(from.first + at, from.second ? from.second + at : nullptr);
    std::memcpy(static_cast<void*>(to + at), &cells, sizeof(cells));
  };
  if (columns < width) {
    for (int64_t i = 0; i < columns; ++i) to[i] = cell_of<T>(from.first + i, from.second ? from.second + i : nullptr);
    return;
  }
  for (int64_t at = 0; at + width <= columns; at += width) copy(at);
  if (columns % width) copy(columns - width);
}

#if defined(SHIFTCONV_AVX512)
// Sixteen columns of the channels `skip` to `skip + channels` of sixteen, to rows `plane` cells apart.
template <class T>
inline void gather_block(Images<T> from, int64_t column, int64_t columns, int64_t skip, int64_t channels, Cell<T>* to,
                         int64_t plane) {
  Vector<float> block[16];
  for (int64_t i = 0; i < 16; ++i)
    block[i] = i < columns ? (Vector<float>)load_cells<T>(from.first + i * column,
                                                          from.second ? from.second + i * column : nullptr)
                           : Vector<float>{};
  transpose<float>(block);
  for (int64_t k = 0; k < channels; ++k) std::memcpy(static_cast<void*>(to + k * plane), &block[skip + k], 64);
}
#endif

// A row of `channels` channels from `channel` on, of a map in which the channels lie densely.
template <class T>
inline void gather_row(const Map<const T>& map, Images<T> from, int64_t total, Range channels, int64_t columns,
                       Cell<T>* to, int64_t plane) {
#if defined(SHIFTCONV_AVX512)
  if constexpr (sizeof(Cell<T>) == 4)
    if (total >= channel_block) {
      const int64_t skip = std::max<int64_t>(0, channels.begin + channel_block - total);
      from.first += channels.begin - skip;
      if (from.second) from.second += channels.begin - skip;
      const auto gather = [&](int64_t at) {
        const Images<T> block{from.first + at * map.column, from.second ? from.second + at * map.column : nullptr};
        gather_block<T>(block, map.column, columns - at, skip, channels.size(), to + at, plane);
      };
      for (int64_t at = 0; at + 16 <= columns; at += 16) gather(at);
      if (columns % 16) gather(std::max<int64_t>(0, columns - 16));
      return;
    }
#endif
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t at = j * map.column + c * map.channel;
      to[(c - channels.begin) * plane + j] = cell_of<T>(from.first + at, from.second ? from.second + at : nullptr);
    }
}

// Where the cells of some channels of an image lie: [channels, rows, columns] with steps in cells.
template <class C>
struct Planes {
  C* data;
  int64_t plane, row;
};

// Rows `rows` of a map of `size` rows and `columns` columns; rows outside become zero.
template <class T>
void fill_planes(const Map<const T>& map, int64_t image, int64_t images, int64_t total, Range channels, Range rows,
                 int64_t size, int64_t columns, const Planes<Cell<T>>& to) {
  const bool both = images_of<Cell<T>> == 2 && image + 1 < images;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    Cell<T>* const row = to.data + (i - rows.begin) * to.row;
    if (i < 0 || i >= size) {
      for (int64_t k = 0; k < channels.size(); ++k)
        std::memset(static_cast<void*>(row + k * to.plane), 0, columns * sizeof(*row));
      continue;
    }
    const T* const first = map.data + image * map.image + i * map.row;
    const Images<T> from{first, both ? first + map.image : nullptr};
    if (map.column != 1) {
      gather_row<T>(map, from, total, channels, columns, row, to.plane);
      continue;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t at = c * map.channel;
      copy_row<T>({from.first + at, from.second ? from.second + at : nullptr}, columns,
                  row + (c - channels.begin) * to.plane);
    }
  }
}

// What a thread is to read next, as runs of lines at even distances, handed out in pieces.
class LinesAhead {
 public:
  // The lines of rows `rows` that lie inside a map of `size` rows and `columns` columns, of one image.
  template <class T>
  void add(const Map<const T>& map, int64_t image, Range channels, Range rows, int64_t size, int64_t columns) {
    const Range inside{std::max<int64_t>(rows.begin, 0), std::min(rows.end, size)};
    if (inside.size() <= 0) return;
    const char* const from = reinterpret_cast<const char*>(map.plane(image, channels.begin) + inside.begin * map.row);
    const int64_t pixels = inside.size() * columns;
    if (map.column == 1)
      runs_.push_back({from, 64, (pixels * int64_t{sizeof(T)} + 63) / 64});
    else
      for (int64_t at : {int64_t{0}, channels.size() * int64_t{sizeof(T)} - 1})
        runs_.push_back({from + at, map.column * int64_t{sizeof(T)}, pixels});
  }

  // At most `count` lines, or pairs of lines where they lie apart, which the processor does not foresee; if none are
  // left, one that costs nothing.
  template <class C>
  void hand_out(int64_t count, TileRun<C>& to) {
    to.ahead = reinterpret_cast<const char*>(to.x), to.ahead_step = to.ahead_other = 0;
    if (next_ == runs_.size()) return;
    Lines& run = runs_[next_];
    const int64_t each = run.step == 64 ? 1 : 2;
    to.ahead = run.from, to.ahead_step = each * run.step, to.ahead_other = (each - 1) * run.step;
    run.from += count * to.ahead_step, run.count -= count * each;
    if (run.count <= 0) ++next_;
  }

 private:
  struct Lines {
    const char* from;
    int64_t step, count;
  };
  std::vector<Lines> runs_;
  size_t next_ = 0;
};

// Memory of a thread that is kept for the next call, aligned to cache lines.
class TapMemory {
 public:
  char* bytes(int64_t count) {
    if (count > size_) {
      held_.reset(static_cast<char*>(::operator new[](count, std::align_val_t{64})));
      size_ = count;
    }
    return held_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Free> held_;
  int64_t size_ = 0;
};

}  // namespace shiftconv::tapwise
