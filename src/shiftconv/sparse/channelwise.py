"""What acts on each channel apart, and where the channels are meanwhile.

A class tells what torch's own layers do. Others, and functions, are tried: what gives the same for a number whatever
stands beside it, and wherever it stands, is elementwise.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # of SyncBatchNorm, too
from torch.nn.parameter import is_lazy

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Mixing = nn.Linear | Conv
Step = nn.Module | Callable[[Tensor], Tensor]

_AXES: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_POOLS: dict[type[nn.Module], int] = {
    pool: axes
    for pools in (
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    )
    for axes, pool in enumerate(pools, 1)
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@runtime_checkable
class KeepChannels(Protocol):
    """A layer in which channels meet, but in which one of zeros makes no difference to the others.

    Attributes:
        channel_axis: where the channels are, counted from the last axis, -1.
    """

    channel_axis: int

    def keep_channels(self, kept: Tensor) -> None:
        """Go without all channels but ``kept``, ascending indices ``[K]``, in place.

        The others are zero wherever it is applied, and those that are kept come out as they did with them.
        """
        ...

    def output_of_zeros(self) -> Tensor:
        """What a channel of zeros comes out as, ``[C]``, whatever the other channels are."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where the units are in a tensor.

    Args:
        units: how many there are.
        axis: theirs, counted from the last one, -1.
        rank: how many axes there are; None if that is not known.
    """

    units: int
    axis: int
    rank: int | None = None

    @classmethod
    def of_output(cls, producer: Mixing, node: fx.Node) -> "Layout":
        """Of what a layer gives, ``node``. Maps of a convolution are taken to be in batches."""
        if not isinstance(producer, nn.Linear):
            axes = len(producer.kernel_size)
            return cls(producer.out_channels, -1 - axes, 2 + axes)
        order = _permutation(node.all_input_nodes[0]) if node.all_input_nodes else None
        return cls(producer.out_features, -1, len(order) if order else None)

    def fits(self, layer: Mixing) -> bool:
        """Whether a layer takes the units as its inputs, one by one."""
        if isinstance(layer, nn.Linear):
            return self.axis == -1 and layer.in_features == self.units
        return self.axis == -1 - len(layer.kernel_size) and layer.in_channels == self.units

    @property
    def is_second(self) -> bool:
        """Whether they are on the second axis, that of channels; a linear layer is taken to have inputs ``[N, C]``."""
        return self.axis == -1 if self.rank is None else self.axis + self.rank == 1

    def permuted(self, order: Sequence[int]) -> "Layout | None":
        rank = len(order)
        axes = [each % rank for each in order]
        if self.rank not in (None, rank) or len({*axes}) != rank:
            return None
        return replace(self, axis=axes.index(self.axis % rank) - rank, rank=rank)

    def transposed(self, one: int, other: int) -> "Layout | None":
        if self.rank is None and (one >= 0 or other >= 0):
            return None
        one, other = (axis - (self.rank or 0) if axis >= 0 else axis for axis in (one, other))
        return replace(self, axis={one: other, other: one}.get(self.axis, self.axis))

    def flattened(self, start: int, end: int) -> "Layout | None":
        """If axes behind that of the units become one with it, :meth:`fits` tells whether they had one entry."""
        if self.rank is None:
            return None
        start, end, axis = start % self.rank, end % self.rank, self.axis + self.rank
        rank = self.rank - (end - start)
        if start < axis <= end:
            return None
        return replace(self, axis=(axis if axis <= start else axis - (end - start)) - rank, rank=rank)


def is_mixing(layer: object) -> TypeGuard[Mixing]:
    """Whether every output of a layer is a weighted sum of all input channels, if it :func:`acts_as_its_class`."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, Conv) and layer.groups == 1)


def is_depthwise(layer: object) -> TypeGuard[Conv]:
    """Whether a layer convolves every channel apart, under the same condition."""
    return isinstance(layer, Conv) and layer.groups == layer.in_channels == layer.out_channels


