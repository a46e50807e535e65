"""How the work of a shift is cut into programs of :func:`shiftconv.ops.triton._gather.gather_kernel`."""

# triton does not type everything it has.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from shiftconv.ops.sampling import CIRCULAR, ZEROS, Axis, axes_of, format_of

_ENOUGH_PROGRAMS = 4096  # for two rounds on the largest GPUs; beyond that a program walks through several images
_MOST_IMAGES = 32
_INT32 = 2**28  # coordinates below it; then sums of a few cannot overflow
_VECTOR = 16  # bytes; the widest access of a thread


class Work(NamedTuple):
    """A launch of :func:`gather_kernel`: how many programs, those of one group of channels, its sizes and flags."""

    programs: int
    blocks: int
    sizes: tuple[Any, ...]
    flags: dict[str, Any]


def work(x: Tensor, y: Tensor, geometry: Sequence[int], mode: int, transpose: bool, taps: int, parts: int = 1) -> Work:
    """How to gather ``y`` from ``x``, both ``[N, C, *S]``, dense in one memory format; ``parts`` numbers an element."""
    last = any(format_of(t) is not torch.contiguous_format for t in (x, y))  # one pixel is dense in both formats
    absent = 3 - (x.ndim - 2)
    axes = [Axis(1, 0, 1, 1)] * absent + axes_of(x, geometry, transpose)
    batch, channels, (depth, height, width) = *y.shape[:2], [1] * absent + [*y.shape[2:]]
    window = any((axis.first, axis.step) != (0, 1) or axis.size != axis.length for axis in axes)
    folds = transpose and mode != ZEROS and (mode != CIRCULAR or window)  # the kernel keeps lists for every element
    row = (channels if last else depth * height * width) * parts  # numbers that lie together in memory
    if last:
        cols = min(triton.next_power_of_2(row), 32 if taps == 1 else 16)
        rows, reach = (64 if taps == 1 else 32) // (2 if folds else 1), (8 if x.ndim == 4 else 4)
        tile_w = min(triton.next_power_of_2(width), reach, rows)
        tile_h = min(triton.next_power_of_2(height), reach, rows // tile_w)
        tiles = triton.cdiv(depth, rows // (tile_h * tile_w)) * triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
        groups = triton.cdiv(row, cols)
    else:
        lanes = min(1024, 2048 // taps) // (2 if folds else 1)
        cols = min(triton.next_power_of_2(row), lanes)
        rows, tile_h, tile_w = min(triton.next_power_of_2(channels), lanes // cols), 1, 1
        tiles, groups = triton.cdiv(row, cols), triton.cdiv(channels, rows)
    images = max(1, min(batch, _MOST_IMAGES, batch * tiles * groups // _ENOUGH_PROGRAMS))
    long = _is_long(x, y, parts, axes)
    # What several taps or neighbouring channels read lies at any alignment, number by number, and the more neighbours a
    # thread has, the more lines each load of a warp touches.
    align = 1 if last or taps > 1 or parts > 1 else math.gcd(_VECTOR // y.itemsize, width)
    flags = dict(
        AXES=x.ndim - 2,
        MODE=mode,
        TRANSPOSE=transpose,
        WINDOW=window,
        TAPS=taps,
        PARTS=parts,
        LAST=last,
        ALIGN=align,
        LONG=long,
        ROWS=rows,
        COLS=cols,
        TILE_H=tile_h,
        TILE_W=tile_w,
        num_warps=8 if last and taps == 8 else 4,
        enable_fp_fusion=True,
        maxnreg=(224 if long else 128)
        if folds
        else None,  # unset, the assembler saves registers that nobody needs, and spills
    )
    blocks = triton.cdiv(batch, images) * tiles
    sizes = (batch, images, channels, width // align, *map(tuple, axes))
    return Work(blocks * groups, blocks, sizes, flags)


def _is_long(x: Tensor, y: Tensor, parts: int, axes: Sequence[Axis]) -> bool:
    """Whether places in an image, or coordinates of a window, need more than 32 bits."""
    image = max(math.prod(t.shape[1:]) for t in (x, y)) * parts
    return image >= 2**30 or any(abs(axis.first) + axis.step * axis.length + axis.size >= _INT32 for axis in axes)
