"""Every operator of this package stated in standard aten operators, for what must run where the package is not.

    program = torch.export.export(model, (x,))
    program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})

The result needs torch alone, and translates to ONNX's own operators. The offsets may stay tensors: they turn into one
vector of positions ``[C * S]``, which is the same for every image, so a compiler folds it into a constant. Where the
offsets are known before, :func:`shiftconv.deploy.lower` finds faster forms.

Each formula takes and returns what the raw operator of its name does; see its file.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shiftconv.ops import depthwise_paths
from shiftconv.ops.sampling import PLAIN, ZEROS, Axis, axes_of, format_of, source

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def decompositions() -> dict[torch._ops.OpOverload[..., Any], Callable[..., Any]]:  # pyright: ignore[reportPrivateUsage]
    """The formula of every raw operator, as ``ExportedProgram.run_decompositions`` takes them."""
    ops = torch.ops.shiftconv
    return {
        ops.shift.default: shift,
        ops.shift_.default: shift_,
        ops.active_shift.default: active_shift,
        ops.active_shift_backward.default: active_shift_backward,
        ops.round_offset.default: round_offset,
        ops.shift_linear.default: shift_linear,
        ops.depthwise_sum.default: depthwise_paths.sum_by_torch,
        ops.depthwise_each.default: depthwise_paths.each_by_torch,
        ops.depthwise_weight.default: depthwise_paths.weight_by_torch,
    }


def shift(x: Tensor, offset: Tensor, mode: int, transpose: bool, geometry: Sequence[int] = PLAIN) -> Tensor:
    """``shiftconv::shift`` in aten operators: one gather, or for the transpose one sum by index."""
    axes = axes_of(x, geometry, transpose)
    y = _scatter(_summable(x), offset, mode, axes) if transpose else window(x, offset, mode, axes)
    return y.to(x.dtype).contiguous(memory_format=format_of(x))


def shift_(x: Tensor, offset: Tensor, padding: int) -> None:
    """``shiftconv::shift_`` in aten operators."""
    part = x.narrow(1, 0, offset.shape[0])
    part.copy_(shift(part, offset, padding, False))


def active_shift(
    x: Tensor,
    offset: Tensor,
    mode: int,
    rounded: bool,
    derivative: int,
    transpose: bool,
    geometry: Sequence[int] = PLAIN,
) -> Tensor:
    """``shiftconv::active_shift`` in aten operators: gather what all taps need once, then weigh it axis by axis."""
    if rounded and derivative == 0:
        return shift(x, round_offset(offset), mode, transpose, geometry)
    axes = axes_of(x, geometry, transpose)
    cell = (-offset).floor()
    d = (-offset - cell).to(_summable(x).dtype)
    one = torch.ones_like(d[:, 0])
    weights = [(one, -one) if derivative >> i & 1 else (one - d[:, i], d[:, i]) for i in range(len(axes))]
    steps = -cell.to(torch.int64)
    y = (_taps_transposed if transpose else taps)(_summable(x), steps, mode, axes, weights)
    return y.to(x.dtype).contiguous(memory_format=format_of(x))


def active_shift_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mode: int, rounded: bool, geometry: Sequence[int] = PLAIN
) -> tuple[Tensor, Tensor]:
    """``shiftconv::active_shift_backward`` in aten operators."""
    wide, columns = _summable(x), list[Tensor]()
    for axis in range(offset.shape[1]):
        change = active_shift(wide, offset, mode, rounded, 1 << axis, False, geometry)
        columns.append((_summable(grad) * change).transpose(0, 1).flatten(1).sum(1))
    grad_x = active_shift(grad, offset, mode, rounded, 0, True, geometry).contiguous(memory_format=format_of(x))
    return grad_x, torch.stack(columns, 1).to(offset.dtype)


def round_offset(offset: Tensor) -> Tensor:
    """``shiftconv::round_offset`` in aten operators, which cannot refuse what is not finite."""
    return offset.round().to(torch.int64)


def shift_linear(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mode: int,
    stride: Sequence[int],
    relu: bool,
) -> Tensor:
    """``shiftconv::shift_linear`` in aten operators: a gather, a 1x1 convolution, and what follows it."""
    axes = [Axis(size, 0, -(-size // step), step) for size, step in zip(x.shape[2:], stride, strict=True)]
    y = mix(window(x, offset, mode, axes), weight, bias, residual, relu)
    return y.contiguous(memory_format=format_of(x))


def mix(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """What :func:`shift_linear` does after the shift: ``[N, C, *S]`` to ``[N, O, *S]``, rounded once."""
    kernel = weight[(..., *[None] * (x.ndim - 2))]
    y = _CONV[x.ndim - 2](_summable(x), _summable(kernel), None if bias is None else _summable(bias))
    if relu:
        y = y.relu()
    return (y if residual is None else y + _summable(residual)).to(x.dtype)


def window(x: Tensor, offset: Tensor, mode: int, axes: Sequence[Axis]) -> Tensor:
    """The pixels of the extended ``x`` ``[N, C, *S]`` that each channel reads, ``[N, C, *L]``.

    Args:
        x: any dtype.
        offset: int64 ``[C, D]``.
        mode: padding mode from :data:`shiftconv.ops.sampling.MODES`.
        axes: where each axis is read.
    """
    lengths = [axis.length for axis in axes]
    if 0 in x.shape[1:] or 0 in lengths:
        return x.new_zeros((*x.shape[:2], *lengths))
    index, inside = _positions(offset, mode, axes)
    y = x.flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape)
    return y.masked_fill(~inside, 0) if mode == ZEROS else y


def taps(
    x: Tensor, offset: Tensor, mode: int, axes: Sequence[Axis], weights: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Two neighbouring pixels per axis, weighed: those at ``-offset`` and one further, each weight ``[C]``."""
    near = [Axis(size, first, (length - 1) * step + 2, step=1) for size, first, length, step in axes]
    if 0 in x.shape[1:] or any(axis.length == 0 for axis in axes):
        return x.new_zeros((*x.shape[:2], *(axis.length for axis in axes)))
    y = window(x, offset, mode, near)
    for i, (axis, pair) in enumerate(zip(axes, weights, strict=True)):
        low, high = (w.view(-1, *[1] * len(axes)) for w in pair)
        end = (axis.length - 1) * axis.step + 1
        y = low * _every(y, 2 + i, 0, end, axis.step) + high * _every(y, 2 + i, 1, end + 1, axis.step)
    return y


