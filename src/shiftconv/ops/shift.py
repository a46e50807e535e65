"""Integer shift: move every channel of a feature map by its own number of whole pixels.

    y[n, c, p] = x[n, c, p - offset[c]]        p runs over the spatial axes

A positive offset moves the content towards larger indices, as ``torch.roll`` does. Every shift in this package
stands on this one primitive, and its gradient is the transpose of the same linear map, S'.

One raw operator carries both, ``shiftconv::shift(x, offset, mode, transpose, geometry)``. Its reference below runs on
every device; :mod:`shiftconv.ops.backend` puts a C++ or Triton kernel over it at the first call on a device.

Source: Wu et al., "Shift", CVPR 2018, arXiv:1711.08141, section 3.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import Any, cast

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


def shift(
    x: Tensor,
    offset: Tensor,
    padding_mode: PaddingMode = "zeros",
    crop: Crop | None = None,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """Shift each channel of ``x`` by its own integer offset.

    Args:
        x: ``[N, C, *S]`` with one to three spatial axes, any dtype, any strides; quantised tensors too.
        offset: ``[C, D]`` integers in pixels on the device of ``x``, one column per spatial axis, in their order; they
            may exceed the image.
        padding_mode: what the vacated border reads, named as in ``torch.nn.Conv2d``; ``symmetric`` as in NumPy. An axis
            of size 1 reads its only pixel, except that ``zeros`` fills zero (the zero point of a quantised tensor).
        crop: per spatial axis a pair, the pixels to cut from its lower and its upper side; negative ones extend it.
        stride: distance of the positions that are kept, the first of them after the crop; one for all, or one per axis.

    Returns:
        ``[N, C, *S]``, with a crop or stride ``ceil((S - lower - upper) / stride)`` per axis, in the dtype and memory
        format of ``x``; never a view of it. Differentiable in ``x``, any order.

    Raises:
        TypeError: an argument is no tensor, ``offset`` is not of integers, or a crop or stride is no whole number.
        ValueError: ``x`` is not 3-D to 5-D, ``offset`` has another shape or device, the padding mode is unknown, or the
            crop leaves nothing.
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
    window = PLAIN if crop is None and stride == 1 else geometry(x, crop, stride)
    if x.is_quantized:
        return _shift_quantized(x, offset, mode, window)
    return apply_shift(x, offset, mode, False, window)


def _check(x: Tensor, offset: Tensor, padding_mode: str) -> tuple[int, Tensor]:
    """The slow half of the validation: say what is wrong, or convert the offsets to int64."""
    if offset.is_floating_point() or offset.is_complex() or offset.dtype is torch.bool:
        raise TypeError(f"shift takes integer offsets, got {offset.dtype}; learned offsets go to active_shift")
    return check_map("shift", x, offset, padding_mode), offset.to(torch.int64)


