"""Zeros in the weights of a network: how many products they save, and how to put some there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

import shiftconv.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # defines the operators named below

_aten, _ours = torch.ops.aten, torch.ops.shiftconv
# Where the two factors of each product stand. Each number in either is used as often as any other in it.
_FACTORS: dict[Any, tuple[int, int]] = {
    _aten.convolution: (0, 1),
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _ours.shift_linear: (0, 2),
    _ours.depthwise_sum: (0, 1),
    _ours.depthwise_each: (0, 1),
}


def thin(model: nn.Module, density: float, generator: torch.Generator | None = None) -> None:
    """Set random numbers in each parameter of two or more dimensions to 0, in place.

    So a network is counted at a density that it has not been trained to, as SLaK's authors count theirs.

    Args:
        model: the network.
        density: the share of the numbers in each such parameter that stay, in (0, 1], to the nearest whole number.
        generator: draws which ones, on the CPU; by default one of its own with seed 0.

    Raises:
        ValueError: another ``density``.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    generator = generator or torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.ndim >= 2:
            gone = torch.zeros(value.numel(), dtype=torch.bool)
            gone[torch.randperm(len(gone), generator=generator)[round(density * len(gone)) :]] = True
            value.detach().masked_fill_(gone.view(value.shape).to(value.device), 0)


def nonzero(value: Tensor) -> int:
    """How many numbers in a parameter count: all that are not 0, or all if it has one dimension, or no data."""
    return int(value.count_nonzero()) if value.ndim >= 2 and _has_data(value) else value.numel()


class _Known(NamedTuple):
    """The data of a tensor that has none in the pass, and whether a parameter is among what it was made of."""

    value: Tensor
    learned: bool


class ZeroProducts(TorchDispatchMode):
    """Finds the multiply-accumulates by a zero of a weight in a pass on tensors without data.

    What the pass makes of weights alone is computed with their data too, so that it is known what a convolution gets.

    Args:
        found: called with their number after each operator that has any.
    """

    supports_higher_order_operators = True

    def __init__(self, found: Callable[[int], None]):
        super().__init__()
        self._found = found
        self._known = WeakTensorKeyDictionary()
        self._written: dict[int, torch.UntypedStorage] = {}  # by address, which stays theirs as long as they are held

    def follow(self, fake: Tensor, value: Tensor, learned: bool) -> None:
        """Tell the data of a parameter, which is ``learned``, or of a buffer; in the pass it is ``fake``."""
        self._known[fake] = _known(value, learned)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not isinstance(func, OpOverload):
            return NotImplemented  # torch.cond and the like; what they run comes here one by one
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        weights = self._look_up(tensors)
        if weights and func is _aten._local_scalar_dense.default:
            return _compute(func, weights, args, kwargs)
        out = func(*args, **kwargs)
        if macs := self._by_zeros(func._overloadpacket, args, kwargs, out):
            self._found(macs)
        if func._schema.is_mutable:
            self._written.update((storage._cdata, storage) for storage in (t.untyped_storage() for t in tensors))
        elif weights and torch.Tag.nondeterministic_seeded not in func.tags:
            learned = any(weight.learned for weight in weights)
            made = tree_leaves(_compute(func, weights, args, kwargs))
            for fake, value in zip(tree_leaves(out), made, strict=True):
                if isinstance(fake, Tensor):
                    self._known[fake] = _Known(value, learned)
        return out

    def _look_up(self, tensors: Sequence[Tensor]) -> list[_Known]:
        """What is known of each, or nothing unless it is something of all; a storage that was written to is unknown."""
        found = [self._known.get(t) if isinstance(t, FakeTensor) else _known(t, False) for t in tensors]
        known = [one for one in found if one is not None]
        written = any(t.untyped_storage()._cdata in self._written for t in tensors)
        return known if len(known) == len(tensors) and not written else []

    def _by_zeros(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """MACs by zeros of the weight, which is the last factor that was made of parameters."""
        for place in reversed(_FACTORS.get(operator, ())):
            weights = self._look_up(tree_leaves(args[place]))
            if any(weight.learned for weight in weights):
                size = sum(weight.value.numel() for weight in weights)
                with unset_fake_temporarily():
                    zeros = size - sum(int(weight.value.count_nonzero()) for weight in weights)
                return flop_registry[operator](*args, **kwargs, out_val=out) // 2 * zeros // max(size, 1)
        return 0


def _known(value: Tensor, learned: bool) -> _Known | None:
    return _Known(value, learned) if _has_data(value) else None


def _has_data(value: Tensor) -> bool:
    return not value.is_meta and not is_traceable_wrapper_subclass(value)  # as quantized weights are


def _compute(func: OpOverload, weights: Sequence[_Known], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives for the data of all the tensors among its arguments, ``weights`` in their order."""
    flat, form = tree_flatten((args, kwargs))
    data = iter(weights)
    args, kwargs = tree_unflatten([next(data).value if isinstance(one, Tensor) else one for one in flat], form)
    with unset_fake_temporarily():
        return func(*args, **kwargs)
