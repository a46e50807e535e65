"""Learned shifts: every channel of a feature map moves by its own real number of pixels, and the numbers are trained.

    active:  y[n, c, p] = x~[n, c, p - offset[c]]              x~ interpolates (bi/tri)linearly between the pixels
    sparse:  y[n, c, p] = x[n, c, p - round(offset[c])]        trained by the active one's derivative

Both are linear in ``x``, and along an axis, with ``t = p - offset``, ``cell = floor(t)`` and ``d = t - cell``, the
active one weighs the taps ``cell`` and ``cell + 1`` by ``(1 - d, d)``. Its derivative by that offset weighs them by
``(1, -1)``, and a second one by the same offset is zero. So the transpose and the derivatives of all orders are the
same operator with other weights, and one raw operator carries them all, ``shiftconv::active_shift``. The first
derivatives, which training takes all the time, come together from ``shiftconv::active_shift_backward``, in one pass.

Source: Jeon and Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018, arXiv:1806.07370,
section 3 (active); Chen et al., "All You Need is a Few Shifts", CVPR 2019, arXiv:1903.05285, section 3 (sparse).
Both papers read ``x[p + shift]``; here as in :mod:`shiftconv.ops.shift` a positive offset moves towards larger indices.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from shiftconv.ops import backend
from shiftconv.ops.sampling import (
    MODES,
    PLAIN,
    Crop,
    PaddingMode,
    along,
    axes_of,
    check_map,
    empty_output,
    format_of,
    geometry,
    source,
)
from shiftconv.ops.shift import apply_shift, fold_mapped_axis, shift

LIMIT = 2.0**31  # pixels; offsets stay below it
_INTERPOLATED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NOT_FINITE = "offset must be finite"  # how a kernel begins when it refuses an offset


class Rule(NamedTuple):
    """What a learned shift computes, apart from its tensors."""

    mode: int  # of MODES
    rounded: bool  # the sparse one
    window: Sequence[int]  # as sampling.geometry


def active_shift(
    x: Tensor,
    offset: Tensor,
    padding_mode: PaddingMode = "zeros",
    crop: Crop | None = None,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """Shift each channel of ``x`` by its own real offset, interpolating linearly along every axis.

    Continuous in the offset. At a whole number the derivative is the one towards smaller offsets, as the cell is
    ``floor(-offset)``.

    Args:
        x: ``[N, C, *S]`` with one to three spatial axes, floating point, any strides.
        offset: ``[C, D]`` floats in pixels on the device of ``x``, one column per spatial axis, in their order; of any
            floating dtype, finite, less than 2**31 either way.
        padding_mode: as in :func:`shiftconv.ops.shift`; it holds for each of the pixels that are interpolated.
        crop: as there.
        stride: as there.

    Returns:
        ``[N, C, *S]``, cropped and strided, in the dtype and memory format of ``x``. Differentiable in both, any order.

    Raises:
        TypeError: an argument is no tensor, or not of floats.
        ValueError: as :func:`shiftconv.ops.shift`, or an offset that is not finite or too large. On a GPU, where
            one would have to wait for the answer, such a channel becomes NaN instead.
    """
    return _learned_shift("active_shift", x, offset, padding_mode, crop, stride)


def sparse_shift(
    x: Tensor,
    offset: Tensor,
    padding_mode: PaddingMode = "zeros",
    crop: Crop | None = None,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """Shift each channel of ``x`` by its offset rounded to whole pixels, and train the real offset.

    Halves round to even. The gradient of ``x`` is the exact transpose of the rounded shift. The gradient of ``offset``
    is that of :func:`active_shift` at the real offset, the rounding being passed over.

    Args:
        x: ``[N, C, *S]`` with one to three spatial axes, any strides, floating point; integers and quantised tensors
            move, too, but cannot be trained.
        offset: as in :func:`active_shift`.
        padding_mode: as in :func:`shiftconv.ops.shift`.
        crop: as there.
        stride: as there.

    Returns:
        ``[N, C, *S]``, cropped and strided, in the dtype and memory format of ``x``. Differentiable in both.

    Raises:
        TypeError, ValueError: as :func:`active_shift`.
    """
    return _learned_shift("sparse_shift", x, offset, padding_mode, crop, stride)


def _learned_shift(
    op: str, x: Tensor, offset: Tensor, padding_mode: str, crop: Crop | None, stride: int | Sequence[int]
) -> Tensor:
    if not (isinstance(x, Tensor) and isinstance(offset, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        came = f"{type(x).__name__} and {type(offset).__name__}"
        raise TypeError(f"{op} takes two tensors, x [N, C, *S] and offset [C, D], got {came}")
    if not offset.is_floating_point():
        raise TypeError(f"{op} takes real offsets, got {offset.dtype}; whole ones go to shift")
    rounded = op == "sparse_shift"
    mode = MODES.get(padding_mode)
    shape = x.shape
    if (
        mode is None
        or not 3 <= len(shape) <= 5
        or offset.shape != (shape[1], len(shape) - 2)
        or offset.device != x.device
    ):
        mode = check_map(op, x, offset, padding_mode)
    window = PLAIN if crop is None and stride == 1 else geometry(x, crop, stride)
    if offset.dtype not in (torch.float32, torch.float64):
        offset = offset.float()  # kernels read the two; nothing is lost
    if x.dtype not in _INTERPOLATED:
        if not rounded:
            raise TypeError(f"{op} interpolates, so it takes floating point x, got {x.dtype}")
        return shift(x, round_offset(offset), cast("PaddingMode", padding_mode), crop, stride)
    return _apply(x, offset, Rule(mode, rounded, window), 0, False)


def _apply(x: Tensor, offset: Tensor, rule: Rule, derivative: int, transpose: bool) -> Tensor:
    """The raw operator, recorded by the cheapest machinery that the caller's transforms allow; as in shift.py."""
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        y = _TransformedActiveShift.apply(x, offset, rule, derivative, transpose)
    elif (x.requires_grad or offset.requires_grad) and torch.is_grad_enabled():
        y = _ActiveShift.apply(x, offset, rule, derivative, transpose)
    else:
        return _run(x, offset, rule, derivative, transpose)
    return cast("Tensor", y)