def shift_(x: Tensor, offset: Tensor, padding_mode: PaddingMode = "zeros") -> Tensor:
    """Shift the first channels of ``x`` in place, as many as there are offsets; the others are not touched.

    This is how a network whose moving channels lie together pays for those alone (inference only).

    Args:
        x: ``[N, C, *S]`` with one to three spatial axes, any dtype.
        offset: ``[K, D]`` integers, ``K <= C``, as in :func:`shift`.
        padding_mode: as in :func:`shift`.

    Returns:
        ``x``.

    Raises:
        TypeError: as :func:`shift`, or ``x`` is quantised.
        ValueError: as :func:`shift`, or more offsets than channels.
        RuntimeError: ``x`` takes part in automatic differentiation.
    """
    if not (isinstance(x, Tensor) and isinstance(offset, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        came = f"{type(x).__name__} and {type(offset).__name__}"
        raise TypeError(f"shift_ takes two tensors, x [N, C, *S] and offset [K, D], got {came}")
    if x.is_quantized:
        raise TypeError(f"shift_ takes plain tensors, got {x.dtype}; shift takes quantised ones")
    if x.ndim < 2 or offset.ndim != 2 or offset.shape[0] > x.shape[1]:
        came = f"{[*offset.shape]} for x {[*x.shape]}"
        raise ValueError(f"offset must be [K, D] with K <= C channels of x [N, C, *S], got {came}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("shift_ works in place and has no gradient; use shift, or torch.no_grad()")
    mode, offset = _check(x[:, : offset.shape[0]], offset, padding_mode)
    _raw_in_place(x, offset, mode)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)  # as torch's own operators in place do
    return x


def _shift_quantized(x: Tensor, offset: Tensor, mode: int, window: tuple[int, ...]) -> Tensor:
    """Shift the stored integers, counted from the zero point, so that what zeros fill stands for 0.0."""
    if x.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        raise TypeError(f"shift takes tensors that are quantised as a whole, got {x.qscheme()}")
    ints = x.int_repr()
    # Both differences wrap around alike in 8 bits, so they cancel.
    ints = apply_shift(ints - x.q_zero_point(), offset, mode, False, window) + x.q_zero_point()
    return torch._make_per_tensor_quantized_tensor(ints, x.q_scale(), x.q_zero_point())  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def apply_shift(x: Tensor, offset: Tensor, mode: int, transpose: bool, window: Sequence[int] = PLAIN) -> Tensor:
    """The raw operator, recorded by the cheapest machinery that the caller's transforms allow.

    A Function with ``setup_context`` costs some 10 microseconds a call, so only functorch's transforms pay for it.
    """
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        y = _TransformedShift.apply(x, offset, mode, transpose, window)
    elif x.requires_grad and torch.is_grad_enabled():
        y = _Shift.apply(x, offset, mode, transpose, window)
    else:
        return _raw(x, offset, mode, transpose, window)
    return cast("Tensor", y)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Apply the other one of S and S' to the gradient, laid out as x: sum() sends expanded, channels-first ones."""
    (offset,) = ctx.saved_tensors
    grad = grad.contiguous(memory_format=ctx.format)
    return apply_shift(grad, offset, ctx.mode, not ctx.transpose, ctx.window), None, None, None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, offset: Tensor, mode: int, transpose: bool, window: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(offset)
        ctx.mode, ctx.transpose, ctx.window, ctx.format = mode, transpose, window, format_of(x)
        return _raw(x, offset, mode, transpose, window)

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]


class _TransformedShift(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, offset: Tensor, mode: int, transpose: bool, window: Sequence[int]
    ) -> Tensor:
        return _raw(x, offset, mode, transpose, window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool, Sequence[int]], output: Tensor) -> None:
        x, offset, ctx.mode, ctx.transpose, ctx.window = inputs
        ctx.save_for_backward(offset)
        ctx.format = format_of(x)

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, offset: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        def plain(x: Tensor, offset: Tensor) -> Tensor:
            return apply_shift(x, offset, *rest)

        return fold_mapped_axis(plain, info.batch_size, in_dims, x, offset)


def fold_mapped_axis(
    operator: Any, size: int, in_dims: tuple[int | None, ...], x: Tensor, offset: Tensor
) -> tuple[Tensor, int]:
    """Map an operator on ``x`` ``[N, C, *S]`` and ``offset`` ``[C, D]`` that treats images and channels apart.

    The mapped axis folds into the batch, or into the channels when the offsets are mapped as well.
    """
    x_dim, offset_dim = in_dims[:2]
    if offset_dim is None:
        assert x_dim is not None
        x = x.movedim(x_dim, 0)
        return operator(x.flatten(0, 1), offset).unflatten(0, x.shape[:2]), 0
    offset = offset.movedim(offset_dim, 0)
    x = x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if x_dim is None else x.movedim(x_dim, 1)
    return operator(x.flatten(1, 2), offset.flatten(0, 1)).unflatten(1, x.shape[1:3]), 1


