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

constexpr int64_t window_size = 64;

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

// All windows read the same distance away; mask by window.
inline void run_uniform(char* to, const char* from, int64_t bytes, const uint64_t* mask) {
  const int64_t whole = bytes / window_size;
  for (int64_t i = 0; i < whole; ++i) {
    __builtin_prefetch(to + i * window_size + fetch_ahead, 1);
    __builtin_prefetch(from + i * window_size + fetch_ahead);
    const __m512i read = load_whole(from + i * window_size);
    _mm512_storeu_si512(to + i * window_size, _mm512_and_si512(_mm512_movm_epi8(mask[i]), read));
  }
  if (bytes % window_size) {
    const int64_t at = bytes - window_size;
    _mm512_storeu_si512(to + at, _mm512_and_si512(_mm512_movm_epi8(mask[whole]), load_whole(from + at)));
  }
}
#else
constexpr bool has_windows = false;

inline void run_uniform(char*, const char*, int64_t, const uint64_t*) {}

template <int blocks>
inline void run_windows(char*, const char*, int64_t, const Window*, int64_t, const Step*, int64_t) {}
#endif

}  // namespace shiftconv