def _run(x: Tensor, offset: Tensor, rule: Rule, derivative: int, transpose: bool) -> Tensor:
    mode, rounded, window = rule
    try:
        if rounded and derivative == 0 and offset.device.type == "cpu":
            return apply_shift(x, _raw_round(offset), mode, transpose, window)
        return _raw(x, offset, mode, rounded, derivative, transpose, window)
    except RuntimeError as error:
        raise _explained(error) from None


def _explained(error: RuntimeError) -> Exception:
    """A kernel can only raise RuntimeErrors; what an offset is refused for is a wrong value."""
    _, found, what = str(error).partition("\n")[0].partition(_NOT_FINITE)
    return ValueError(found + what) if found else error


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    x, offset = ctx.saved_tensors
    rule, derivative, transpose = ctx.rule, ctx.derivative, ctx.transpose
    wants_x, wants_offset = ctx.needs_input_grad[:2]
    grad = grad.contiguous(memory_format=ctx.format)
    if wants_offset and derivative == 0 and not transpose and not torch.is_grad_enabled():
        try:
            grad_x, grad_offset = _raw_backward(grad, x, offset, *rule)
        except RuntimeError as error:
            raise _explained(error) from None
        return grad_x if wants_x else None, grad_offset, None, None, None
    grad_x = _apply(grad, offset, rule, derivative, not transpose) if wants_x else None
    grad_offset = _offset_gradient(grad, x, offset, rule, derivative, transpose) if wants_offset else None
    return grad_x, grad_offset, None, None, None


