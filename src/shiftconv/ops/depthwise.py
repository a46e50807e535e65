"""Depthwise 2-D convolution with kernels of any size, never on a slow path.

    y[n, c, i, j] = bias[c] + sum over u, v of weight[c, 0, u, v] * x~[n, c, s*i + d*u - top, s*j + d*v - left]

``x~`` is ``x`` with zeros around it, ``s`` the stride, ``d`` the dilation. torch's convolution, with the two sides of
the padding apart; which code runs is told by ``shiftconv doctor --op depthwise_conv``.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.ops.branches import apply_sum
from shiftconv.ops.sampling import format_of

Pair = tuple[int, int]
Sides = tuple[Pair, Pair]  # (top, bottom), (left, right)
Padding = int | Sequence[int] | Sequence[Sequence[int]] | str

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Padding = 0,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolve every channel of ``x`` with a kernel of its own.

    Equal to ``torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups=C)`` for finite ``x``. Some
    kernels skip zero weights and others multiply by zeros beside them, so pixels that are infinite or NaN may reach
    fewer or more of their neighbours.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, float64, float32, float16 or bfloat16, any strides.
        weight: ``[C, 1, kh, kw]`` in the dtype of ``x``; even and odd sizes.
        bias: ``[C]``, or None.
        padding: zeros around ``x`` in pixels: a number, or one for height and one for width, or for each a pair of both
            sides ``((top, bottom), (left, right))``; ``valid`` for none, ``same`` for an output as large as ``x``.
        stride: distance of the positions that are kept; one number, or one per axis.
        dilation: distance of the taps in pixels; one number, or one per axis.

    Returns:
        ``[N, C, H', W']`` with ``H' = (H + top + bottom - d * (kh - 1) - 1) // s + 1`` in the dtype and memory format
        of ``x``. Differentiable in all tensors, any order; 16-bit types are summed in float32 and rounded once. Under
        autocast the tensors are cast as those of a convolution are.

    Raises:
        TypeError: an argument is no tensor, the dtypes differ or are not floating, or a size is no whole number.
        ValueError: shapes or devices that do not fit, a negative padding, or a kernel that is larger than the padded x.
    """
    if isinstance(x, Tensor) and x.ndim == 3:  # pyright: ignore[reportUnnecessaryIsInstance]
        return depthwise_conv(x[None], weight, bias, padding, stride, dilation)[0]
    x, (weight,), bias = prepare("depthwise_conv", x, {"weight": weight}, bias)
    steps, gaps = _pair("stride", stride), _pair("dilation", dilation)
    sides = sides_of(padding, weight, steps, gaps)
    check_fit(x, "weight", weight, sides, gaps)
    if steps == gaps == (1, 1):
        return apply_sum([x], [weight], bias, _flat(sides))
    if x.device.type != "cpu":
        (top, bottom), (left, right) = sides
        common = min(top, bottom), min(left, right)
        extra = (left - common[1], right - common[1], top - common[0], bottom - common[0])
        x = F.pad(x, extra) if any(extra) else x
        return F.conv2d(x, weight, bias, steps, common, gaps, x.shape[1])
    if gaps != (1, 1) and not any(isinstance(size, torch.SymInt) for size in x.shape[2:]):
        return _dilated(x, weight, bias, sides, steps, gaps)
    return _strided(x, _spread(weight, gaps), bias, sides, steps)


def _spread(weight: Tensor, gaps: Pair) -> Tensor:
    """The plain kernel that a dilated one is, zeros between its taps."""
    (kh, kw), (down, across) = weight.shape[2:], gaps
    cells = F.pad(weight[:, :, :, None, :, None], (0, across - 1, 0, 0, 0, down - 1))
    return cells.flatten(4, 5).flatten(2, 3)[:, :, : (kh - 1) * down + 1, : (kw - 1) * across + 1]


def _strided(x: Tensor, weight: Tensor, bias: Tensor | None, sides: Sides, steps: Pair) -> Tensor:
    """A strided convolution as the sum of plain ones, one for each phase of the kernel and the pixels it meets."""
    maps: list[Tensor] = []
    kernels: list[Tensor] = []
    padding: list[int] = []
    counts = [
        (size + sum(side) - taps) // step + 1
        for size, side, taps, step in zip(x.shape[2:], sides, weight.shape[2:], steps, strict=True)
    ]
    grow = [-size % step for size, step in zip(x.shape[2:], steps, strict=True)]
    # So that all phases are of one size. Where sizes are symbols, asking would tie the program to the answer.
    symbolic = any(isinstance(size, torch.SymInt) for size in grow)
    padded = F.pad(x, (0, grow[1], 0, grow[0])) if symbolic or any(grow) else x
    for a in range(min(steps[0], weight.shape[2])):
        for b in range(min(steps[1], weight.shape[3])):
            kernel = weight[:, :, a :: steps[0], b :: steps[1]]
            phase: list[int] = []
            pads: list[int] = []
            for axis, tap in enumerate((a, b)):
                ahead, first = divmod(tap - sides[axis][0], steps[axis])
                size = padded.shape[2 + axis] // steps[axis]
                phase.append(first)
                pads += [-ahead, counts[axis] - 1 + kernel.shape[2 + axis] + ahead - size]
            maps.append(padded[:, :, phase[0] :: steps[0], phase[1] :: steps[1]])
            kernels.append(kernel)
            padding += pads
    return apply_sum(maps, kernels, bias, padding).contiguous(memory_format=format_of(x))