def reference(x: Tensor, offset: Tensor, mode: int, transpose: bool, window: Sequence[int] = PLAIN) -> Tensor:
    """Ground truth on every device: one gather per spatial axis, or for the transpose one scatter, last axis first.

    Arguments and result as the raw operator: ``x`` ``[N, C, *S]``, ``offset`` int64 ``[C, D]``, ``mode`` from
    :data:`MODES`, ``window`` from :func:`shiftconv.ops.sampling.geometry`. Sums of 16-bit floats accumulate in float32.
    """
    result = empty_output(x, window, transpose)
    if x.numel() == 0 or result.numel() == 0:
        return result.zero_()
    axes = list(enumerate(axes_of(x, window, transpose)))
    y = _gatherable(x, transpose)
    for i, axis in reversed(axes) if transpose else axes:
        index, inside = source(axis, offset[:, i], mode)
        shape = [*y.shape]
        shape[2 + i] = axis.length
        index, inside = along(index, x, i).expand(shape), along(inside, x, i)
        if transpose:
            shape[2 + i] = axis.size
            y = y.new_zeros(shape).scatter_add(2 + i, index, y.masked_fill(~inside, 0))
        else:
            y = y.gather(2 + i, index).masked_fill(~inside, 0)
    if not transpose:
        y = y.view(x.dtype)
    return result.copy_(y)  # neither gather nor the sums keep strides and dtype


def _gatherable(x: Tensor, transpose: bool) -> Tensor:
    """``x`` in a dtype that gather takes, bit for bit; for the transpose, in one that can be summed."""
    if transpose:
        if x.is_floating_point():
            return x.float() if x.itemsize <= 2 else x
        return x.to(torch.complex64 if x.itemsize == 4 else x.dtype) if x.is_complex() else x.long()
    if x.itemsize == 16:
        return x
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _first_call(x: Tensor, offset: Tensor, mode: int, transpose: bool, window: Sequence[int] = PLAIN) -> Tensor:
    """Runs where no kernel is registered (yet): pick one for the device of ``x``, then go through it."""
    if x.layout is not torch.strided:
        raise TypeError(f"shift takes dense tensors, got one of layout {x.layout}")
    return backend.kernel("shift", x.device.type, reference)(x, offset, mode, transpose, window)


def _first_call_in_place(x: Tensor, offset: Tensor, padding: int) -> None:
    backend.kernel("shift", x.device.type, _in_place, "shift_")(x, offset, padding)


def _in_place(x: Tensor, offset: Tensor, padding: int) -> None:
    """Where there is no kernel that works in place: move the part, and copy it back."""
    part = x[:, : offset.shape[0]]
    part.copy_(_raw(part, offset, padding, False, PLAIN))


def _fake(x: Tensor, offset: Tensor, mode: int, transpose: bool, window: Sequence[int] = PLAIN) -> Tensor:
    return empty_output(x, window, transpose)


def _fake_in_place(x: Tensor, offset: Tensor, padding: int) -> None:
    pass


# All at import, so that tracing (torch.compile, export) meets the fakes and never the compilation of a kernel.
_LIBRARY = torch.library.Library("shiftconv", "FRAGMENT")
_LIBRARY.define(
    "shift(Tensor x, Tensor offset, int mode, bool transpose, SymInt[] geometry=[]) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# "mode" is a word that torch's functionalisation of operators in place takes for itself.
_LIBRARY.define("shift_(Tensor(a!) x, Tensor offset, int padding) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("shift", _first_call, "CompositeExplicitAutograd")
_LIBRARY.impl("shift_", _first_call_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("shiftconv::shift", _fake, lib=_LIBRARY)
torch.library.register_fake("shiftconv::shift_", _fake_in_place, lib=_LIBRARY)
_raw = torch.ops.shiftconv.shift.default
_raw_in_place = torch.ops.shiftconv.shift_.default
