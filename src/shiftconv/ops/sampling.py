"""Where the positions of an output read the input: padding modes, output windows, strides, and the result's layout.

Along every axis an output position ``o`` samples the coordinate ``first + o * step - offset`` of the input, which its
padding mode extends without end. What the operators below this module share is how such a coordinate becomes an index.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from shiftconv.names import unknown

PaddingMode = Literal["zeros", "replicate", "circular", "reflect", "symmetric"]
Crop = Sequence[Sequence[int]]

# A kernel sees the place in this order: an integer crosses the dispatcher faster than a string.
MODES: dict[str, int] = {name: code for code, name in enumerate(get_args(PaddingMode))}
ZEROS, REPLICATE, CIRCULAR, REFLECT, SYMMETRIC = MODES.values()

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Axis(NamedTuple):
    """One spatial axis: ``length`` output positions that start at ``first``, ``step`` apart, over ``size`` pixels."""

    size: int
    first: int
    length: int
    step: int


PLAIN: tuple[int, ...] = ()  # the geometry of an output that is as large as its input


def geometry(x: Tensor, crop: Crop | None, stride: int | Sequence[int]) -> tuple[int, ...]:
    """What a raw operator needs to know: four numbers per axis, as :class:`Axis`, or none for a plain output.

    Args:
        x: ``[N, C, *S]``.
        crop: per spatial axis the pixels that the output lacks on its lower and upper side; negative ones extend it.
        stride: distance of neighbouring outputs in pixels; one for all axes, or one each.

    Raises:
        TypeError: numbers that are no integers.
        ValueError: a wrong number of them, a stride below 1, a crop that leaves nothing, an empty axis extended.
    """
    if crop is None and stride == 1:
        return PLAIN
    ndim = x.ndim - 2
    strides = [*stride] if isinstance(stride, Sequence) else [stride] * ndim
    crops = [(0, 0)] * ndim if crop is None else crop
    if not isinstance(crops, Sequence) or not all(isinstance(pair, Sequence) for pair in crops):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"crop must be pairs of whole numbers, one per spatial axis, got {crop}")
    if len(strides) != ndim or len(crops) != ndim or any(len(pair) != 2 for pair in crops):
        raise ValueError(f"x {[*x.shape]} takes {ndim} strides and {ndim} pairs of crops, got {stride} and {crop}")
    numbers: list[int] = []
    for size, (low, high), step in zip(x.shape[2:], crops, strides, strict=True):
        if not all(isinstance(number, int | torch.SymInt) for number in (low, high, step)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"stride and crop must be of whole numbers, got {stride} and {crop}")
        if step < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        extent = size - low - high
        if extent < min(size, 1) or (size == 0 and extent > 0):
            raise ValueError(f"crop {crop} leaves {extent} of {size} pixels")
        numbers += [size, low, -(-extent // step), step]
    return tuple(numbers)


def axes_of(x: Tensor, geometry: Sequence[int], transpose: bool = False) -> list[Axis]:
    """The axes that ``geometry`` describes, or for a plain one those of ``x``."""
    if not geometry:
        return [Axis(size, 0, size, 1) for size in x.shape[2:]]
    axes = [Axis(*geometry[i : i + 4]) for i in range(0, len(geometry), 4)]
    expected = [axis.length if transpose else axis.size for axis in axes]
    if expected != [*x.shape[2:]]:
        raise ValueError(f"a geometry for spatial sizes {expected} came with x {[*x.shape]}")
    return axes


def source(axis: Axis, column: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Index that each output position reads along ``axis``, and whether it reads at all.

    Args:
        axis: the axis; its size is at least 1.
        column: int64 ``[C]``, the offset of each channel.
        mode: padding mode from :data:`MODES`.

    Returns:
        int64 ``[C, length]`` in ``[0, size)``, and bool of that shape.
    """
    size = axis.size
    period = {CIRCULAR: size, REFLECT: max(2 * size - 2, 1), SYMMETRIC: 2 * size}.get(mode)
    at = axis.first + axis.step * torch.arange(axis.length, device=column.device)
    if period is None:
        # Without this, offsets near the ends of int64 would overflow; nothing inside is reached from that far.
        reach = abs(axis.first) + axis.step * axis.length + size
        at = at - column.clamp(-reach, reach)[:, None]
    else:
        at = at - (column % period)[:, None]
    inside = (at >= 0) & (at < size) if mode == ZEROS else torch.ones_like(at, dtype=torch.bool)
    if period is None:
        return at.clamp(0, size - 1), inside
    at = at % period
    if mode == REFLECT:  # abc|ba: the edge pixel does not repeat
        at = torch.minimum(at, period - at)
    elif mode == SYMMETRIC:  # abc|cba
        at = torch.minimum(at, period - 1 - at)
    return at, inside


def along(row: Tensor, like: Tensor, axis: int) -> Tensor:
    """``[C, length]`` as a view that broadcasts with ``like`` ``[N, C, *S]`` along spatial ``axis``."""
    return row.view([1, row.shape[0], *(row.shape[1] if i == axis else 1 for i in range(like.ndim - 2))])


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format of what is computed from ``x``."""
    return torch.contiguous_format if x.is_contiguous() else memory_format(x)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for an ``x`` that is dense in none: channels last if its channels are adjacent."""
    last = _CHANNELS_LAST.get(x.ndim)
    return last if last is not None and x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def empty_output(x: Tensor, geometry: Sequence[int] = PLAIN, transpose: bool = False) -> Tensor:
    """Uninitialised memory for a result: the strides of ``x`` if it is dense in a memory format, else dense in one."""
    if geometry:
        sizes = [axis.size if transpose else axis.length for axis in axes_of(x, geometry, transpose)]
        return torch.empty((*x.shape[:2], *sizes), dtype=x.dtype, device=x.device, memory_format=format_of(x))
    last = _CHANNELS_LAST.get(x.ndim)
    if x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last)):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=memory_format(x))


def check_map(op: str, x: Tensor, offset: Tensor, padding_mode: str) -> int:
    """What every operator demands of ``x`` and ``offset`` beyond their dtypes; the code of the padding mode.

    Raises:
        ValueError: ``x`` is not 3-D to 5-D, ``offset`` has another shape or device, or the padding mode is unknown.
    """
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"{op} takes x [N, C, *S] with one to three spatial axes, got {x.ndim}-D x {[*x.shape]}")
    expected = [x.shape[1], x.ndim - 2]
    if offset.shape != (*expected,):
        raise ValueError(f"offset must be [C, D] = {expected} for x {[*x.shape]}, got {[*offset.shape]}")
    if offset.device != x.device:
        raise ValueError(f"offset must be on the device of x, {x.device}, got {offset.device}")
    if padding_mode not in MODES:
        raise unknown("padding_mode", padding_mode, MODES)
    return MODES[padding_mode]
