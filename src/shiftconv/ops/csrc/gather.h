// Moving bytes: short runs without a call, and blocks that are gathered from several places by 64-byte vectors.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace shiftconv {

template <int64_t size>
inline void move_ends(char* to, const char* from, int64_t bytes) {  // size <= bytes <= 2 * size
  std::array<char, size> head, tail;
  std::memcpy(head.data(), from, size);
  std::memcpy(tail.data(), from + bytes - size, size);
  std::memcpy(to, head.data(), size);
  std::memcpy(to + bytes - size, tail.data(), size);
}

// memcpy, whose call costs as much as the move for the small planes of late stages.
inline void move_bytes(void* to, const void* from, int64_t bytes) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  if (bytes > 1024) {
    std::memcpy(t, f, static_cast<size_t>(bytes));
  } else if (bytes >= 64) {
    for (; bytes > 128; bytes -= 64, t += 64, f += 64) std::memcpy(t, f, 64);
    move_ends<64>(t, f, bytes);
  } else if (bytes >= 32) {
    move_ends<32>(t, f, bytes);
  } else if (bytes >= 16) {
    move_ends<16>(t, f, bytes);
  } else if (bytes >= 8) {
    move_ends<8>(t, f, bytes);
  } else if (bytes >= 4) {
    move_ends<4>(t, f, bytes);
  } else {
    for (int64_t i = 0; i < bytes; ++i) t[i] = f[i];
  }
}

// A block of bytes is written in windows of 64; where its size is no multiple, the last window overlaps the one before.
// Each window is blended from one load per step. Masked loads and stores would be exact at the ends of a tensor, but
// cost several times as much on AMD Zen 5, so loads are whole and the caller keeps them inside the tensor.
struct Step {
  int64_t delta;  // bytes from the place that is written to the one that is read
  uint64_t mask;  // bytes of the window that this step provides
};

struct Window {
  int64_t at;
  int64_t steps;
  uint64_t covered;  // union of the masks; the other bytes are zero
};

// What a window takes from the pixels on its left and on its right; the rest is its own.
struct Sides {
  uint64_t left, right;
};

// Where the pixels beside a run of pixels lie, in bytes from its first one, or `nothing` for zeros.
struct Ends {
  int64_t left, right;
};

// A block whose windows all read `delta` bytes away; a mask by window.
struct Uniform {
  int64_t delta;
  const uint64_t* mask;
};

constexpr int64_t window_size = 64;
constexpr int64_t nothing = INT64_MIN;  // in place of a delta: zeros

inline int64_t count_windows(int64_t bytes) { return (bytes + window_size - 1) / window_size; }

inline int64_t window_at(int64_t index, int64_t bytes) { return std::min(index * window_size, bytes - window_size); }

#if defined(__AVX512BW__)
constexpr bool has_windows = true;

// A whole load, hidden from the compiler, which would fuse it with the blend that follows into a slower masked load.
inline __m512i load_whole(const char* from) {
  __m512i bytes = _mm512_loadu_si512(from);
  __asm__("" : "+v"(bytes));
  return bytes;
}

// The bytes at `from` where the mask says so. A blend reads its operand whole; the compiler would choose a masked load,
// which is several times slower where tested (AMD Zen 5).
inline void blend(__m512i& bytes, uint64_t mask, const char* from) {
  using Anywhere [[gnu::aligned(1), gnu::may_alias]] = __m512i;
  __asm__("vpblendmb %1, %0, %0 %{%2%}"
          : "+v"(bytes)
          : "m"(*reinterpret_cast<const Anywhere*>(from)), "Yk"(static_cast<__mmask64>(mask)));
}

constexpr int64_t fetch_ahead = 4096;  // bytes

// `blocks` blocks, `stride` bytes apart, that gather alike: a step is fetched once for all of them.
// Several streams are read, so the one that touches memory first, `farthest` bytes on, is prefetched: half the time.
template <int blocks>
inline void run_windows(char* to, const char* from, int64_t stride, const Window* windows, int64_t count,
                        const Step* step, int64_t farthest) {
  for (const Window* w = windows; w < windows + count; ++w) {
    const char* source = from + w->at;
#pragma GCC unroll 8
    for (int i = 0; i < blocks; ++i) {
      __builtin_prefetch(source + farthest + fetch_ahead + i * stride);
      __builtin_prefetch(to + w->at + fetch_ahead + i * stride, 1);
    }
    __m512i bytes[blocks];
    const char* at = source + step->delta;
#pragma GCC unroll 8
    for (int i = 0; i < blocks; ++i) bytes[i] = load_whole(at + i * stride);
    const Step* const end = step + w->steps;
    for (++step; step < end; ++step) {
      at = source + step->delta;
      const uint64_t mask = step->mask;
#pragma GCC unroll 8
      for (int i = 0; i < blocks; ++i) blend(bytes[i], mask, at + i * stride);
    }
    if (~w->covered) {
      const __m512i covered = _mm512_movm_epi8(w->covered);
#pragma GCC unroll 8
      for (int i = 0; i < blocks; ++i) bytes[i] = _mm512_and_si512(bytes[i], covered);
    }
#pragma GCC unroll 8
    for (int i = 0; i < blocks; ++i) _mm512_storeu_si512(to + w->at + i * stride, bytes[i]);
  }
}

