"""Raw operators of depthwise convolution: several kernels on one map, or on one map each, and their sum.

    each[b][n, c, i, j] = sum over u, v of weight[b][c, 0, u, v] * x[n, c, i + u - top[b], j + v - left[b]]

with zeros outside of ``x``. Three operators are closed under differentiation, so they carry every derivative::

    shiftconv::depthwise_sum(Tensor[] x, Tensor[] weight, Tensor? bias, SymInt[] padding, bool transpose) -> Tensor
    shiftconv::depthwise_each(Tensor x, Tensor[] weight, SymInt[] padding, bool transpose) -> Tensor[]
    shiftconv::depthwise_weight(Tensor[] x, Tensor[] grad, SymInt[] padding) -> Tensor[]

``depthwise_sum`` adds the branches (and ``bias[c]``), ``depthwise_each`` gives them one by one, ``depthwise_weight`` is
the gradient to the kernels. ``x`` is ``[N, C, H, W]``, a ``weight`` ``[C, 1, kh, kw]``, ``padding`` holds top, bottom,
left and right of every branch, of any sign. A list of one map serves all branches. With ``transpose`` the adjoint map
is meant, which takes what the plain one gives. 16-bit types are summed in float32 over all branches and rounded once.
Results have the memory format of the (first) map. Taps that no output can reach are not computed.

Which code carries them out is chosen per call in :mod:`shiftconv.ops.depthwise_paths`.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from shiftconv.ops import depthwise_paths
from shiftconv.ops.sampling import format_of


def apply_sum(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Sequence[int], transpose: bool = False
) -> Tensor:
    """``depthwise_sum``, recorded where a gradient or a transform needs it; one map more or less is no other call."""
    if _is_recorded(*x, *weight, bias):
        return cast("Tensor", _Sum.apply(transpose, padding, len(x), bias, *x, *weight))
    return _raw_sum(x, weight, bias, padding, transpose)


def apply_each(
    x: Tensor, weight: Sequence[Tensor], padding: Sequence[int], transpose: bool = False
) -> tuple[Tensor, ...]:
    """``depthwise_each``, recorded where a gradient or a transform needs it."""
    if _is_recorded(x, *weight):
        return cast("tuple[Tensor, ...]", _Each.apply(transpose, padding, x, *weight))
    return (*_raw_each(x, weight, padding, transpose),)


def apply_weight(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Sequence[int]) -> tuple[Tensor, ...]:
    """``depthwise_weight``, recorded where a gradient or a transform needs it."""
    if _is_recorded(*x, *grad):
        return cast("tuple[Tensor, ...]", _Weight.apply(padding, len(x), *x, *grad))
    return (*_raw_weight(x, grad, padding),)


def _is_recorded(*tensors: Tensor | None) -> bool:
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        transpose: bool, padding: Sequence[int], maps: int, bias: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        return _raw_sum(tensors[:maps], tensors[maps:], bias, padding, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.transpose, ctx.padding, ctx.maps, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.format = format_of(tensors[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: a checkpoint computes them anew for each time
        x, weight = saved[: ctx.maps], saved[ctx.maps :]
        wants_bias, wants = ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        grad = grad.contiguous(memory_format=ctx.format)  # sum() sends expanded ones
        grads_x: Sequence[Tensor | None] = [None] * len(x)
        grads_weight: Sequence[Tensor | None] = [None] * len(weight)
        if any(wants[: ctx.maps]):
            if len(x) == 1:
                grads_x = [apply_sum([grad], weight, None, ctx.padding, not ctx.transpose)]
            else:
                grads_x = apply_each(grad, weight, ctx.padding, not ctx.transpose)
            # A gradient of one pixel is dense in both formats and tells nothing of the one that is wanted.
            grads_x = [g.contiguous(memory_format=ctx.format) for g in grads_x]
        if any(wants[ctx.maps :]):
            pair = ([grad], x) if ctx.transpose else (x, [grad])
            grads_weight = _weight_of_all(pair, len(weight), ctx.padding)
        grad_bias = grad.sum((0, 2, 3)) if wants_bias else None
        return None, None, None, grad_bias, *grads_x, *grads_weight

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any,
        in_dims: tuple[Any, ...],
        transpose: bool,
        padding: Sequence[int],
        maps: int,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        size, dims = info.batch_size, in_dims[4:]
        if in_dims[3] is None and all(dim is None for dim in dims[maps:]):
            x = [_by_image(t, dim, size) for t, dim in zip(tensors[:maps], dims[:maps], strict=True)]
            return apply_sum(x, tensors[maps:], bias, padding, transpose).unflatten(0, (size, -1)), 0
        x, weight = _mapped(size, dims, maps, tensors)
        if bias is not None:
            bias = _by_channel(bias, in_dims[3], size)
        return apply_sum(x, weight, bias, padding, transpose).unflatten(1, (size, -1)), 1


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        transpose: bool, padding: Sequence[int], x: Tensor, *weight: Tensor
    ) -> tuple[Tensor, ...]:
        return (*_raw_each(x, weight, padding, transpose),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.transpose, ctx.padding, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.format = format_of(tensors[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weight = ctx.saved_tensors
        wants_x, *wants = ctx.needs_input_grad[2:]
        dense = [grad.contiguous(memory_format=ctx.format) for grad in grads]
        grad_x = None
        if wants_x:
            grad_x = apply_sum(dense, weight, None, ctx.padding, not ctx.transpose)
            grad_x = grad_x.contiguous(memory_format=ctx.format)
        grads_weight: Sequence[Tensor | None] = [None] * len(weight)
        if any(wants):
            pair = (dense, [x]) if ctx.transpose else ([x], dense)
            grads_weight = apply_weight(*pair, ctx.padding)
        return None, None, grad_x, *grads_weight

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], transpose: bool, padding: Sequence[int], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        (x,), weight = _mapped(size, in_dims[2:], 1, tensors)
        each = apply_each(x, weight, padding, transpose)
        maps: list[Tensor] = [y.unflatten(1, (size, -1)) for y in each]
        return (*maps,), (1,) * len(each)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(padding: Sequence[int], maps: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*_raw_weight(tensors[:maps], tensors[maps:], padding),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.padding, ctx.maps, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The weight gradient is linear in both maps, and each is the adjoint of the other's."""
        saved = ctx.saved_tensors
        x, grad = saved[: ctx.maps], saved[ctx.maps :]
        wants = ctx.needs_input_grad[2:]
        kernels = [kernel.contiguous() for kernel in grads]
        grads_x: list[Any] = [None] * len(x)
        grads_map: list[Any] = [None] * len(grad)
        if any(wants[: ctx.maps]):
            grads_x = _to_each_map(len(x), grad, kernels, ctx.padding, True)
        if any(wants[ctx.maps :]):
            grads_map = _to_each_map(len(grad), x, kernels, ctx.padding, False)
        return None, None, *grads_x, *grads_map

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], padding: Sequence[int], maps: int, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        folded = [_map_by_channel(t, dim, size) for t, dim in zip(tensors, in_dims[2:], strict=True)]
        weights = apply_weight(folded[:maps], folded[maps:], padding)
        kernels: list[Tensor] = [w.unflatten(0, (size, -1)) for w in weights]
        return (*kernels,), (0,) * len(weights)


