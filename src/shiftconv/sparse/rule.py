"""Scores: one number per weight, larger is kept or regrown first. A new one is a function here and an entry in a dict.

Sources: Mocanu et al. 2018, arXiv:1707.04780 (SET: signs apart, regrown by chance); Evci et al. 2020, arXiv:1911.11134
(RigL: gradient); Dettmers & Zettlemoyer 2019, arXiv:1907.04840 (momentum).
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Evidence:
    """What is known of a parameter.

    Attributes:
        name: its name.
        weight: the parameter.
        gradient: that of the last step, of all its entries.
        state: what the optimiser keeps of it.
        generator: for chance, on its device.
    """

    name: str
    weight: nn.Parameter
    gradient: Tensor | None
    state: Mapping[str, Any]
    generator: torch.Generator


Score = Callable[[Evidence], Tensor]


def magnitude(of: Evidence) -> Tensor:
    """How large a weight is."""
    return of.weight.detach().abs()


def signed(of: Evidence) -> Tensor:
    """The rank among the weights of the same sign, in (0, 1]: as in SET, positive and negative ones leave apart."""
    weight = of.weight.detach().flatten()
    rank = torch.zeros_like(weight)
    for side in (weight > 0, weight < 0):
        where = side.nonzero()[:, 0]
        order = weight[where].abs().argsort(stable=True)
        rank[where[order]] = torch.arange(1, len(where) + 1, device=weight.device, dtype=rank.dtype) / len(where)
    return rank.view(of.weight.shape)


def chance(of: Evidence) -> Tensor:
    """A random number."""
    return torch.rand(of.weight.shape, generator=of.generator, device=of.weight.device)


def gradient(of: Evidence) -> Tensor:
    """How much the loss would change with a weight.

    Raises:
        RuntimeError: there is no gradient.
    """
    if of.gradient is None:
        raise RuntimeError(f"regrowing by gradient needs the gradient of {of.name}, and backward() has made none")
    return of.gradient.detach().abs()


def momentum(of: Evidence) -> Tensor:
    """The optimiser's averaged gradient, over its deviation where that is kept.

    Raises:
        RuntimeError: the optimiser keeps no average.
    """
    if isinstance(first := of.state.get("exp_avg"), Tensor):
        second = of.state.get("exp_avg_sq")
        return (first / (second.sqrt() + 1e-8) if isinstance(second, Tensor) else first).abs()
    if isinstance(average := of.state.get("momentum_buffer"), Tensor):
        return average.abs()
    raise RuntimeError(f"regrowing by momentum needs an optimiser that averages gradients; of {of.name} it keeps none")


@dataclass(frozen=True)
class Rule:
    """Who leaves and who comes back; scores are tensors of the weight's shape, of which the larger ones stay or come.

    Args:
        prune: the active entries with the lowest scores leave; None: none ever does.
        regrow: of the others those with the highest scores come back, just pruned ones among them.
        explore: the share of those that come back by chance instead, in [0, 1].
        threshold: only entries with a lower ``prune`` score per weight leave; at most as many as the schedule says.
        scope: whether entries compete in their layer, or in the whole model, whose layers' densities then move.
        dense_moments: let the optimiser average the gradients of all weights, as is needed to regrow by momentum; else
            those of inactive weights never reach it, and what is regrown starts with averages of zero.
    """

    prune: Score | None
    regrow: Score
    explore: float = 0.0
    threshold: float = float("inf")
    scope: str = "layer"
    dense_moments: bool = False

    def __post_init__(self) -> None:
        if not callable(self.regrow) or not (self.prune is None or callable(self.prune)):
            raise TypeError(f"prune and regrow must be functions of Evidence, got {self.prune!r} and {self.regrow!r}")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore must be in [0, 1], got {self.explore!r}")
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global', got {self.scope!r}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold!r}")


RULES: dict[str, Rule] = {
    "static": Rule(None, chance),
    "set": Rule(magnitude, chance),
    "set_signed": Rule(signed, chance),
    "rigl": Rule(magnitude, gradient),
    "snfs": Rule(magnitude, momentum, dense_moments=True),
    "mixed": Rule(magnitude, gradient, explore=0.5),
}
