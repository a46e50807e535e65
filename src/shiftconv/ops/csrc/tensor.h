// What every CPU kernel needs from LibTorch, through its stable ABI only (torch 2.11 and later).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it under its old name only
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace shiftconv {

using torch::stable::Tensor;

// Sizes of a feature map [N, C, *S] with absent spatial axes as 1, in front of the present ones.
struct Shape {
  int64_t n, c, d, h, w;
  int64_t volume() const { return d * h * w; }
};

inline Shape shape_of(const Tensor& x) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(3 <= rank && rank <= 5, "expected x [N, C, *S] with 3 to 5 axes, got ", rank);
  const auto s = x.sizes();
  return {s[0], s[1], rank > 4 ? s[2] : 1, rank > 3 ? s[rank - 2] : 1, s[rank - 1]};
}

// Whether the elements of x lie densely with the channels innermost; size-1 axes may have any stride.
inline bool is_channels_last(const Tensor& x) {
  const int64_t rank = x.dim();
  if (rank < 4) return false;
  const auto size = x.sizes(), stride = x.strides();
  int64_t expected = 1;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t axis = i == 0 ? 1 : i == rank - 1 ? 0 : rank - i;  // C, W, H, D, N
    if (size[axis] != 1 && stride[axis] != expected) return false;
    expected *= size[axis];
  }
  return true;
}

// A feature map that is dense in one of the two memory formats; x itself if it is, else a copy of it.
struct Dense {
  Tensor tensor;
  bool channels_last;

  explicit Dense(const Tensor& x) : tensor(x), channels_last(false) {
    if (x.is_contiguous()) return;
    channels_last = is_channels_last(x);
    if (channels_last) return;
    using torch::headeronly::MemoryFormat;
    channels_last = x.dim() > 3 && x.size(1) > 1 && x.stride(1) == 1;  // as shift.memory_format in Python
    const auto last = x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    tensor = torch::stable::contiguous(x, channels_last ? last : MemoryFormat::Contiguous);
  }
};

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline int64_t element_size(const Tensor& x) {
  return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(x)));
}

// Uninitialised CPU memory with the sizes, strides and dtype of a dense x.
inline Tensor empty_as(const Tensor& x) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), x.sizes().data(), x.strides().data(), dtype_of(x), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Uninitialised CPU memory of other sizes in the dtype of x, dense in one of the two memory formats.
inline Tensor empty_of(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const size_t rank = sizes.size();
  std::vector<int64_t> strides(rank);
  int64_t next = 1;
  for (size_t i = 0; i < rank; ++i) {
    const size_t innermost_first = rank - 1 - i;
    const size_t axis = !channels_last ? innermost_first : i == 0 ? 1 : i == rank - 1 ? 0 : rank - i;
    strides[axis] = next;
    next *= std::max<int64_t>(sizes[axis], 1);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(rank), sizes.data(), strides.data(),
                                                         dtype_of(x), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Run body(begin, end) over [0, count) on torch's threads, in pieces of at least 128 KiB of `bytes` per step.
template <class Body>
void parallel_for(int64_t count, int64_t bytes, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 17) / std::max<int64_t>(bytes, 1));
  if (count <= grain)
    body(int64_t{0}, count);
  else
    torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace shiftconv
