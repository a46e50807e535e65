"""Compose small kernels and whole-number shifts into one large depthwise kernel.

A small convolution, its maps shifted and added, is exactly one convolution, whose kernel is the small kernels, shifted
and added:

    K[c, slot] = sum over k of placement[c, slot, k] * weight[c, k]

where a slot is a cell of the large kernel, as large as a small kernel. So a shift-wise convolution needs no map per
small kernel, in training neither: three kernels are composed, a tall one, a wide one and a third, and
:func:`shiftconv.ops.cross_conv` runs them. :func:`shiftconv.ops.shift_sum` is the same in activation space.

Sources: Li et al., "ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect", CVPR 2025, arXiv:2401.12736,
section 3, and its first version, arXiv:2401.12736v1.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence
from typing import cast, overload

import torch
from torch import Tensor

AxisPadding = tuple[int, int]
Padding = tuple[AxisPadding, AxisPadding]
Grid = tuple[int, int]


@overload
def compose(weight: Tensor, placement: Tensor | None, grid: Grid, *, dtype: torch.dtype | None = None) -> Tensor: ...


@overload
def compose(
    weight: Tensor, placement: Tensor, grid: Sequence[Grid], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]: ...


def compose(
    weight: Tensor, placement: Tensor | None, grid: Grid | Sequence[Grid], *, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Put small kernels into the slots of a large one; where several meet, they are added.

    Args:
        weight: the ``S`` small kernels of each of ``C`` channels, ``[C * S, 1, kh, kw]`` as a depthwise convolution
            holds them, channel by channel, or ``[C, S, kh, kw]``. Of several parallel paths give the sum.
        placement: ``[C, P, S]``, how often, or with which coefficient, small kernel ``k`` stands in slot ``p``; see
            :func:`placements`. None puts the kernels into the ``S`` slots in their order.
        grid: rows and columns of slots, ``P = rows * columns``, row by row: ``(S, 1)`` makes a tall kernel, ``(1, S)``
            a wide one, ``(1, 1)`` a small one. A sequence of grids makes several kernels at once, which share ``P``
            in their order.
        dtype: of the result, by default that of ``weight``.

    Returns:
        ``[C, 1, rows * kh, columns * kw]``, or a tuple of such for several grids. Summed in float64 and rounded once,
        autocast or not. Differentiable in ``weight`` and in a floating ``placement``, any order.

    Raises:
        TypeError: ``weight`` or ``placement`` is no tensor of real numbers, or ``dtype`` is not floating.
        ValueError: shapes or devices that do not fit.
    """
    several, grids = _grids(grid)
    small: Tensor = _small_kernels(weight, placement, grids)
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"compose makes kernels of a floating dtype, got dtype={dtype}")
    if placement is not None:
        # Neither autocast nor a lowered precision of float32 products reaches float64.
        exact = exact_dtype(weight)
        taps: Tensor = torch.bmm(placement.to(exact), small.flatten(2).to(exact))
        small = taps.unflatten(2, small.shape[2:])
    kernels: list[Tensor] = []
    parts = cast("Sequence[Tensor]", small.split([rows * columns for rows, columns in grids], 1))
    for part, (rows, columns) in zip(parts, grids, strict=True):
        cells = cast("Tensor", part.to(dtype).unflatten(1, (rows, columns)))
        kernels.append(cells.transpose(2, 3).flatten(1, 2).flatten(2, 3).unsqueeze(1).contiguous())
    return tuple(kernels) if several else kernels[0]


def _grids(grid: object) -> tuple[bool, Sequence[Grid]]:
    """Whether several kernels are wanted, and the rows and columns of each."""
    items = cast("Sequence[object]", grid) if isinstance(grid, Sequence) else ()
    several = len(items) > 0 and isinstance(items[0], Sequence)
    grids = cast("Sequence[Grid]", grid if several else [grid])
    for one in grids:
        whole = isinstance(one, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in one)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not whole or len(one) != 2 or min(one) < 1:
            raise ValueError(
                f"grid must be (rows, columns), whole numbers of at least 1, or several such; got {grid!r}"
            )
    return several, grids