def _offset_gradient(grad: Tensor, x: Tensor, offset: Tensor, rule: Rule, derivative: int, transpose: bool) -> Tensor:
    """``[C, D]``: how each channel's part of <grad, y> answers to its offsets; differentiable."""
    columns: list[Tensor] = []
    wide = torch.promote_types(x.dtype, torch.float32)
    for axis in range(offset.shape[1]):
        if derivative >> axis & 1:  # the weights are linear along an axis
            columns.append(torch.zeros_like(offset[:, axis]))
            continue
        change = _apply(x, offset, rule, derivative | 1 << axis, transpose)
        columns.append(_per_channel(grad.to(wide) * change.to(wide)))
    return torch.stack(columns, 1).to(offset.dtype)


def _per_channel(x: Tensor) -> Tensor:
    """Sums ``[C]`` of ``[N, C, *S]``; axis by axis, since torch splits one long sum by the number of threads."""
    while x.ndim > 2:
        x = x.sum(-1)
    return x.sum(0)


class _ActiveShift(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, offset: Tensor, rule: Rule, derivative: int, transpose: bool
    ) -> Tensor:
        # x is needed for the gradient of the offset only.
        ctx.save_for_backward(x if offset.requires_grad else None, offset)
        ctx.rule, ctx.derivative, ctx.transpose, ctx.format = rule, derivative, transpose, format_of(x)
        return _run(x, offset, rule, derivative, transpose)

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]


class _TransformedActiveShift(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, offset: Tensor, rule: Rule, derivative: int, transpose: bool
    ) -> Tensor:
        return _run(x, offset, rule, derivative, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Rule, int, bool], output: Tensor) -> None:
        x, offset, ctx.rule, ctx.derivative, ctx.transpose = inputs
        ctx.save_for_backward(x, offset)
        ctx.format = format_of(x)

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, offset: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        def plain(x: Tensor, offset: Tensor) -> Tensor:
            return _apply(x, offset, *rest)

        return fold_mapped_axis(plain, info.batch_size, in_dims, x, offset)


def round_offset(offset: Tensor) -> Tensor:
    """Whole numbers, int64, of real offsets ``[C, D]``; halves to even, as :func:`sparse_shift` rounds.

    Raises:
        ValueError: on the CPU, an offset that is not finite or not below 2**31 either way.
    """
    try:
        return _raw_round(offset.detach().to(torch.promote_types(offset.dtype, torch.float32)))
    except RuntimeError as error:
        raise _explained(error) from None


def reference(
    x: Tensor,
    offset: Tensor,
    mode: int,
    rounded: bool,
    derivative: int,
    transpose: bool,
    window: Sequence[int] = PLAIN,
) -> Tensor:
    """Ground truth on every device: two weighted gathers per axis, or for the transpose two scatters, last axis first.

    Arguments and result as the raw operator: ``x`` ``[N, C, *S]`` of floats, ``offset`` ``[C, D]`` of floats, ``mode``
    from :data:`MODES`, ``rounded`` for the sparse shift's single tap; a set bit of ``derivative`` asks for the
    derivative by the offset of that axis, and then nothing is rounded.
    """
    _check_finite(offset)
    result = empty_output(x, window, transpose)
    if x.numel() == 0 or result.numel() == 0:
        return result.zero_()
    y = x if x.dtype == torch.float64 else x.float()
    axes = list(enumerate(axes_of(x, window, transpose)))
    for i, axis in reversed(axes) if transpose else axes:
        low = -offset[:, i].to(torch.promote_types(offset.dtype, y.dtype))
        if rounded and derivative == 0:
            cell, d = low.round(), low - low  # zero, or NaN where the offset is not finite
        else:
            cell = low.floor()
            d = low - cell
        weights = (1 - d, d)
        if derivative >> i & 1:
            weights = (torch.ones_like(d), -torch.ones_like(d))
        shape = [*y.shape]
        shape[2 + i] = axis.size if transpose else axis.length
        total = y.new_zeros(shape)
        for tap, weight in enumerate(weights):
            index, inside = source(axis, -cell.to(torch.int64) - tap, mode)
            index = along(index, x, i).expand([*y.shape[: 2 + i], axis.length, *y.shape[3 + i :]])
            weight = along((weight[:, None] * inside).to(y.dtype), x, i)
            value = (y if transpose else y.gather(2 + i, index)) * weight
            value = value.masked_fill(weight == 0, 0)  # also of what is not finite
            if transpose:
                total.scatter_add_(2 + i, index, value)
            else:
                total += value
        y = total
    return result.copy_(y)


