"""Fast forms of shifts whose offsets are known, in operators that every runtime has.

Measured in onnxruntime 1.31 on one core of a CPU with AVX-512, microseconds for the shift alone, float32:

    map and offsets                           convolution    groups    gather
    2 x 72 x 28 x 28, 3 x 3 window                     56        78       333
    the same with stride 2                             33       113        91
    2 x 160 x 28 x 28, 7 x 7 window                   189       228       752
    2 x 162 x 28 x 28, 7 x 7 window                  2126       412       880
    1 x 64 x 28 x 28, up to 10 pixels                 646        76       148
    2 x 54 x 8 x 14 x 14, 3 x 3 x 3 window           1305       181       499
    2 x 72 x 28 x 28, interpolated, 7 x 7             105         -       480

So a depthwise convolution is best where its kernel is small and onnxruntime has it blocked by channels, that is for
flat maps whose channels are a multiple of four; else to pad the channels that move together, group by group. A gather,
which :mod:`shiftconv.ops.decompositions` makes of any offsets, is what remains.

The convolution multiplies the pixels that it does not read by zero, so infinities and NaN spread to the neighbours, as
they do in any convolution. All forms are exact otherwise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftconv.ops.decompositions import mix
from shiftconv.ops.sampling import PLAIN, ZEROS, Axis, axes_of, source

MOST_TAPS = 49  # of a kernel that is blocked by channels; beyond, moving pixels is faster than multiplying by zero
MOST_TAPS_PLAIN = 16  # of another one that interpolates, which is dearer to do otherwise
MOST_GROUPS = 64  # each costs an operator; beyond, one gather is the shorter program

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Place(NamedTuple):
    """Where a shift reads, as a raw operator is told; ``stride`` instead of a geometry follows the size of the map."""

    mode: int
    geometry: Sequence[int] = PLAIN
    stride: Sequence[int] = ()

    def axes(self, x: Tensor) -> list[Axis]:
        """The axes of ``x`` as they are read."""
        if self.stride:
            return [Axis(size, 0, -(-size // step), step) for size, step in zip(x.shape[2:], self.stride, strict=True)]
        return axes_of(x, self.geometry)

    def margins(self, x: Tensor, low: Sequence[int], high: Sequence[int]) -> list[tuple[int, int]]:
        """Per axis how many pixels ``x`` lacks on either side, if offsets run from ``low`` to ``high``."""
        return [
            (up - axis.first, axis.first + (axis.length - 1) * axis.step + 1 - axis.size - down)
            for axis, down, up in zip(self.axes(x), low, high, strict=True)
        ]


def extend(x: Tensor, margins: Sequence[tuple[int, int]], mode: int) -> Tensor:
    """``x`` ``[N, C, *S]`` extended by its padding mode, or cut where a margin is negative."""
    sizes = x.shape[2:]
    if mode == ZEROS:
        pads = [_within(margin, size) for margin, size in zip(margins, sizes, strict=True)]
        flat = [number for pair in reversed(pads) for number in pair]
        return F.pad(x, flat) if any(flat) else x
    for axis, ((low, high), size) in enumerate(zip(margins, sizes, strict=True)):
        if low <= 0 and high <= 0:
            x = x.narrow(2 + axis, -low, size + low + high)
            continue
        at = Axis(size, -low, size + low + high, 1)
        index, _ = source(at, torch.zeros(1, dtype=torch.int64, device=x.device), mode)
        if low < 0 or high < 0:
            x = x.index_select(2 + axis, index[0])
            continue
        # The pixels that stay are copied in one piece.
        head, tail = index[0, :low], index[0, low + size :]
        parts = [x.index_select(2 + axis, border) for border, width in ((head, low), (tail, high)) if width]
        x = torch.cat((*parts[: low > 0], x, *parts[low > 0 :]), 2 + axis)
    return x


def _within(margin: tuple[int, int], size: int) -> tuple[int, int]:
    """The same margins where the whole map is cut away, by a padding that cuts no more than there is."""
    low, high = margin
    if low < 0 and -low > size:
        return -size, high + low + size
    if high < 0 and -high > size:
        return low + high + size, -size
    return low, high


class ConvForm(nn.Module):
    """A depthwise convolution: per channel and axis two weights for the pixels at ``-offset`` and one further.

    Args:
        offset: int64 ``[C, D]``.
        place: padding mode and geometry.
        weights: ``[C, 2, D]``, or None for a shift by whole pixels.
        dtype: of the kernel.
    """

    kernel: Tensor

    def __init__(self, offset: Tensor, place: Place, weights: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.place = place
        self.low, self.high = _reach(offset, place, weights is not None)
        kernel = offset.new_ones(len(offset), dtype=dtype)
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            row = offset.new_zeros(len(offset), high - low + 1, dtype=dtype)
            first = (high - offset[:, i])[:, None]
            if weights is None:
                row.scatter_(1, first, 1)
            else:
                row.scatter_(1, first, weights[:, :1, i].to(dtype)).scatter_(1, first + 1, weights[:, 1:, i].to(dtype))
            kernel = kernel[..., None] * row.view(len(row), *[1] * i, -1)
        self.register_buffer("kernel", kernel[:, None])

    def forward(self, x: Tensor) -> Tensor:
        ndim = x.ndim - 2
        steps, padding = [axis.step for axis in self.place.axes(x)], [0] * ndim
        if self.place.mode == ZEROS and not self.place.geometry:
            padding = self.high  # _reach has made the kernel symmetric
        else:
            x = extend(x, self.place.margins(x, self.low, self.high), self.place.mode)
        return _CONV[ndim](x, self.kernel, None, steps, padding, groups=x.shape[1])


def _reach(offset: Tensor, place: Place, interpolated: bool) -> tuple[list[int], list[int]]:
    """The least and the largest offset of each axis that a kernel must reach; symmetric where convolutions can pad."""
    low, high = (offset.amin(0) - int(interpolated)).tolist(), offset.amax(0).tolist()
    if place.mode == ZEROS and not place.geometry:
        high = [max(-down, up) for down, up in zip(low, high, strict=True)]
        low = [-up for up in high]
    return cast("list[int]", low), cast("list[int]", high)


class GroupForm(nn.Module):
    """Channels that move together, moved together: one padding per group.

    Args:
        offset: int64 ``[C, D]``.
        place: padding mode and geometry.
    """

    order: Tensor | None
    back: Tensor | None

    def __init__(self, offset: Tensor, place: Place):
        super().__init__()
        self.place = place
        groups, group, counts = torch.unique(offset, dim=0, return_inverse=True, return_counts=True)
        self.offsets = cast("list[list[int]]", groups.tolist())
        self.counts = cast("list[int]", counts.tolist())
        order = group.argsort(stable=True)
        sorted_already = torch.equal(order, torch.arange(len(order), device=order.device))
        self.register_buffer("order", None if sorted_already else order)
        self.register_buffer("back", None if sorted_already else order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x.index_select(1, self.order)
        parts, mode = x.split(self.counts, 1), self.place.mode
        if mode == ZEROS:
            each = zip(parts, self.offsets, strict=True)
            moved = [extend(part, self.place.margins(part, offset, offset), mode) for part, offset in each]
        else:
            # Borders that are read from the map are dearer than zeros, so all groups share them.
            high = [max(column) for column in zip(*self.offsets, strict=True)]
            low = [min(column) for column in zip(*self.offsets, strict=True)]
            wide = extend(x, self.place.margins(x, low, high), mode).split(self.counts, 1)
            moved = [self._cut(part, x, offset, high) for part, offset in zip(wide, self.offsets, strict=True)]
        y = torch.cat([self._thin(part, x) for part in moved], 1)
        return y if self.back is None else y.index_select(1, self.back)

    def _cut(self, wide: Tensor, x: Tensor, offset: Sequence[int], high: Sequence[int]) -> Tensor:
        """The window of one group in the extended map, which starts where the largest offsets read."""
        for i, axis in enumerate(self.place.axes(x)):
            wide = wide.narrow(2 + i, high[i] - offset[i], (axis.length - 1) * axis.step + 1)
        return wide

    def _thin(self, y: Tensor, x: Tensor) -> Tensor:
        """Keep the positions of the stride."""
        for i, axis in enumerate(self.place.axes(x)):
            y = y if axis.step == 1 else torch.ops.aten.slice.Tensor(y, 2 + i, 0, None, axis.step)
        return y


def form_of(offset: Tensor, place: Place, x: Tensor, rounded: bool = True) -> nn.Module | None:
    """The fastest form for these offsets, or None if that is the gather of :mod:`shiftconv.ops.decompositions`.

    Args:
        offset: ``[C, D]``, integers, or floats.
        place: padding mode and geometry.
        x: the map, or another one of its rank and dtype.
        rounded: floats are rounded instead of interpolated.
    """
    if offset.numel() == 0 or 0 in x.shape[2:]:  # there may be nothing to pad with
        return None
    weights = None
    if not offset.is_floating_point():
        cell = offset
    elif not offset.isfinite().all():
        return None
    elif rounded:
        cell = offset.round().long()
    else:
        floor = (-offset).floor()
        d = -offset - floor
        cell, weights = -floor.long(), torch.stack((1 - d, d), 1)
        if not d.any():
            weights = None
    low, high = _reach(cell, place, weights is not None)
    taps = math.prod(up - down + 1 for down, up in zip(low, high, strict=True))
    if x.is_floating_point() and taps <= _most_taps(x.ndim, len(offset), weights is not None):
        return ConvForm(cell, place, weights, x.dtype)
    if weights is None and len(torch.unique(cell, dim=0)) <= MOST_GROUPS:
        return GroupForm(cell, place)
    return None


def _most_taps(rank: int, channels: int, interpolated: bool) -> int:
    """How many taps a convolution may have to be worth its while."""
    if rank == 4 and channels % 4 == 0:
        return MOST_TAPS
    return MOST_TAPS_PLAIN if interpolated and rank < 5 else 0


class MixForm(nn.Module):
    """``shift_linear``: a shift's form, then what follows it; takes ``x, weight, bias, residual``."""

    def __init__(self, shift: nn.Module, relu: bool):
        super().__init__()
        self.shift, self.relu = shift, relu

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return mix(self.shift(x), weight, bias, residual, self.relu)


class InPlaceForm(nn.Module):
    """``shift_``: a shift's form for the first ``channels`` channels, written back."""

    def __init__(self, shift: nn.Module, channels: int):
        super().__init__()
        self.shift, self.channels = shift, channels

    def forward(self, x: Tensor) -> None:
        part = x.narrow(1, 0, self.channels)
        part.copy_(self.shift(part))
