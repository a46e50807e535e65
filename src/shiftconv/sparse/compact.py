"""Make structured zeros pay: fold what can be folded, then take out everything that is zero and so adds nothing.

    hidden units    the row of the layer that makes one is zero, or the column of the layer that reads it
    branches        kernels that are zero in all channels
    taps            rows and columns of zeros at the ends of kernels

Outputs stay the same up to rounding. A unit whose row is zero is a constant, which moves into the bias of the layer
that reads it. Single zeros are left: a dense product over them is as fast.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shiftconv.sparse.chains import chains
from shiftconv.sparse.dead_units import drop_dead_units

_SECONDS, _ROUNDS = 3.0, (5, 30)  # of a measurement


@runtime_checkable
class Foldable(Protocol):
    """A module with a simpler form for inference; timm's ``reparameterize_model`` looks for the same name."""

    def reparameterize(self) -> None:
        """Take that form, in place."""
        ...


@runtime_checkable
class Compactable(Protocol):
    """A module that can go without parts of it that are zero."""

    def compact(self) -> Mapping[str, int]:
        """Drop them, in place, and tell how many there were of each kind."""
        ...


@dataclass(frozen=True)
class Compacted:
    """What :func:`compact` did.

    Args:
        parameters_before: entries of all parameters of the model that was given.
        parameters_after: of what it became.
        removed: how many there were of each kind: hidden units, branches, taps, and what other modules name.
        error: the largest difference of an output, if images were given.
        speedup: how many times as fast it is as its dense, folded form, if images were given and anything removed:
            the median of interleaved pairs.
    """

    parameters_before: int
    parameters_after: int
    removed: Mapping[str, int] = field(default_factory=dict[str, int])
    error: float | None = None
    speedup: float | None = None

    def __str__(self) -> str:
        parts = [f"{count:,} {kind}" for kind, count in self.removed.items()]
        what = "removed " + ", ".join(parts) if parts else "nothing is dead, so nothing was removed"
        text = f"{what}; {self.parameters_before:,} parameters became {self.parameters_after:,}"
        if self.error is not None:
            text += f"; outputs differ by {self.error:.2g} at most"
        if self.speedup is not None:
            text += f"; {self.speedup:.2f} times as fast as dense"
        return text


def compact(model: nn.Module, images: Tensor | None = None, multiple_of: int = 8) -> Compacted:
    """Take everything out of a model that is zero and so contributes nothing; in place, for inference.

    What has a ``reparameterize()`` is folded first. Every module stays in evaluation or training mode. Optimisers and
    masks know the parameters that were, so this comes last.

    Args:
        model: any model. Outputs stay those that it has in evaluation mode.
        images: what it takes, ``[N, C, H, W]`` for most; to check that outputs stay the same, and to measure the speed.
        multiple_of: layers keep so many dead hidden units that their number is a multiple of it, at which products of
            matrices are faster.

    Returns:
        What was removed, and what was measured.

    Raises:
        TypeError: an argument of another type.
        ValueError: ``multiple_of`` below 1, images that the model does not take, weights without values, a module that
            cannot be folded, or outputs that differ by more than rounding. The model is unchanged then.
    """
    _check(model, images, multiple_of)
    before, state, training = _parameters(model), _State(model), model.training
    modes = {module: module.training for module in model.modules()}
    error = speedup = None
    try:
        _set_modes(model, {}, False)
        expected = [] if images is None else _outputs(model, images)
        _fold(model, set())
        _set_modes(model, {}, False)
        dense = None if images is None else copy.deepcopy(model)
        removed = _remove(model, multiple_of)
        if images is not None and dense is not None:
            error = _difference(expected, _outputs(model, images))
            speedup = _speedup(dense, model, images) if removed else None
    except BaseException:
        state.restore()
        raise
    _set_modes(model, modes, training)
    return Compacted(before, _parameters(model), removed, error, speedup)