def acts_as_its_class(layer: Mixing) -> bool:
    """Whether a layer computes what that of torch does which it is a kind of, from parameters that are there."""
    kind = nn.Linear if isinstance(layer, nn.Linear) else next(kind for kind in _AXES if isinstance(layer, kind))
    if type(layer.weight) is not nn.Parameter or is_lazy(layer.weight):
        return False
    own = "_conv_forward"  # where classes with standardised weights, among others, differ
    if getattr(type(layer), own, None) is not getattr(kind, own, None):
        return False
    if type(layer).forward is kind.forward:
        return True
    known = {id(layer.weight), id(layer.bias)}
    if any(id(value) not in known for value in _tensors(layer)):
        return False
    sizes = [] if isinstance(layer, nn.Linear) else [5 * size for size in layer.kernel_size]
    x = torch.linspace(-1, 1, 2 * layer.weight.shape[1] * math.prod(sizes), device=layer.weight.device)
    x = x.view(2, -1, *sizes).to(layer.weight.dtype)
    try:
        return torch.allclose(layer.forward(x), kind.forward(layer, x), rtol=1e-2, atol=1e-4, equal_nan=True)  # pyright: ignore[reportArgumentType]
    except Exception:  # of weights that are no numbers, or a forward that takes more
        return False


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a convolution or pooling makes other numbers of a constant map's borders than of its middle."""
    if isinstance(layer, Conv):
        if layer.padding == "same":
            return any(size > 1 for size in layer.kernel_size)
        padding: Any = layer.padding
        return layer.padding_mode == "zeros" and padding != "valid" and any(padding)
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        sides: Any = layer.padding
        return any(sides) if isinstance(sides, tuple) else bool(sides)
    return False


def keeps_constants(layer: nn.Module) -> bool:
    """Whether a constant map comes out of pooling or dropout as it was, but for what :func:`pads_with_zeros`."""
    return type(layer) in _POOLS or type(layer) in _DROPOUTS


def module_step(module: nn.Module, layout: Layout) -> tuple[Step | None, Layout] | None:
    """What a module does to the units, and where they are then; None if it does not act on each apart."""
    if isinstance(module, KeepChannels):
        return (module, layout) if module.channel_axis == layout.axis else None
    if type(module) is nn.Flatten:
        moved = layout.flattened(module.start_dim, module.end_dim)
        return moved and (None, moved)
    if isinstance(module, nn.Linear | Conv):
        fits = is_depthwise(module) and layout.fits(module) and acts_as_its_class(module)
    elif type(module) in _POOLS:
        fits = layout.axis == -1 - _POOLS[type(module)] and not _gives_more(module)
    elif isinstance(module, _BatchNorm):
        fits = layout.is_second and module.num_features == layout.units and _is_plain_norm(module)
    elif type(module) is nn.PReLU:
        fits = module.num_parameters == 1 or (layout.is_second and module.num_parameters == layout.units)
    else:
        fits = type(module) in _DROPOUTS or (not _tensors(module) and _is_elementwise(copy.deepcopy(module).eval()))
    return (module, layout) if fits else None


def _gives_more(pool: nn.Module) -> bool:
    """Whether pooling gives indices as well, or sums instead of means."""
    if isinstance(pool, nn.AvgPool2d | nn.AvgPool3d):
        return pool.divisor_override is not None
    pools = (
        nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d | nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d | nn.AdaptiveMaxPool3d
    )
    return isinstance(pool, pools) and bool(pool.return_indices)


def node_step(node: fx.Node, layout: Layout) -> tuple[Step | None, Layout] | None:
    """The same for the call of a function or method, of which one argument, once or more often, is the units."""
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
        return None
    if node.target in _PERMUTE:
        order = _permutation(node)
        moved = layout.permuted(order) if order else None
    elif node.target in _TRANSPOSE:
        axes = _numbers(node, {"dim0": None, "dim1": None})
        moved = layout.transposed(*axes) if axes else None
    elif node.target in _FLATTEN:
        axes = _numbers(node, {"start_dim": 0, "end_dim": -1})
        moved = layout.flattened(*axes) if axes else None
    else:
        function = _as_function(node)
        return (function, layout) if _is_elementwise(function) else None
    return moved and (None, moved)


