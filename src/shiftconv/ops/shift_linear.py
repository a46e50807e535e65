"""The shift fused into the 1x1 convolution that follows it: the shifted map is never written.

    y[n, o, p] = act(bias[o] + sum over c of weight[o, c] * x~[n, c, stride * p - offset[c]]) + residual[n, o, p]

``x~`` is ``x`` extended by the padding mode. A stride computes the positions that it keeps and no others. With offsets
of zero this is a 1x1 convolution with everything that surrounds it in a residual block.

The raw operator, whose kernels compute exactly this, sums 16-bit types in float32 and rounds once::

    shiftconv::shift_linear(Tensor x, Tensor offset, Tensor weight, Tensor? bias, Tensor? residual,
                            int mode, int[] stride, bool relu) -> Tensor

``x`` is ``[N, C, *S]``, ``offset`` int64 ``[C, D]``, ``weight`` ``[O, C]``, ``bias`` ``[O]``, ``residual``
``[N, O, *S']`` with ``S' = ceil(S / stride)``, all of any strides and the floating ones of one dtype; ``mode`` is from
:data:`shiftconv.ops.sampling.MODES`, ``stride`` has one number per spatial axis. The result is dense in the memory
format of ``x``.

Source: Wu et al., "Shift", CVPR 2018, arXiv:1711.08141, sections 3 and 4.1 (its block ends in relu, then the sum).
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.ops import backend
from shiftconv.ops.sampling import MODES, PLAIN, ZEROS, PaddingMode, check_map, format_of, geometry
from shiftconv.ops.shift import apply_shift
from shiftconv.ops.shift import reference as shift_reference

Activation = Literal["relu"]

_ACTIVATIONS: dict[str | None, bool] = {None: False, "relu": True}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # here, as the compiler cannot trace the question
_ONES = ([1], [1, 1], [1, 1, 1])


def shift_linear(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding_mode: PaddingMode = "zeros",
    stride: int | Sequence[int] = 1,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Shift each channel of ``x`` by its own integer offset, then mix the channels at every position.

    Args:
        x: ``[N, C, *S]`` with one to three spatial axes, float64, float32, float16 or bfloat16, any strides.
        offset: ``[C, D]`` integers in pixels on the device of ``x``, as in :func:`shiftconv.ops.shift`.
        weight: ``[O, C]`` in the dtype of ``x``.
        bias: ``[O]``, or None.
        padding_mode: what the vacated border reads, as in :func:`shiftconv.ops.shift`.
        stride: keep every ``stride``-th position; one for all axes or one each.
        activation: ``relu``, or None.
        residual: ``[N, O, *S']``, added last, after the activation; or None.

    Returns:
        ``[N, O, *S']`` with ``S' = ceil(S / stride)`` in the dtype and memory format of ``x``. Differentiable in all
        but ``offset``, any order. Under autocast the tensors are cast as those of a linear layer are.

    Raises:
        TypeError: an argument is no tensor, ``offset`` is not of integers, the others are not of one floating dtype, or
            a stride is no whole number.
        ValueError: shapes or devices that do not fit, or an unknown padding mode or activation.
    """
    _check_types(x, offset, weight, bias, residual)
    device = x.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        x, weight, bias, residual = _autocast(x, weight, bias, residual)
    mode, relu, axes = MODES.get(padding_mode), _ACTIVATIONS.get(activation), x.ndim - 2
    if mode is None or relu is None or not 1 <= axes <= 3 or offset.shape != (x.shape[1], axes):
        check_map("shift_linear", x, offset, padding_mode)
        raise unknown("activation", activation, [name for name in _ACTIVATIONS if name])
    if offset.dtype is not torch.int64 or offset.device != device:
        check_map("shift_linear", x, offset, padding_mode)
        offset = _integers(offset)
    steps = _ONES[axes - 1] if stride == 1 else [*geometry(x, None, stride)[3::4]]
    _check(x, weight, bias, residual, steps)
    return apply_shift_linear(x, offset, weight, bias, residual, mode, steps, relu)


def _check_types(x: object, offset: object, weight: object, bias: object, residual: object) -> None:
    if not (
        isinstance(x, Tensor)
        and isinstance(offset, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
        and (residual is None or isinstance(residual, Tensor))
    ):
        came = ", ".join(type(t).__name__ for t in (x, offset, weight, bias, residual))
        raise TypeError(f"shift_linear takes tensors: x, offset, weight, and bias and residual or None; got {came}")


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All tensors in the dtype that autocast lends to matrix products; float64 is left alone."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype is torch.float64 else t.to(dtype) for t in (x, *others)
    )


def _integers(offset: Tensor) -> Tensor:
    if offset.is_floating_point() or offset.is_complex() or offset.dtype is torch.bool:
        raise TypeError(f"shift_linear takes integer offsets, got {offset.dtype}")
    return offset.to(torch.int64)


