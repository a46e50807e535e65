"""Grouped shift: the channels of a map, moved by the taps of a k x k window, in place of a spatial convolution.

Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018,
arXiv:1711.08141, section 3; the interleaved grouping is the one that the authors' released weights need.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from shiftconv.names import unknown
from shiftconv.ops.shift import PaddingMode, shift

Grouping = Literal["interleaved", "contiguous"]


class _GroupShift(nn.Module):
    """The grouped shift of any rank; a subclass fixes ``ndim``, the number of spatial axes."""

    ndim: ClassVar[int]
    offset: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        grouping: Grouping = "interleaved",
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        if grouping not in get_args(Grouping):
            raise unknown("grouping", grouping, get_args(Grouping))
        if padding_mode not in get_args(PaddingMode):
            raise unknown("padding_mode", padding_mode, get_args(PaddingMode))
        self.channels = _positive("channels", channels)
        self.kernel_size = _per_axis("kernel_size", kernel_size, self.ndim)
        self.dilation = _per_axis("dilation", dilation, self.ndim)
        self.grouping: Grouping = grouping
        self.padding_mode: PaddingMode = padding_mode
        offset = _offsets(channels, self.kernel_size, self.dilation, grouping)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return shift(x, self.offset, self.padding_mode)

    def equivalent_kernel(self) -> Tensor:
        """The shift as a dense depthwise kernel ``[C, 1, *K]``, one-hot in every channel, on the offset's device.

        Each extent of ``K`` is odd, ``2 * r + 1`` with ``r = dilation * (kernel_size // 2)``, and entry ``r`` is the
        middle, so that a cross-correlation of the map padded by ``r`` on both sides gives the output of the module:
        ``conv2d(x, kernel, padding=r, groups=C)`` for zeros, ``conv2d(pad(x, r, mode), kernel, groups=C)`` otherwise.
        """
        reach = torch.tensor([d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True)])
        kernel = torch.zeros(self.channels, 1, *(2 * reach + 1).tolist(), device=self.offset.device)
        taps = reach.to(self.offset.device) - self.offset  # reading at p - offset is the tap at -offset
        kernel[(torch.arange(self.channels, device=kernel.device), 0, *taps.unbind(1))] = 1
        return kernel

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}"
        if set(self.dilation) != {1}:
            text += f", dilation={self.dilation}"
        if self.grouping != "interleaved":
            text += f", grouping={self.grouping!r}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text


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


def _positive(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _per_axis(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (_positive(name, value),) * ndim
    if len(value) != ndim:
        raise ValueError(f"{name} must be one number or {ndim}, one per spatial axis; got {value!r}")
    return tuple(_positive(name, item) for item in value)
