"""Which network a state dict belongs to, from its keys and shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shiftconv.models import create_model
from shiftconv.models.convert import large_kernels, shiftresnet
from shiftconv.models.convert.translate import Found, recognise, to_ours, unwrapped

Shape = tuple[int, ...]
_FAMILIES = (shiftresnet.identify, large_kernels.identify, large_kernels.identify_convnext)
"""Each answers with name and arguments, or None for keys of other families. A new family is one more entry."""

COUNTER = "num_batches_tracked"
"""Batch norms from before torch 0.4.1 do not have it; it matters for nothing that is computed here."""


@dataclass(frozen=True)
class Identity:
    """A network of this package: ``create_model(model, **model_args)``."""

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model}({', '.join(f'{key}={value!r}' for key, value in self.model_args.items())})"


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from what a network needs."""

    missing: list[str]
    left_over: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.misshapen)

    def __str__(self) -> str:
        parts = [("missing", self.missing), ("left over", self.left_over), ("of another shape", self.misshapen)]
        return "; ".join(f"{what}: {_some(keys)}" for what, keys in parts if keys)


def _some(keys: list[str]) -> str:
    return ", ".join(repr(key[:120])[1:-1] for key in keys[:5]) + (
        f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    )


def compare(state_dict: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> Difference:
    """What ``state_dict`` lacks, has too much or has in another shape or kind; missing counters are no difference."""
    misshapen = [
        f"{key} {_kind(state_dict[key])} instead of {_kind(need)}"
        for key, need in needed.items()
        if key in state_dict and _kind(state_dict[key]) != _kind(need)
    ]
    missing = [key for key in needed if key not in state_dict and not key.endswith(COUNTER)]
    return Difference(missing, [key for key in state_dict if key not in needed], misshapen)


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else ' of ' + str(tensor.dtype)}"


def identify(state_dict: Mapping[str, Tensor]) -> Identity:
    """The network that has exactly these keys and shapes, be they ours or the authors'.

    Raises:
        ValueError: no network of this package has; says what the keys look like.
    """
    found = recognise(state_dict)
    shapes = {key: tuple(tensor.shape) for key, tensor in found.state_dict.items()}
    for family in _FAMILIES:
        if (named := family(shapes)) is not None:
            identity = Identity(*named)
            verify(identity, found)
            return identity
    raise ValueError(f"no network of shiftconv has these {len(shapes)} keys: {_some(list(shapes))}")


def verify(identity: Identity, found: Found) -> None:
    """Raise ValueError unless ``identity`` has the keys and shapes of what was ``found``; allocates no weights."""
    with torch.device("meta"):
        network = create_model(identity.model, **identity.model_args)
    if difference := compare(to_ours(found, network), unwrapped(network).state_dict()):
        raise ValueError(f"nearest to {identity}, but it differs: {difference}")
