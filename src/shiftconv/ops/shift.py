"""Integer shift: move every channel of a feature map by its own number of whole pixels.

    y[n, c, p] = x[n, c, p - offset[c]]        p runs over the spatial axes

A positive offset moves the content towards larger indices, as ``torch.roll`` does. Every shift in this package
stands on this one primitive, and its gradient is the transpose of the same linear map, S'.

One raw operator carries both, ``shiftconv::shift(x, offset, mode, transpose)``. Its reference below runs on every
device; :mod:`shiftconv.ops.backend` puts a C++ or Triton kernel over it at the first call on a device.

Source: Wu et al., "Shift", CVPR 2018, arXiv:1711.08141, section 3.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.ops import backend

PaddingMode = Literal["zeros", "replicate", "circular", "reflect", "symmetric"]

# A kernel sees the place in this order: an integer crosses the dispatcher faster than a string.
MODES: dict[str, int] = {name: code for code, name in enumerate(get_args(PaddingMode))}
ZEROS, REPLICATE, CIRCULAR, REFLECT, SYMMETRIC = MODES.values()

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def shift(x: Tensor, offset: Tensor, padding_mode: PaddingMode = "zeros") -> Tensor:
    """Shift each channel of ``x`` by its own integer offset.

    Args:
        x: ``[N, C, *S]`` with one to three spatial axes, any dtype, any strides.
        offset: ``[C, D]`` integers in pixels on the device of ``x``, one column per spatial axis, in their order; they
            may exceed the image.
        padding_mode: what the vacated border reads, named as in ``torch.nn.Conv2d``; ``symmetric`` as in NumPy. An axis
            of size 1 reads its only pixel, except that ``zeros`` fills zero.

    Returns:
        ``[N, C, *S]`` in the dtype and memory format of ``x``; never a view of it. Differentiable in ``x``, any order.

    Raises:
        TypeError: an argument is no tensor, or ``offset`` is not of integers.
        ValueError: ``x`` is not 3-D to 5-D, ``offset`` has another shape or device, or the padding mode is unknown.
    """
    if not (isinstance(x, Tensor) and isinstance(offset, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        came = f"{type(x).__name__} and {type(offset).__name__}"
        raise TypeError(f"shift takes two tensors, x [N, C, *S] and offset [C, D], got {came}")
    mode = MODES.get(padding_mode)
    shape = x.shape
    if (
        mode is None
        or offset.dtype is not torch.int64
        or not 3 <= len(shape) <= 5
        or offset.shape != (shape[1], len(shape) - 2)
        or offset.device != x.device
    ):
        mode, offset = _check(x, offset, padding_mode)
    return _apply(x, offset, mode, False)


def _check(x: Tensor, offset: Tensor, padding_mode: str) -> tuple[int, Tensor]:
    """The slow half of the validation: say what is wrong, or convert the offsets to int64."""
    if offset.is_floating_point() or offset.is_complex() or offset.dtype is torch.bool:
        raise TypeError(f"shift takes integer offsets, got {offset.dtype}; learned offsets go to active_shift")
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"shift takes x [N, C, *S] with one to three spatial axes, got {x.ndim}-D x {[*x.shape]}")
    expected = [x.shape[1], x.ndim - 2]
    if offset.shape != (*expected,):
        raise ValueError(f"offset must be [C, D] = {expected} for x {[*x.shape]}, got {[*offset.shape]}")
    if offset.device != x.device:
        raise ValueError(f"offset must be on the device of x, {x.device}, got {offset.device}")
    if padding_mode not in MODES:
        raise unknown("padding_mode", padding_mode, MODES)
    return MODES[padding_mode], offset.to(torch.int64)


def _apply(x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:
    """The raw operator, recorded by the cheapest machinery that the caller's transforms allow.

    A Function with ``setup_context`` costs some 10 microseconds a call, so only functorch's transforms pay for it.
    """
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        y = _TransformedShift.apply(x, offset, mode, transpose)
    elif x.requires_grad and torch.is_grad_enabled():
        y = _Shift.apply(x, offset, mode, transpose)
    else:
        return _raw(x, offset, mode, transpose)
    return cast("Tensor", y)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Apply the other one of S and S' to the gradient, laid out as x: sum() sends expanded, channels-first ones."""
    (offset,) = ctx.saved_tensors
    grad = grad.contiguous(memory_format=ctx.format)
    return _apply(grad, offset, ctx.mode, not ctx.transpose), None, None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(offset)
        ctx.mode, ctx.transpose = mode, transpose
        ctx.format = torch.contiguous_format if x.is_contiguous() else memory_format(x)
        return _raw(x, offset, mode, transpose)

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]