// One window of one pixel from `steps` rows, or from w.steps rows where steps is 0.
template <int steps>
inline __m512i gather_rows(const char* from, const Window& w, const Step* step) {
  __m512i bytes = _mm512_setzero_si512();
  const int64_t count = steps > 0 ? steps : w.steps;
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i) blend(bytes, step[i].mask, from + step[i].delta);
  return bytes;
}

// One window of `pixels` adjacent pixels: rows first, and then every result serves three pixels, from registers.
template <int pixels, int steps>
inline void run_window(char* to, const char* from, int64_t stride, const Window& w, const Step* step, Sides sides,
                       Ends ends) {
  std::array<Step, steps> held;  // else read anew after every store, for all that the compiler knows
  for (int i = 0; i < steps; ++i) held[i] = step[i];
  const auto rows = [&](const char* at) { return gather_rows<steps>(at, w, steps > 0 ? held.data() : step); };
  const __m512i zero = _mm512_setzero_si512();
  __m512i left = ends.left == nothing ? zero : rows(from + ends.left), bytes = rows(from);
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i) {
    const __m512i right = i < pixels - 1          ? rows(from + (i + 1) * stride)
                          : ends.right == nothing ? zero
                                                  : rows(from + ends.right);
    const __m512i both = _mm512_mask_mov_epi8(bytes, sides.left, left);
    _mm512_storeu_si512(to + i * stride, _mm512_mask_mov_epi8(both, sides.right, right));
    left = bytes;
    bytes = right;
  }
}

// All windows of `pixels` adjacent pixels. Several streams are read, so the one that touches memory first, `farthest`
// bytes on, is prefetched.
template <int pixels>
void run_sides(char* to, const char* from, int64_t stride, const Window* windows, int64_t count, const Step* step,
               int64_t farthest, const Sides* sides, Ends ends) {
  for (int64_t k = 0; k < count; ++k) {
    const Window& w = windows[k];
    char* const t = to + w.at;
    const char* const f = from + w.at;
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) {
      __builtin_prefetch(f + farthest + fetch_ahead + i * stride);
      __builtin_prefetch(t + fetch_ahead + i * stride, 1);
    }
    if (w.steps == 1)
      run_window<pixels, 1>(t, f, stride, w, step, sides[k], ends);
    else if (w.steps == 2)
      run_window<pixels, 2>(t, f, stride, w, step, sides[k], ends);
    else if (w.steps == 3)
      run_window<pixels, 3>(t, f, stride, w, step, sides[k], ends);
    else
      run_window<pixels, 0>(t, f, stride, w, step, sides[k], ends);
    step += w.steps;
  }
}

// Adjacent blocks whose windows all read the same distance away, by the block's group; `windows` of them, or as many as
// it takes where windows is 0. All that the loop needs is local: every store could change the rest.
template <int windows>
void run_uniform(char* to, const char* from, int64_t bytes, int64_t blocks, const int32_t* group, const Uniform* all) {
  const int64_t whole = windows > 0 ? windows - 1 : count_windows(bytes) - 1, tail = bytes - window_size;
  const auto move = [](char* t, const char* f, uint64_t mask) {
    __builtin_prefetch(t + fetch_ahead, 1);
    __builtin_prefetch(f + fetch_ahead);
    _mm512_storeu_si512(t, _mm512_maskz_mov_epi8(mask, load_whole(f)));
  };
  for (int64_t i = 0; i < blocks; ++i, to += bytes, from += bytes) {
    const Uniform& u = all[group[i]];
    const char* const source = from + u.delta;
    const uint64_t* const mask = u.mask;
#pragma GCC unroll 4
    for (int64_t k = 0; k < whole; ++k) move(to + k * window_size, source + k * window_size, mask[k]);
    move(to + tail, source + tail, mask[whole]);
  }
}
#else
constexpr bool has_windows = false;

template <int windows>
void run_uniform(char*, const char*, int64_t, int64_t, const int32_t*, const Uniform*) {}

template <int blocks>
inline void run_windows(char*, const char*, int64_t, const Window*, int64_t, const Step*, int64_t) {}

template <int pixels>
void run_sides(char*, const char*, int64_t, const Window*, int64_t, const Step*, int64_t, const Sides*, Ends) {}
#endif

}  // namespace shiftconv