class _State:
    """All that a model is made of, to be put back."""

    def __init__(self, model: nn.Module):
        self._modules = [(vars(module), dict(vars(module))) for module in model.modules()]
        tables = [value for _, own in self._modules for value in own.values() if isinstance(value, dict)]
        self._tables = [(table, dict(table)) for table in cast("list[dict[object, object]]", tables)]
        self._values = [(value, value.detach().clone()) for value in (*model.parameters(), *model.buffers())]

    @torch.no_grad()
    def restore(self) -> None:
        for now, then in (*self._modules, *self._tables):
            now.clear()
            now.update(then)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for value, then in self._values:
            value.copy_(then)


def _set_modes(model: nn.Module, modes: Mapping[nn.Module, bool], other: bool) -> None:
    for module in model.modules():
        module.training = modes.get(module, other)


def _parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def _check(model: object, images: object, multiple_of: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"compact takes a torch.nn.Module, got {type(model).__name__}")
    if images is not None and not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor that the model takes, got {type(images).__name__}")
    if not isinstance(multiple_of, int) or isinstance(multiple_of, bool):
        raise TypeError(f"multiple_of must be a whole number, got {type(multiple_of).__name__}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    if images is not None and not images.numel():
        raise ValueError(f"images must be at least one, got {[*images.shape]}")
    if empty := [name for name, value in model.named_parameters() if is_lazy(value) or value.is_meta]:
        raise ValueError(f"the weights must have values, but {empty[0]} has none")


def _fold(module: nn.Module, done: set[nn.Module]) -> None:
    """As timm's ``reparameterize_model``: from outside to inside, each once."""
    if module in done:
        return
    done.add(module)
    if isinstance(module, Foldable):
        module.reparameterize()
    for child in [*module.children()]:
        _fold(child, done)


@torch.no_grad()
def _remove(model: nn.Module, multiple_of: int) -> dict[str, int]:
    removed: Counter[str] = Counter()
    found = chains(model)
    while units := sum(drop_dead_units(chain, multiple_of) for chain in reversed(found)):
        removed["hidden units"] += units  # and again: what they read may be read by nothing now
    for module in model.modules():
        if isinstance(module, Compactable):
            removed.update(module.compact())
    return {kind: count for kind, count in removed.items() if count}


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    try:
        return [*_tensors(model(images))]
    except Exception as error:
        raise ValueError(f"the model does not take images {[*images.shape]} of {images.dtype}: {error}") from error


def _difference(expected: list[Tensor], given: list[Tensor]) -> float:
    """The largest difference of outputs; ValueError if that is no rounding."""
    largest = 0.0
    for one, other in zip(expected, given, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise ValueError(f"expected an output {[*one.shape]} of {one.dtype}, got {[*other.shape]} of {other.dtype}")
        same = (one == other) | (one.isnan() & other.isnan())
        error = float(torch.where(same, 0, (one.double() - other.double()).abs()).max()) if one.numel() else 0.0
        finite = one[one.isfinite()]
        allowed = torch.finfo(one.dtype).eps ** 0.5 * float(finite.abs().max()) if finite.numel() else 0.0
        if not error <= allowed:
            raise ValueError(
                f"outputs differ by {error:.3g} without what is zero, but rounding allows {allowed:.3g}; the model was "
                "left as it was"
            )
        largest = max(largest, error)
    return largest


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors of real numbers in what a model gives, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in cast("Mapping[object, object]", output).values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in cast("list[object]", output):
            yield from _tensors(value)


@torch.no_grad()
def _speedup(dense: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The time of the first over that of the second, median of pairs."""

    def seconds(model: nn.Module) -> float:
        start = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    pair = sum(min(seconds(model), seconds(model)) for model in (dense, other))  # the first time warms up
    low, high = _ROUNDS
    rounds = max(low, min(high, round(_SECONDS / max(pair, 1e-6))))
    return statistics.median(seconds(dense) / seconds(other) for _ in range(rounds))
