"""Shifts by whole pixels: with given offsets, or grouped, by the taps of a k x k window.

Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018,
arXiv:1711.08141, section 3; the interleaved grouping is the one that the authors' released weights need.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.nn.arguments import per_axis
from shiftconv.nn.base import IntegerShift, dense_kernel
from shiftconv.ops import PaddingMode
from shiftconv.ops.sampling import Crop

Grouping = Literal["interleaved", "contiguous"]


class _Shift(IntegerShift):
    def __init__(
        self,
        offset: Tensor | Sequence[Sequence[int]],
        padding_mode: PaddingMode = "zeros",
        crop: Crop | None = None,
        stride: int | Sequence[int] = 1,
    ):
        given = torch.as_tensor(offset)
        if given.ndim != 2 or given.shape[1] != self.ndim:
            raise ValueError(f"{type(self).__name__} takes offset [C, {self.ndim}], got {[*given.shape]}")
        if given.is_floating_point() or given.is_complex() or given.dtype is torch.bool:
            raise TypeError(f"{type(self).__name__} takes integer offsets, got {given.dtype}")
        super().__init__(given.shape[0], padding_mode, crop, stride)
        self.register_buffer("offset", given.detach().to(torch.int64, copy=True))

    def extra_repr(self) -> str:
        return f"{self.channels}{self._window_repr()}"


class Shift1d(_Shift):
    """Shift ``[N, C, L]`` by given whole pixels; as :class:`Shift2d`."""

    ndim = 1


class Shift2d(_Shift):
    """Shift each channel of ``[N, C, H, W]`` by its own given number of whole pixels, ``y[p] = x[p - offset]``.

    ``offset`` is a buffer and part of the state dict.

    Args:
        offset: integers ``[C, 2]``, how far the content of each channel moves down and right.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.
        crop: per spatial axis the pixels to cut from the lower and the upper side, negative ones extend the map.
        stride: keep every ``stride``-th position; one for all axes, or one each.

    Raises:
        TypeError: offsets, crops or strides that are no whole numbers.
        ValueError: an offset of another shape, a wrong number of crops or strides, an unknown padding mode.
    """

    ndim = 2


class Shift3d(_Shift):
    """Shift ``[N, C, T, H, W]`` by given whole pixels; as :class:`Shift2d`."""

    ndim = 3


class _GroupShift(IntegerShift):
    """The grouped shift of any rank."""

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        grouping: Grouping = "interleaved",
        padding_mode: PaddingMode = "zeros",
        crop: Crop | None = None,
        stride: int | Sequence[int] = 1,
    ):
        super().__init__(channels, padding_mode, crop, stride)
        if grouping not in get_args(Grouping):
            raise unknown("grouping", grouping, get_args(Grouping))
        self.kernel_size = per_axis("kernel_size", kernel_size, self.ndim)
        self.dilation = per_axis("dilation", dilation, self.ndim)
        self.grouping: Grouping = grouping
        offset = _offsets(channels, self.kernel_size, self.dilation, grouping)
        self.register_buffer("offset", offset, persistent=False)

    def equivalent_kernel(self) -> Tensor:
        """The shift as a dense depthwise kernel ``[C, 1, *K]``, one-hot in every channel, on the offset's device.

        Each extent of ``K`` is odd, ``2 * r + 1`` with ``r = dilation * (kernel_size // 2)``, and entry ``r`` is the
        middle, so that a strided cross-correlation of the map padded by ``r`` on both sides, less the crop, gives the
        output of the module: ``conv2d(pad(x, r - crop, mode), kernel, stride=stride, groups=C)``.
        """
        return dense_kernel(self.offset, [d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True)])

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}"
        if set(self.dilation) != {1}:
            text += f", dilation={self.dilation}"
        if self.grouping != "interleaved":
            text += f", grouping={self.grouping!r}"
        return text + self._window_repr()


class GroupShift1d(_GroupShift):
    """Move each channel of ``[N, C, L]`` by one tap of a window of ``kernel_size``; as :class:`GroupShift2d`."""

    ndim = 1


class GroupShift2d(_GroupShift):
    """Move each channel of ``[N, C, H, W]`` by one tap of a ``k x k`` window. No parameters, no arithmetic.

    With the taps numbered row by row (last axis fastest), channel ``c`` that has tap ``t`` along an axis computes
    ``y[p] = x[p + dilation * (t - k // 2)]``. ``offset`` ``[C, D]`` holds the opposite number, how far the content
    moves towards larger indices, and is not part of the state dict. An even ``k`` reaches one tap further towards
    smaller indices than towards larger ones.

    Args:
        channels: ``C``. Those beyond a multiple of the number of taps ``K`` stay where they are; with ``C < K`` all do.
        kernel_size: size of the window, odd or even; one for all axes, or one each.
        dilation: distance of neighbouring taps in pixels; one for all axes, or one each.
        grouping: ``interleaved``: channel ``c`` has tap ``c % K``, as the released ShiftResNet weights need it.
            ``contiguous``: the first ``C // K`` channels have tap 0, the next ``C // K`` tap 1 ..., as the paper says;
            the left-over channels are the last ones.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.
        crop: per spatial axis the pixels to cut from the lower and the upper side, negative ones extend the map.
        stride: keep every ``stride``-th position; one for all axes, or one each.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, a wrong number of sizes, an unknown grouping or padding mode.
    """

    ndim = 2


class GroupShift3d(_GroupShift):
    """Move each channel of ``[N, C, T, H, W]`` by one tap of a ``k x k x k`` window; as :class:`GroupShift2d`."""

    ndim = 3


def _offsets(channels: int, kernel_size: Sequence[int], dilation: Sequence[int], grouping: Grouping) -> Tensor:
    """How far each channel moves, int64 ``[C, D]``."""
    taps = math.prod(kernel_size)
    size = channels // taps
    channel = torch.arange(size * taps)
    tap = channel % taps if grouping == "interleaved" else channel // max(size, 1)
    axes = torch.unravel_index(tap, tuple(kernel_size))
    moved = [d * (k // 2 - at) for at, k, d in zip(axes, kernel_size, dilation, strict=True)]
    offset = torch.zeros(channels, len(kernel_size), dtype=torch.int64)
    offset[: size * taps] = torch.stack(moved, dim=1)
    return offset
