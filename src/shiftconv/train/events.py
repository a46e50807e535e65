"""What a run tells while it goes on. A progress is any callable that takes these; ignoring some is fine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftconv.train.recipe import Recipe


@dataclass(frozen=True)
class Started:
    """The run begins, or goes on after ``finished`` epochs. ``train``, ``val`` and ``test`` count images."""

    recipe: Recipe
    folder: Path
    device: str
    parameters: int
    train: int
    val: int
    test: int
    finished: int


@dataclass(frozen=True)
class Step:
    """So far in this epoch (counted from 1) of training, or in this evaluation; sent a few times per second.

    ``score`` is the task's first one, of a classifier its accuracy; ``memory`` the most that was taken, in bytes, of
    the GPU or else of the machine.
    """

    part: str
    epoch: int
    step: int
    steps: int
    loss: float
    score: float
    images_per_second: float
    memory: int = 0


@dataclass(frozen=True)
class EpochDone:
    """A row of metrics.jsonl, and whether its epoch is the best so far."""

    row: dict[str, Any]
    epochs: int
    is_best: bool


@dataclass(frozen=True)
class Note:
    """Something a person should know, in one sentence."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The run is over; ``error`` says why if it broke off."""

    error: BaseException | None = None


Event = Started | Step | EpochDone | Note | Ended
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The progress that shows nothing."""