_PERMUTE, _FLATTEN = (torch.permute, "permute"), (torch.flatten, "flatten")
_TRANSPOSE = (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")


def _permutation(node: fx.Node) -> Sequence[int] | None:
    """The order of axes that a node makes, if it permutes them and says how in a way known here."""
    if node.op not in ("call_function", "call_method") or node.target not in _PERMUTE:
        return None
    order: Any = node.args[1:] or (node.kwargs.get("dims"),)
    if len(order) == 1 and isinstance(order[0], Sequence):
        order = order[0]
    return cast("Sequence[int]", order) if all(isinstance(axis, int) for axis in order) else None


def _numbers(node: fx.Node, default: dict[str, int | None]) -> tuple[int, int] | None:
    """Two arguments after the first, if they are numbers that stand in their places or have these names."""
    given = {**default, **dict(zip(default, node.args[1:], strict=False)), **node.kwargs}
    values = [*given.values()]
    if not node.args or len(values) != 2 or not all(isinstance(value, int) for value in values):
        return None
    return cast("tuple[int, int]", (*values,))


def _as_function(node: fx.Node) -> Callable[[Tensor], Tensor]:
    (source,) = node.all_input_nodes

    def function(x: Tensor) -> Tensor:
        def put(given: fx.Node) -> Any:
            assert given is source
            return x

        args: Any = fx.map_arg(node.args, put)
        kwargs: Any = fx.map_arg(node.kwargs, put)
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    return function


def _is_elementwise(function: Callable[[Tensor], object]) -> bool:
    """Whether each entry of the result comes from one entry, wherever that stands and whatever stands beside it."""

    def fits(x: Tensor, shape: Sequence[int], y: Tensor, scale: float) -> bool:
        given = function(x.view(*shape).clone())  # it may work in place
        if not isinstance(given, Tensor) or given.shape != shape or given.dtype != x.dtype:
            return False
        return _same(given.flatten(), y, scale)

    for scale in (0.01, 1.0, 100.0):
        x = torch.linspace(-scale, scale, 24, dtype=torch.float32, device="cpu")
        try:
            alone = torch.cat(
                [cast("Tensor", function(each.view(1, 1, 1, 1).clone())) for each in x.split(1)]
            ).flatten()
            shapes = ((2, 3, 2, 2), (24, 1, 1, 1), (1, 24, 1, 1), (1, 1, 24, 1), (1, 1, 1, 24))
            if not all(fits(x, shape, alone, scale) for shape in shapes):
                return False
        except Exception:  # whatever it does with what it does not expect
            return False
    return True


def _same(one: Tensor, other: Tensor, scale: float = 1.0) -> bool:
    """Up to what vectors of numbers may make different from single ones."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)


def _is_plain_norm(norm: _BatchNorm) -> bool:
    """Whether a batch norm has running statistics, and its class adds elementwise functions to torch's at most."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    if type(norm) in _NORMS:
        return True
    own = {id(value) for value in (*norm.parameters(recurse=False), *norm.buffers(recurse=False))}
    if any(id(value) not in own for value in _tensors(norm)):
        return False
    alone: Callable[[Tensor], Tensor] = copy.deepcopy(norm).eval()
    x = torch.linspace(-2, 2, 8 * norm.num_features, device=norm.running_mean.device)
    x = x.view(2, -1, 2, 2).to(norm.running_mean.dtype)
    half = torch.arange(norm.num_features, device=x.device)[:, None, None] % 2 == 0
    try:
        y = alone(x.clone())
        others = alone(torch.where(half, x, 3 - x))  # other channels make no difference, nor do images and pixels
        part = alone(x[1:, :, 1:, :1].clone())
        return _same(torch.where(half, others, 0), torch.where(half, y, 0)) and _same(part, y[1:, :, 1:, :1])
    except Exception:  # of what takes no maps
        return False


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