def _small_kernels(weight: Tensor, placement: Tensor | None, grids: Sequence[Grid]) -> Tensor:
    """``weight`` as ``[C, S, kh, kw]``, after all that is demanded of the arguments."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        came = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"compose takes small kernels of real numbers as weight, got {came}")
    if weight.ndim != 4:
        raise ValueError(f"weight must be [C * S, 1, kh, kw] or [C, S, kh, kw], got {[*weight.shape]}")
    slots = sum(rows * columns for rows, columns in grids)
    if placement is None:
        if weight.shape[1] == slots:
            return weight
        if weight.shape[1] != 1 or weight.shape[0] % slots:
            raise ValueError(f"{slots} slots in order take {slots} kernels a channel, got weight {[*weight.shape]}")
        return weight.unflatten(0, (-1, slots)).squeeze(2)
    if not isinstance(placement, Tensor) or placement.is_complex():  # pyright: ignore[reportUnnecessaryIsInstance]
        came = placement.dtype if isinstance(placement, Tensor) else type(placement).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"placement must be a tensor of real numbers [C, P, S], got {came}")
    if placement.device != weight.device:
        raise ValueError(f"placement must be on the device of weight, {weight.device}, got {placement.device}")
    if placement.ndim != 3 or placement.shape[1] != slots:
        raise ValueError(f"placement must be [C, P, S] with P = {slots} slots, got {[*placement.shape]}")
    channels, _, filters = placement.shape
    if weight.shape[:2] == (channels, filters):
        return weight
    if weight.shape[:2] != (channels * filters, 1):
        expected = f"[{channels * filters}, 1, kh, kw] or [{channels}, {filters}, kh, kw]"
        raise ValueError(f"weight must be {expected} for placement {[*placement.shape]}, got {[*weight.shape]}")
    return weight.unflatten(0, (channels, filters)).squeeze(2)


def placements(slots: Tensor, count: int, coefficient: Tensor | None = None) -> Tensor:
    """The matrix that :func:`compose` takes, from a table of slots.

    Args:
        slots: integers ``[C, S, R]``, the slot in which small kernel ``k`` stands in arrangement ``r``, or -1 where
            it stands in none. All arrangements are added, so they cost nothing.
        count: ``P``, the number of slots.
        coefficient: ``[C, S, R]``, what each placed kernel is multiplied by; by default 1.

    Returns:
        ``[C, P, S]``, float64 without a coefficient, else in its dtype and differentiable in it.

    Raises:
        TypeError: slots that are no integers.
        ValueError: shapes that do not fit, or on the CPU a slot outside of ``[-1, P)``.
    """
    if slots.is_floating_point() or slots.is_complex() or slots.dtype is torch.bool:
        raise TypeError(f"placements takes slots of integers, got {slots.dtype}")
    if slots.ndim != 3 or (coefficient is not None and coefficient.shape != slots.shape):
        came = "" if coefficient is None else f" and {[*coefficient.shape]}"
        raise ValueError(f"slots and coefficient must be [C, S, R], got {[*slots.shape]}{came}")
    if slots.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(end) for end in slots.aminmax()) if slots.numel() else (0, 0)
        if low < -1 or high >= count:
            raise ValueError(f"slots must be in [-1, {count}), got some from {low} to {high}")
    if coefficient is None:
        coefficient = torch.ones(slots.shape, dtype=exact_dtype(slots), device=slots.device)
    channels, filters, _ = slots.shape
    index = torch.where(slots < 0, count, slots).to(torch.int64).transpose(1, 2)  # those in none go to one row more
    matrix = coefficient.new_zeros(channels, count + 1, filters)
    return matrix.scatter_add(1, index, coefficient.transpose(1, 2))[:, :count]


def exact_dtype(like: Tensor) -> torch.dtype:
    """In which kernels are composed: float64, where the device of ``like`` has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def slot_count(kernel_size: int, small_kernel_size: int) -> int:
    """How many small kernels cover a large one: ``ceil(kernel_size / small_kernel_size)``."""
    return math.ceil(kernel_size / small_kernel_size)


def slot_offset(slots: Tensor, kernel_size: int, small_kernel_size: int) -> Tensor:
    """How far the map of a small convolution, centred on its kernel, moves to act from a slot of the long axis.

    The pixels, towards larger indices, that :func:`shiftconv.ops.shift_sum` takes for ``slots`` of any shape; those of
    -1 move beyond every map.
    """
    moved = kernel_size // 2 - small_kernel_size // 2 - slots * small_kernel_size
    return torch.where(slots < 0, torch.iinfo(torch.int32).max, moved)


def composed_padding(kernel_size: int, small_kernel_size: int, third: int = 1) -> tuple[Padding, Padding, Padding]:
    """The padding of the composed tall, wide and third kernel, each ``((top, bottom), (left, right))``.

    The long axis has ``slot_count * small_kernel_size`` taps, ``kernel_size // 2`` of them before the output pixel;
    when that is no odd number, or not ``kernel_size``, the kernel is off centre.

    Args:
        kernel_size: of the large kernel.
        small_kernel_size: of the small ones.
        third: rows and columns of slots of the third kernel, around its middle one.
    """
    size = small_kernel_size
    before = kernel_size // 2
    long = (before, slot_count(kernel_size, size) * size - 1 - before)
    short = (size // 2, size - 1 - size // 2)
    around = (third // 2 * size + size // 2, (third - 1 - third // 2) * size + size - 1 - size // 2)
    return (long, short), (short, long), (around, around)
