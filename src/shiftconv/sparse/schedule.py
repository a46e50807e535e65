"""When masks change, how much of them, and how dense they are.

Sources: Evci et al. 2020, arXiv:1911.11134, section 3 (cosine, stop); Liu et al. 2021, arXiv:2106.10404 (GraNet: the
density falls cubically); Liu et al. 2023, arXiv:2207.03620, appendix (SLaK's intervals).
"""

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

from shiftconv.names import unknown

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """When, and how much. Steps are those of the optimiser.

    Args:
        every_steps: an update of the masks follows each so many steps.
        prune_fraction: the share of the active entries that an update exchanges, at first.
        steps: of the whole training; None: unknown, so that the fraction stays and updates go on for ever.
        decay: how the fraction falls until the last step.
        final_fraction: to which value it falls.
        warmup_steps: no update before these.
        stop_fraction: the share of ``steps`` after which the masks stay.
        timing: ``regular``, or ``random``: an update follows each step with probability ``1 / every_steps``.
        share_every: of masks that paths share, each so many-th update is common to them; 1: they are always the same;
            between, each path goes its own way and is then set to the first one's.
        start_density: the density falls from this one to the final one, cubically; None: it is constant.
        density_steps: where it begins to fall, and where it has arrived.
        seed: of all that is random.

    Raises:
        ValueError: for values that do not fit.
    """

    every_steps: int = 100
    prune_fraction: float = 0.3
    steps: int | None = None
    decay: Decay = "cosine"
    final_fraction: float = 0.0
    warmup_steps: int = 0
    stop_fraction: float = 0.75
    timing: Literal["regular", "random"] = "regular"
    share_every: int = 1
    start_density: float | None = None
    density_steps: tuple[int, int] = (0, 0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 1), ("warmup_steps", 0), ("share_every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps!r}")
        for name in ("prune_fraction", "final_fraction", "stop_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if self.decay not in get_args(Decay):
            raise unknown("decay", self.decay, get_args(Decay))
        if self.timing not in ("regular", "random"):
            raise unknown("timing", self.timing, ("regular", "random"))
        if self.start_density is not None:
            first, last = self.density_steps
            if not 0 < self.start_density <= 1:
                raise ValueError(f"start_density must be in (0, 1], got {self.start_density!r}")
            if not 0 <= first < last:
                raise ValueError(f"density_steps must be (first, last) with 0 <= first < last, got {(first, last)}")
            if self.steps is not None and last > self.stop_fraction * self.steps:
                raise ValueError(
                    f"the density falls until step {last}, but masks stay after {self.stop_fraction:g} of {self.steps} "
                    "steps; let density_steps end before"
                )

    def is_due(self, step: int) -> bool:
        """Whether an update follows step ``step``, counted from 1."""
        if step <= self.warmup_steps or (self.steps is not None and step > self.stop_fraction * self.steps):
            return False
        if self.timing == "random":
            return random.Random(f"{self.seed} {step}").random() < 1 / self.every_steps
        return step % self.every_steps == 0

    @property
    def updates(self) -> int | None:
        """How many updates there are, if that is known."""
        if self.steps is None or self.timing == "random":
            return None
        last = max(int(self.stop_fraction * self.steps), self.warmup_steps)
        return last // self.every_steps - self.warmup_steps // self.every_steps

    def fraction(self, step: int) -> float:
        """The share of the active entries that an update after this step exchanges."""
        if self.decay == "constant" or self.steps is None:
            return self.prune_fraction
        done = min(step / self.steps, 1.0)
        rest = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.final_fraction + (self.prune_fraction - self.final_fraction) * rest

    def density(self, step: int, final: float) -> float:
        """The density after this step, if ``final`` is that in the end."""
        if self.start_density is None:
            return final
        first, last = self.density_steps
        rest = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
        return final + (self.start_density - final) * rest**3
