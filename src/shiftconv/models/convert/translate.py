"""State dicts of the authors' networks with large kernels as ours, and ours as theirs, number for number.

Beside the keys, what differs are the channels that pass unchanged ("ghosts"), which the authors' blocks put last, and
the tables of where small kernels stand, which they draw anew with the seed 123 in each construction and do not save.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from shiftconv.models.convert import merged
from shiftconv.models.convert.layouts import LAYOUTS, layout_of
from shiftconv.models.convert.relocate import relocate
from shiftconv.models.large_kernel_block import Block
from shiftconv.nn import ShiftwiseConv2d
from shiftconv.nn.arrangement import arrange, choose_ghosts

_SEED = 123  # of all the authors' tables
_PROFILED = ("total_ops", "total_params")  # counters that a profiler left among the weights


@dataclass(frozen=True)
class Found:
    """A state dict under our keys.

    Attributes:
        state_dict: the weights; without tables, and in the authors' order of channels, if ``layout`` is not None.
        layout: whose keys they were, by our name of the family; None if they were ours.
        merged: what had been merged, by the authors' names.
        unused: keys that stand for no weight.
    """

    state_dict: dict[str, Tensor]
    layout: str | None = None
    merged: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def recognise(state_dict: Mapping[str, Tensor]) -> Found:
    """Name the weights as we do; keys that no rule explains stay as they are.

    Raises:
        ValueError: two names for one weight.
    """
    unused = [key for key in state_dict if key.rpartition(".")[2] in _PROFILED]
    weights = {key: value for key, value in state_dict.items() if key not in unused}
    with _of_a_file("merged weights"):
        trained, forms = (weights, []) if layout_of(weights) == "convnext" else merged.unmerge(weights)
    name = layout_of(trained)
    if name is None:
        return Found(weights, None, [], unused)
    keys = {key: ours or key for key, ours in LAYOUTS[name].to_ours(trained).items()}
    if twice := [ours for ours, number in Counter(keys.values()).items() if number > 1]:
        raise ValueError(f"two weights for {twice[0]}, under the authors' name and under another")
    return Found({keys[key]: value for key, value in trained.items()}, name, forms, unused)


def to_ours(found: Found, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``network``, as far as ``found`` has it: complete, with channels in our order.

    Raises:
        ValueError: weights that cannot be brought into the form of ``network``.
    """
    network = unwrapped(network)
    with _of_a_file("stripes or split kernels"):
        weights = relocate(found.state_dict, network)
    if found.layout is None:
        return weights
    needed = network.state_dict()
    if found.merged:
        weights |= _merged_away(weights, needed)
    for key, value in weights.items():
        if key in needed and value.ndim != needed[key].ndim and value.numel() == needed[key].numel():
            weights[key] = value.reshape(needed[key].shape)
    for name, block in _blocks(network):
        mix = block.mix
        if isinstance(mix, ShiftwiseConv2d):
            weights.update({f"{name}.mix.{table}": value for table, value in _tables(mix).items()})
            if LAYOUTS[found.layout].ghosts_last:
                _reorder(weights, name, _last(mix).argsort())
    return weights


def to_theirs(
    state_dict: Mapping[str, Tensor], network: nn.Module, merge: bool | Collection[str] = False
) -> dict[str, Tensor]:
    """The state dict that the authors' code loads into the same network, in its order.

    Args:
        state_dict: of ``network``, in the form that trains.
        network: one of the families in ``LAYOUTS``.
        merge: in the form that the authors' ``reparameterize`` or ``merge_kernel`` leaves, or with just these parts
            merged, by the names in :mod:`~shiftconv.models.convert.merged`.

    Raises:
        ValueError: a network, or a weight of it, that the authors' code does not have; tables of another seed.
    """
    network, weights = unwrapped(network), dict(state_dict)
    family = family_of(network)
    for name, block in _blocks(network):
        if isinstance(block.mix, ShiftwiseConv2d):
            for table, value in _tables(block.mix).items():
                if not torch.equal(weights.pop(f"{name}.mix.{table}").cpu(), value):
                    raise ValueError(f"{name}.mix.{table} was not drawn with the authors' seed; theirs has no other")
            if LAYOUTS[family].ghosts_last:
                _reorder(weights, name, _last(block.mix))
    keys = LAYOUTS[family].to_theirs(weights)
    if unknown := [key for key, theirs in keys.items() if theirs is None]:
        raise ValueError(f"the authors' code has no {unknown[0]} in this network, nor {len(unknown) - 1} more weights")
    theirs = {key: weights[ours] for ours, key in keys.items() if key is not None}
    for key, value in theirs.items():
        if (shape := LAYOUTS[family].shape_of(key)) is not None:
            theirs[key] = value.reshape(shape)
    ordered = sorted(theirs, key=lambda key: not key.startswith("downsample_layers."))
    theirs = {key: theirs[key] for key in ordered}
    forms = LAYOUTS[family].merges if merge is True else merge or ()
    return merged.merge(theirs, forms) if forms else theirs