def _weight_of_all(
    pair: tuple[Sequence[Tensor], Sequence[Tensor]], branches: int, padding: Sequence[int]
) -> tuple[Tensor, ...]:
    """The gradient to all kernels where one map of each kind serves them all or one of each branch."""
    x, grad = pair
    if len(x) == len(grad) == 1 and branches > 1:
        grad = [*grad] * branches
    return apply_weight(x, grad, padding)


def _to_each_map(
    maps: int, other: Sequence[Tensor], kernels: Sequence[Tensor], padding: Sequence[int], transpose: bool
) -> list[Any]:
    """What ``depthwise_weight`` sends back to its maps: of ``other`` through the cotangents, which are kernels."""
    if maps == 1:
        return [apply_sum(other, kernels, None, padding, transpose)]
    if len(other) == 1:
        return [*apply_each(other[0], kernels, padding, transpose)]
    pads = [padding[4 * b : 4 * b + 4] for b in range(len(kernels))]
    triples = zip(other, kernels, pads, strict=True)
    return [apply_sum([x], [kernel], None, pad, transpose) for x, kernel, pad in triples]


def _mapped(
    size: int, dims: Sequence[int | None], maps: int, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Maps ``[N, size * C, H, W]`` and kernels ``[size * C, 1, kh, kw]``: the mapped axis becomes channels."""
    pairs = [*zip(tensors, dims, strict=True)]
    return [_map_by_channel(*pair, size) for pair in pairs[:maps]], [_by_channel(*pair, size) for pair in pairs[maps:]]


def _map_by_channel(x: Tensor, dim: int | None, size: int) -> Tensor:
    x = x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _by_image(x: Tensor, dim: int | None, size: int) -> Tensor:
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _by_channel(kernel: Tensor, dim: int | None, size: int) -> Tensor:
    kernel = kernel.expand(size, *kernel.shape) if dim is None else kernel.movedim(dim, 0)
    return kernel.flatten(0, 1)


def output_size(size: int, taps: int, before: int, after: int, transpose: bool) -> int:
    """Pixels along one axis of the result for ``size`` pixels of the map."""
    return size + (taps - 1 - before - after) * (1 if transpose else -1)


def _fake_each(x: Tensor, weight: Sequence[Tensor], padding: Sequence[int], transpose: bool) -> list[Tensor]:
    results: list[Tensor] = []
    for b, kernel in enumerate(weight):
        top, bottom, left, right = padding[4 * b : 4 * b + 4]
        height = output_size(x.shape[2], kernel.shape[2], top, bottom, transpose)
        width = output_size(x.shape[3], kernel.shape[3], left, right, transpose)
        sizes = (*x.shape[:2], height, width)
        results.append(torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=format_of(x)))
    return results


def _fake_sum(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Sequence[int], transpose: bool
) -> Tensor:
    (y,) = _fake_each(x[0], weight[:1], padding[:4], transpose)
    return y


def _fake_weight(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Sequence[int]) -> list[Tensor]:
    results: list[Tensor] = []
    for b in range(max(len(x), len(grad))):
        source, to = x[b % len(x)], grad[b % len(grad)]
        top, bottom, left, right = padding[4 * b : 4 * b + 4]
        kh = source.shape[2] + top + bottom - to.shape[2] + 1
        kw = source.shape[3] + left + right - to.shape[3] + 1
        results.append(source.new_empty((source.shape[1], 1, kh, kw)))
    return results


# All at import, so that tracing (torch.compile, export) meets the fakes and never the compilation of a kernel.
_LIBRARY = torch.library.Library("shiftconv", "FRAGMENT")
_SCHEMAS = {
    "sum": ("(Tensor[] x, Tensor[] weight, Tensor? bias, SymInt[] padding, bool transpose) -> Tensor", _fake_sum),
    "each": ("(Tensor x, Tensor[] weight, SymInt[] padding, bool transpose) -> Tensor[]", _fake_each),
    "weight": ("(Tensor[] x, Tensor[] grad, SymInt[] padding) -> Tensor[]", _fake_weight),
}
for _name, (_schema, _fake) in _SCHEMAS.items():
    # The first is what a graph sees; it picks the code that runs, of which the second is our kernels.
    for _op, _run in (
        (f"depthwise_{_name}", getattr(depthwise_paths, f"run_{_name}")),
        (f"depthwise_{_name}_direct", getattr(depthwise_paths, f"direct_{_name}")),
    ):
        _LIBRARY.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(_op, _run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"shiftconv::{_op}", _fake, lib=_LIBRARY)
    # What autograd's is_grads_batched sends; its own way through an unknown operator takes no lists.
    _LIBRARY.impl(f"depthwise_{_name}", getattr(depthwise_paths, f"{_name}_by_torch"), "Batched")
_raw_sum = torch.ops.shiftconv.depthwise_sum.default
_raw_each = torch.ops.shiftconv.depthwise_each.default
_raw_weight = torch.ops.shiftconv.depthwise_weight.default