def _dilated(x: Tensor, weight: Tensor, bias: Tensor | None, sides: Sides, steps: Pair, gaps: Pair) -> Tensor:
    """A dilated convolution as a plain one of each phase of the pixels, the phases as images of a batch."""
    images, channels = x.shape[:2]
    span = [
        size + sum(side) - gap * (taps - 1)
        for size, side, taps, gap in zip(x.shape[2:], sides, weight.shape[2:], gaps, strict=True)
    ]
    (top, _), (left, _) = sides
    # Up to a multiple of the dilation, so that all phases are of one size.
    rows, columns = (-(-(size + sum(side)) // gap) for size, side, gap in zip(x.shape[2:], sides, gaps, strict=True))
    bottom, right = rows * gaps[0] - x.shape[2] - top, columns * gaps[1] - x.shape[3] - left
    padded = F.pad(x, (left, right, top, bottom))
    phases = padded.view(images, channels, rows, gaps[0], columns, gaps[1]).permute(3, 5, 0, 1, 2, 4)
    y = apply_sum([phases.reshape(-1, channels, rows, columns)], [weight], bias, [0, 0, 0, 0])
    y = y.view(*gaps, images, channels, *y.shape[2:]).permute(2, 3, 4, 0, 5, 1)
    y = y.reshape(images, channels, y.shape[2] * gaps[0], y.shape[4] * gaps[1])
    return y[:, :, : span[0] : steps[0], : span[1] : steps[1]].contiguous(memory_format=format_of(x))


def prepare(
    op: str, x: Tensor, kernels: dict[str, Tensor], bias: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The tensors of a depthwise convolution, checked, and cast where autocast asks for it.

    Args:
        op: the public operator, for messages.
        x: must be ``[N, C, H, W]``.
        kernels: by their names; each must be ``[C, 1, kh, kw]``.
        bias: must be ``[C]``, or None.
    """
    named = {"x": x, **kernels, **({} if bias is None else {"bias": bias})}
    if any(not isinstance(t, Tensor) for t in named.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
        came = ", ".join(f"{name}: {type(t).__name__}" for name, t in named.items())
        raise TypeError(f"{op} takes tensors, got {came}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{op} takes dense tensors, got x of layout {x.layout}")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        named = {
            name: t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t
            for name, t in named.items()
        }
    x = named["x"]
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op} takes x of a floating dtype, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op} takes x [N, C, H, W] with C, H, W of at least 1, got {[*x.shape]}")
    for name, t in named.items():
        if t.dtype is not x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        if t.layout is not torch.strided:
            raise TypeError(f"{op} takes dense tensors, got {name} of layout {t.layout}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
        if name in kernels and (t.ndim != 4 or t.shape[:2] != (x.shape[1], 1) or 0 in t.shape):
            raise ValueError(f"{name} must be [C, 1, kh, kw] with C = {x.shape[1]} channels of x, got {[*t.shape]}")
    if bias is not None and named["bias"].shape != (x.shape[1],):
        raise ValueError(f"bias must be [C] with C = {x.shape[1]} channels of x, got {[*bias.shape]}")
    return x, [named[name] for name in kernels], named.get("bias")


def check_fit(x: Tensor, name: str, weight: Tensor, sides: Sides, gaps: Pair = (1, 1)) -> None:
    """Refuse a kernel that is larger than the padded map."""
    for axis, side in enumerate(sides):
        extent = gaps[axis] * (weight.shape[2 + axis] - 1) + 1
        if x.shape[2 + axis] + sum(side) < extent:
            sizes = f"{name} {[*weight.shape]} with dilation {gaps}" if gaps != (1, 1) else f"{name} {[*weight.shape]}"
            raise ValueError(f"{sizes} is larger than x {[*x.shape]} with padding {sides}")


def sides_of(padding: object, weight: Tensor, steps: Pair = (1, 1), gaps: Pair = (1, 1)) -> Sides:
    """The two sides of the padding along both axes, however they were given."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise unknown("padding", padding, ["same", "valid"])
        if padding == "valid":
            return (0, 0), (0, 0)
        if steps != (1, 1):
            raise ValueError(f"padding 'same' goes with a stride of 1, got {steps}")
        total = [gap * (taps - 1) for taps, gap in zip(weight.shape[2:], gaps, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    pairs: Sequence[object] = cast("Sequence[object]", padding) if isinstance(padding, Sequence) else [padding] * 2
    sides = [(*cast("Sequence[object]", pair),) if isinstance(pair, Sequence) else (pair, pair) for pair in pairs]
    if len(sides) != 2 or any(len(side) != 2 for side in sides):
        raise ValueError(f"padding must be a number, one per axis, or ((top, bottom), (left, right)); got {padding!r}")
    if any(not _is_whole(number) for side in sides for number in side):
        raise TypeError(f"padding must be of whole numbers, got {padding!r}")
    height, width = cast("list[Pair]", sides)
    if min(*height, *width) < 0:
        raise ValueError(f"padding must not be negative, got {padding!r}")
    if any(isinstance(number, int) and number >= 2**31 for number in (*height, *width)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"padding must be below 2**31 pixels, got {padding!r}")
    return height, width


def _pair(name: str, value: int | Sequence[int]) -> Pair:
    pair = (*value,) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one number, or one per axis; got {value!r}")
    if any(not _is_whole(number) for number in pair):
        raise TypeError(f"{name} must be of whole numbers, got {value!r}")
    if any(number < 1 for number in pair):
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return pair


def _is_whole(number: object) -> bool:
    return isinstance(number, int | torch.SymInt) and not isinstance(number, bool)


def _flat(sides: Sides) -> list[int]:
    return [number for side in sides for number in side]