def _sizes(x: Tensor, weight: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    """``[N, O, *S']``, the sizes of the result."""
    return (x.shape[0], weight.shape[0], *(-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True)))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int]) -> None:
    """Whether the floating tensors fit together; this costs more than the call of a kernel if it is not brief."""
    dtype, device, sizes = x.dtype, x.device, weight.shape
    if dtype not in _DTYPES:
        raise TypeError(f"shift_linear takes x of a floating dtype, got {dtype}")
    if len(sizes) != 2 or sizes[1] != x.shape[1]:
        raise ValueError(f"weight must be [O, C] with C = {x.shape[1]} channels of x, got {[*sizes]}")
    if weight.dtype is not dtype or weight.device != device:
        _refuse("weight", weight, x, sizes)
    if bias is not None and (bias.dtype is not dtype or bias.device != device or bias.shape != sizes[:1]):
        _refuse("bias", bias, x, sizes[:1])
    if residual is not None:
        expected = _sizes(x, weight, stride)
        if residual.dtype is not dtype or residual.device != device or residual.shape != expected:
            _refuse("residual", residual, x, expected)


def _refuse(name: str, tensor: Tensor, x: Tensor, expected: Sequence[int]) -> None:
    """Say what is wrong with one of the tensors."""
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    raise ValueError(f"{name} must be {[*expected]} for x {[*x.shape]}, got {[*tensor.shape]}")


def apply_shift_linear(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mode: int,
    stride: Sequence[int],
    relu: bool,
) -> Tensor:
    """The raw operator, recorded by the cheapest machinery that the caller's transforms allow; see ``apply_shift``."""
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if _prefers_torch(x):
        return _by_torch(x, offset, weight, bias, residual, mode, stride, relu)
    if not (transformed or recorded):
        return _raw(x, offset, weight, bias, residual, mode, stride, relu)
    function = _TransformedShiftLinear if transformed else _ShiftLinear
    if relu and residual is not None:
        # The gradient needs to know where relu has cut, which the sum no longer shows.
        y = function.apply(x, offset, weight, bias, None, mode, stride, relu)
        return cast("Tensor", y) + residual
    return cast("Tensor", function.apply(x, offset, weight, bias, residual, mode, stride, relu))


def _prefers_torch(x: Tensor) -> bool:
    """Whether a shift and torch's convolution are faster than the kernel: in channels_last on the CPU they are."""
    return (
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not x.is_contiguous() and x.ndim > 3
    )


def _by_torch(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mode: int,
    stride: Sequence[int],
    relu: bool,
) -> Tensor:
    """The same one operator after the other, by what differentiates itself; 16-bit types round after each."""
    moved = apply_shift(x, offset, mode, False, _window(x, stride))
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    y = convolve(moved, weight.view(*weight.shape, *[1] * (x.ndim - 2)), bias)
    y = y.relu() if relu else y
    return y if residual is None else y + residual


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients to x, weight, bias and residual; the shifted map is made anew."""
    x, offset, weight, y = ctx.saved_tensors
    wants_x, _, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
    grad = grad.contiguous(memory_format=format_of(x))  # sum() sends expanded ones
    grad_residual = grad if wants_residual else None
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    fused = _has_gradient_kernels(x) and grad.numel() > 0
    grad_x = grad_weight = grad_bias = None
    if wants_x:
        grad_x = _gradient_to_x(grad, x, offset, weight, ctx.mode, ctx.stride, fused)
    if fused and (wants_weight or wants_bias):
        grad_weight, grad_bias = _raw_weight(grad, x, offset, ctx.mode, ctx.stride)
        return grad_x, None, grad_weight, grad_bias if wants_bias else None, grad_residual, None, None, None
    if wants_weight:
        moved = apply_shift(x, offset, ctx.mode, False, _window(x, ctx.stride))
        grad_weight = torch.einsum("nop,ncp->oc", grad.flatten(2), moved.flatten(2))
    if wants_bias:
        grad_bias = grad.flatten(2).sum((0, 2))
    return grad_x, None, grad_weight, grad_bias, grad_residual, None, None, None


def _gradient_to_x(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mode: int, stride: Sequence[int], fused: bool
) -> Tensor:
    """S' (W' grad), in one step where a kernel has it."""
    plain = all(step == 1 for step in stride)
    if fused and plain and mode == ZEROS:
        return _raw_input(grad, offset, weight)
    still = offset.new_zeros((weight.shape[0], x.ndim - 2))
    mixed = apply_shift_linear(grad, still, weight.t(), None, None, ZEROS, _ONES[x.ndim - 3], False)
    return apply_shift(mixed, offset, mode, True, _window(x, stride))


def _window(x: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    return PLAIN if all(step == 1 for step in stride) else geometry(x, None, stride)


def _has_gradient_kernels(x: Tensor) -> bool:
    """Whether the kernels for first gradients take ``x``; what is differentiated again takes other steps."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous()
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        and _AVX512
    )


def _save(ctx: Any, inputs: Sequence[Any], y: Tensor) -> None:
    x, offset, weight, _, _, ctx.mode, ctx.stride, ctx.relu = inputs
    ctx.save_for_backward(x, offset, weight, y if ctx.relu else None)


class _ShiftLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _raw(*inputs)
        _save(ctx, inputs, y)
        return y

    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]