@contextmanager
def _of_a_file(what: str) -> Iterator[None]:
    """A file can hold anything: what the code does not expect of it is no error of the code."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        told = str(error).partition("\n")[0]  # the rest of torch's is about its own code
        raise ValueError(f"its {what} are incomplete or of shapes that do not fit: {told}") from error


def _merged_away(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros, under a norm that does nothing, for the branches of ``needed`` that a merged file has in another one."""
    branches = re.compile(r".*\.mix\.(?:weights\.[1-9]\d*|small\.(?:weight|norm\..+))")
    missing = [key for key in needed if key not in weights and branches.fullmatch(key)]
    ones = ("norm.weight", "norm.running_var")
    return {key: torch.full_like(needed[key], float(key.endswith(ones)), device="cpu") for key in missing}


def family_of(network: nn.Module) -> str:
    """The name of the layout that the authors' keys of ``network`` have.

    Raises:
        ValueError: it is none of these networks, or was reparameterized.
    """
    ours = [*network.state_dict()]
    known = {name: sum(key is not None for key in layout.to_theirs(ours).values()) for name, layout in LAYOUTS.items()}
    best = max(known, key=lambda name: (known[name], -len(LAYOUTS[name].rules)))  # of equals the one that fits tighter
    if known[best] < len(ours) / 2:
        raise ValueError(f"{type(network).__name__} has no counterpart of the authors', or was reparameterized")
    return best


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself where ``features_only`` wraps it."""
    return network.model if isinstance(network, FeatureGetterNet) else network


def _blocks(network: nn.Module) -> Iterator[tuple[str, Block]]:
    for name, module in network.named_modules():
        if isinstance(module, Block):
            yield name, module


def _tables(mix: ShiftwiseConv2d) -> dict[str, Tensor]:
    """The buffers of ``mix`` as the authors draw them."""
    variant = replace(mix.variant, seed=_SEED)
    active, ghosts = choose_ghosts(mix.dim, mix.ghost_ratio, variant.even, _SEED)
    tables = arrange(variant, len(active), mix.slots, mix.num_shifts)._asdict()
    return {"active": active, "ghosts": ghosts, **{f"{name}_slots": tables[name] for name in mix.drawn}}


def _last(mix: ShiftwiseConv2d) -> Tensor:
    """Our channel in the place of each of the authors', ``[C]``."""
    return torch.cat(choose_ghosts(mix.dim, mix.ghost_ratio, mix.variant.even, _SEED))


_BY_CHANNEL: dict[str, int] = {  # what lies between the mixing and the hidden channels, and its axis of channels
    **{f"norm.{part}": 0 for part in ("weight", "bias", "running_mean", "running_var")},
    "squeeze.fc1.weight": 1,
    "squeeze.fc2.weight": 0,
    "squeeze.fc2.bias": 0,
    "fc1.weight": 1,
}


def _reorder(weights: dict[str, Tensor], block: str, order: Tensor) -> None:
    for key, axis in _BY_CHANNEL.items():
        value = weights.get(f"{block}.{key}")
        if value is not None and value.shape[axis : axis + 1] == order.shape:  # else it is refused later
            weights[f"{block}.{key}"] = value.index_select(axis, order.to(value.device))