class _TransformedShift(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _raw(x, offset, mode, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
        x, offset, ctx.mode, ctx.transpose = inputs
        ctx.save_for_backward(offset)
        ctx.format = torch.contiguous_format if x.is_contiguous() else memory_format(x)

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, offset: Tensor, mode: int, transpose: bool
    ) -> tuple[Tensor, int]:
        """Fold the mapped axis into the batch, or into the channels when the offsets are mapped as well."""
        x_dim, offset_dim = in_dims[:2]
        if offset_dim is None:
            assert x_dim is not None
            x = x.movedim(x_dim, 0)
            y = _apply(x.flatten(0, 1), offset, mode, transpose)
            return y.unflatten(0, x.shape[:2]), 0
        offset = offset.movedim(offset_dim, 0)
        x = x.unsqueeze(1).expand(-1, info.batch_size, *x.shape[1:]) if x_dim is None else x.movedim(x_dim, 1)
        y = _apply(x.flatten(1, 2), offset.flatten(0, 1), mode, transpose)
        return y.unflatten(1, x.shape[1:3]), 1


def reference(x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:
    """Ground truth on every device: one gather per spatial axis, or for the transpose one scatter, last axis first.

    Arguments and result as the raw operator: ``x`` ``[N, C, *S]``, ``offset`` int64 ``[C, D]``, ``mode`` from
    :data:`MODES`. Sums of 16-bit floats accumulate in float32.
    """
    if x.numel() == 0:
        return empty_output(x)
    axes = range(x.ndim - 2)
    y = _gatherable(x, transpose)
    for axis in reversed(axes) if transpose else axes:
        index, inside = _source(x, offset, axis, mode)
        if transpose:
            y = torch.zeros_like(y).scatter_add(2 + axis, index, y.masked_fill(~inside, 0))
        else:
            y = y.gather(2 + axis, index).masked_fill(~inside, 0)
    if not transpose:
        y = y.view(x.dtype)
    return empty_output(x).copy_(y)  # neither gather nor the sums keep strides and dtype


def _gatherable(x: Tensor, transpose: bool) -> Tensor:
    """``x`` in a dtype that gather takes, bit for bit; for the transpose, in one that can be summed."""
    if transpose:
        if x.is_floating_point():
            return x.float() if x.itemsize <= 2 else x
        return x.to(torch.complex64 if x.itemsize == 4 else x.dtype) if x.is_complex() else x.long()
    if x.itemsize == 16:
        return x
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _source(x: Tensor, offset: Tensor, axis: int, mode: int) -> tuple[Tensor, Tensor]:
    """Where each output position reads along one axis, and whether it reads at all; both broadcast to ``x``."""
    size = x.shape[2 + axis]
    period = {CIRCULAR: size, REFLECT: max(2 * size - 2, 1), SYMMETRIC: 2 * size}.get(mode)
    column = offset[:, axis, None]
    # Without this, offsets near the ends of int64 would overflow.
    column = column.clamp(-size, size) if period is None else column % period
    at = torch.arange(size, device=x.device) - column  # [C, S]
    inside = (at >= 0) & (at < size) if mode == ZEROS else torch.ones_like(at, dtype=torch.bool)
    if period is None:
        at = at.clamp(0, size - 1)
    else:
        at = at % period
        if mode == REFLECT:  # abc|ba: the edge pixel does not repeat
            at = torch.minimum(at, period - at)
        elif mode == SYMMETRIC:  # abc|cba
            at = torch.minimum(at, period - 1 - at)
    view = [1, x.shape[1], *(size if i == axis else 1 for i in range(x.ndim - 2))]
    return at.view(view).expand_as(x), inside.view(view)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for an ``x`` that is dense in none: channels last if its channels are adjacent."""
    last = _CHANNELS_LAST.get(x.ndim)
    return last if last is not None and x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def empty_output(x: Tensor) -> Tensor:
    """Uninitialised memory for a result: the strides of ``x`` if it is dense in a memory format, else dense in one."""
    last = _CHANNELS_LAST.get(x.ndim)
    if x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last)):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=memory_format(x))


def _first_call(x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:
    """Runs where no kernel is registered (yet): pick one for the device of ``x``, then go through it."""
    return backend.kernel("shift", x.device.type, reference)(x, offset, mode, transpose)


def _fake(x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:
    return empty_output(x)


# Both at import, so that tracing (torch.compile, export) meets the fake and never the compilation of a kernel.
_LIBRARY = torch.library.Library("shiftconv", "FRAGMENT")
_LIBRARY.define(
    "shift(Tensor x, Tensor offset, int mode, bool transpose) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("shift", _first_call, "CompositeExplicitAutograd")
torch.library.register_fake("shiftconv::shift", _fake, lib=_LIBRARY)
_raw = torch.ops.shiftconv.shift.default