class _TransformedShiftLinear(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _raw(*inputs)

    setup_context = staticmethod(_save)  # pyright: ignore[reportAssignmentType]
    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fold the mapped axis into the batch; where the map itself differs, one call after the other."""
        size, dims = info.batch_size, in_dims[:5]
        x, offset, weight, bias, residual, *rest = inputs
        if dims[0] is None or any(dim is not None for dim in dims[1:4]):
            tensors = inputs[:5]
            each = [
                [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)]
                for i in range(size)
            ]
            return torch.stack([apply_shift_linear(*some, *rest) for some in each]), 0
        x = x.movedim(dims[0], 0)
        if residual is not None:
            residual = residual.expand(size, *residual.shape) if dims[4] is None else residual.movedim(dims[4], 0)
            residual = residual.flatten(0, 1)
        y = apply_shift_linear(x.flatten(0, 1), offset, weight, bias, residual, *rest)
        return y.unflatten(0, x.shape[:2]), 0


def reference(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mode: int,
    stride: Sequence[int],
    relu: bool,
) -> Tensor:
    """Ground truth on every device, in plain torch: shift, then matrix product. Arguments as the raw operator."""
    wide = torch.float32 if x.itemsize == 2 else x.dtype
    with torch.no_grad():
        moved = shift_reference(x, offset, mode, False, geometry(x, None, stride)).to(wide)
        y = torch.einsum("oc,nc...->no...", weight.to(wide), moved)
        if bias is not None:
            y = y + bias.to(wide).view(-1, *[1] * (x.ndim - 2))
        if relu:
            y = y.relu()
        if residual is not None:
            y = y + residual.to(wide)
        return _fake(x, offset, weight, bias, residual, mode, stride, relu).copy_(y)


def input_reference(grad: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """S' (W' grad) for padding with zeros and no stride, in plain torch: ``[N, C, *S]`` for ``[N, O, *S]``."""
    with torch.no_grad():
        wide = torch.float32 if grad.itemsize == 2 else grad.dtype
        mixed = torch.einsum("oc,no...->nc...", weight.to(wide), grad.to(wide)).contiguous()
        return shift_reference(mixed, offset, ZEROS, True).to(grad.dtype)


def weight_reference(
    grad: Tensor, x: Tensor, offset: Tensor, mode: int, stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients to the weight, ``[O, C]``, and to the bias, ``[O]``, in plain torch."""
    with torch.no_grad():
        wide = torch.float32 if x.itemsize == 2 else x.dtype
        moved = shift_reference(x, offset, mode, False, _window(x, stride)).to(wide).flatten(2)
        rows = grad.to(wide).flatten(2)
        return torch.einsum("nop,ncp->oc", rows, moved).to(x.dtype), rows.sum((0, 2)).to(x.dtype)


def _first_call(x: Tensor, *rest: Any) -> Tensor:
    """Runs where no kernel is registered (yet): pick one for the device of ``x``, then go through it."""
    return backend.kernel("shift_linear", x.device.type, reference)(x, *rest)


def _first_gradient(entry: str, reference: Any, grad: Tensor, *rest: Any) -> Any:
    """The same for the gradients, of which there are kernels for the CPU alone."""
    if backend.forced() == "triton":
        return reference(grad, *rest)
    return backend.kernel("shift_linear_backward", grad.device.type, reference, entry)(grad, *rest)


def _fake(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Any, residual: Any, mode: int, stride: Any, relu: bool
) -> Tensor:
    return torch.empty(_sizes(x, weight, stride), dtype=x.dtype, device=x.device, memory_format=format_of(x))


def _fake_input(grad: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1], *grad.shape[2:]))


def _fake_weight(grad: Tensor, x: Tensor, offset: Tensor, mode: int, stride: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((grad.shape[1], x.shape[1])), x.new_empty(grad.shape[1])


# All at import, so that tracing (torch.compile, export) meets the fakes and never the compilation of a kernel.
_LIBRARY = torch.library.Library("shiftconv", "FRAGMENT")
for _name, _schema, _implementation, _abstract in (
    (
        "shift_linear",
        "(Tensor x, Tensor offset, Tensor weight, Tensor? bias, Tensor? residual, int mode, int[] stride, bool relu) "
        "-> Tensor",
        _first_call,
        _fake,
    ),
    (
        "shift_linear_input",
        "(Tensor grad, Tensor offset, Tensor weight) -> Tensor",
        partial(_first_gradient, "shift_linear_input", input_reference),
        _fake_input,
    ),
    (
        "shift_linear_weight",
        "(Tensor grad, Tensor x, Tensor offset, int mode, int[] stride) -> (Tensor, Tensor)",
        partial(_first_gradient, "shift_linear_weight", weight_reference),
        _fake_weight,
    ),
):
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shiftconv::{_name}", _abstract, lib=_LIBRARY)
_raw = torch.ops.shiftconv.shift_linear.default
_raw_input = torch.ops.shiftconv.shift_linear_input.default
_raw_weight = torch.ops.shiftconv.shift_linear_weight.default