def _every(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return torch.ops.aten.slice.Tensor(x, dim, start, end, step)


def _taps_transposed(
    y: Tensor, offset: Tensor, mode: int, axes: Sequence[Axis], weights: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """The transpose of :func:`taps`, ``[N, C, *L]`` to ``[N, C, *S]``: a sum by index for every corner."""
    total = y.new_zeros((*y.shape[:2], *(axis.size for axis in axes)))
    for corner in itertools.product((0, 1), repeat=len(axes)):
        weight = math.prod(pair[tap] for pair, tap in zip(weights, corner, strict=True))
        moved = offset - offset.new_tensor(corner)
        total = total + _scatter(y * torch.as_tensor(weight).view(-1, *[1] * len(axes)), moved, mode, axes)
    return total


def _scatter(y: Tensor, offset: Tensor, mode: int, axes: Sequence[Axis]) -> Tensor:
    """The transpose of :func:`window`."""
    sizes = [axis.size for axis in axes]
    if 0 in y.shape[1:] or 0 in sizes:
        return y.new_zeros((*y.shape[:2], *sizes))
    index, inside = _positions(offset, mode, axes)
    if mode == ZEROS:
        y = y.masked_fill(~inside, 0)
    total = y.new_zeros((y.shape[0], y.shape[1] * math.prod(sizes)))
    return total.index_add(1, index.flatten(), y.flatten(1)).unflatten(1, (y.shape[1], *sizes))


def _positions(offset: Tensor, mode: int, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Where in ``[C * S]`` each output pixel is read, int64 ``[C, *L]``, and whether it is, bool ``[C, *L]``."""
    channels = offset.shape[0]
    index = torch.arange(channels, device=offset.device).view(-1, *[1] * len(axes))
    inside = torch.ones_like(index, dtype=torch.bool)
    for i, axis in enumerate(axes):
        at, reads = source(axis, offset[:, i], mode)
        shape = [channels, *(axis.length if j == i else 1 for j in range(len(axes)))]
        index = index * axis.size + at.view(shape)
        inside = inside & reads.view(shape)
    return index, inside


def _summable(x: Tensor) -> Tensor:
    """``x`` in a dtype whose sums may be rounded to that of ``x``: 16-bit floats in float32."""
    return x.float() if x.is_floating_point() and x.itemsize <= 2 else x