def reference_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mode: int, rounded: bool, window: Sequence[int] = PLAIN
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``offset`` from that of the output, each by :func:`reference`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    changes = [reference(x.to(wide), offset, mode, False, 1 << axis, False, window) for axis in range(offset.shape[1])]
    columns = [_per_channel(grad.to(wide) * change) for change in changes]
    grad_x = empty_output(x).copy_(reference(grad, offset, mode, rounded, 0, True, window))
    return grad_x, torch.stack(columns, 1).to(offset.dtype)


def _check_finite(offset: Tensor) -> None:
    """Refuse what no pixel is found by; on the CPU only, as elsewhere one would have to wait for the answer."""
    if offset.device.type == "cpu" and offset.numel() > 0:
        low, high = offset.min().item(), offset.max().item()
        if not (low > -LIMIT and high < LIMIT):  # NaN fails both
            raise ValueError(f"{_NOT_FINITE} and less than 2**31 pixels either way, got values from {low} to {high}")


def _reference_round(offset: Tensor) -> Tensor:
    _check_finite(offset)
    return offset.round().to(torch.int64)


def _first_call(
    x: Tensor, offset: Tensor, mode: int, rounded: bool, derivative: int, transpose: bool, window: Sequence[int] = PLAIN
) -> Tensor:
    """Runs where no kernel is registered (yet): pick one for the device of ``x``, then go through it."""
    if x.layout is not torch.strided:
        raise TypeError(f"a learned shift takes dense tensors, got one of layout {x.layout}")
    run = backend.kernel("active_shift", x.device.type, reference)
    return run(x, offset, mode, rounded, derivative, transpose, window)


def _first_call_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mode: int, rounded: bool, window: Sequence[int] = PLAIN
) -> tuple[Tensor, Tensor]:
    run = backend.kernel("active_shift", x.device.type, reference_backward, "active_shift_backward")
    return run(grad, x, offset, mode, rounded, window)


def _first_call_round(offset: Tensor) -> Tensor:
    if offset.device.type != "cpu":  # elsewhere there is nothing to save
        return _reference_round(offset)
    return backend.kernel("shift", "cpu", _reference_round, "round_offset")(offset)


def _fake(
    x: Tensor, offset: Tensor, mode: int, rounded: bool, derivative: int, transpose: bool, window: Sequence[int] = PLAIN
) -> Tensor:
    return empty_output(x, window, transpose)


def _fake_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mode: int, rounded: bool, window: Sequence[int] = PLAIN
) -> tuple[Tensor, Tensor]:
    return empty_output(x), torch.empty_like(offset, memory_format=torch.contiguous_format)


def _fake_round(offset: Tensor) -> Tensor:
    return torch.empty_like(offset, dtype=torch.int64, memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("shiftconv", "FRAGMENT")
for _schema, _composite, _meta in (
    (
        "active_shift(Tensor x, Tensor offset, int mode, bool rounded, int derivative, bool transpose, "
        "SymInt[] geometry=[]) -> Tensor",
        _first_call,
        _fake,
    ),
    (
        "active_shift_backward(Tensor grad, Tensor x, Tensor offset, int mode, bool rounded, SymInt[] geometry=[]) "
        "-> (Tensor, Tensor)",
        _first_call_backward,
        _fake_backward,
    ),
    ("round_offset(Tensor offset) -> Tensor", _first_call_round, _fake_round),
):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _composite, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shiftconv::{_name}", _meta, lib=_LIBRARY)
_raw = torch.ops.shiftconv.active_shift.default
_raw_backward = torch.ops.shiftconv.active_shift_backward.default
_raw_round = torch.ops.shiftconv.round_offset.default
