"""How good a network is on a set of images."""

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from shiftconv.analysis.mode import evaluating
from shiftconv.train.device import Compute, check_amp
from shiftconv.train.events import Progress, Step, silent
from shiftconv.train.task import Classification, Task

Gather = Callable[[list[float]], list[float]]  # sums over all processes


@dataclass(frozen=True)
class Metrics:
    """Means over ``images`` images.

    Attributes:
        loss: cross entropy, or what else the task validates with.
        scores: of a classifier ``top1``, the share whose most probable class is right, 0..1, and ``top5``, the share
            whose class is among the five most probable ones (all, with fewer classes); of other tasks theirs.
        images: how many there were.
        images_per_second: reading, transforming and computing.
    """

    loss: float
    scores: dict[str, float]
    images: int
    images_per_second: float

    @property
    def top1(self) -> float:
        return self.scores["top1"]

    @property
    def top5(self) -> float:
        return self.scores["top5"]

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, **self.scores, "images": self.images, "images_per_second": self.images_per_second}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        own = {name: values[name] for name in ("loss", "images", "images_per_second")}
        return cls(scores={name: value for name, value in values.items() if name not in own}, **own)

    def __str__(self) -> str:
        scores = (f"{name.replace('top', 'top-')} {value:.2%}" for name, value in self.scores.items())
        speed = f"{self.images_per_second:.0f} images/s"
        return ", ".join([f"loss {self.loss:.4f}", *scores, f"{self.images} images", speed])


class Meter:
    """Sums over images, kept on the device so that a GPU need not wait for the CPU at each step."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._sums = torch.zeros(1 + task.width, dtype=torch.float64, device=device)
        self._start, self._shown = time.perf_counter(), 0.0
        self.images = self._before = 0

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Any, targets: Any, count: bool = True) -> None:
        """Count a batch: its mean loss, what the network gave and what was wanted.

        Args:
            loss: a scalar.
            outputs: as the task's ``counts`` takes them.
            targets: as many as images.
            count: no: these images are a repetition.
        """
        if count:
            self._sums[0] += loss.detach() * len(targets)
            self._sums[1:] += self._task.counts(outputs, targets)
            self.images += len(targets)

    def due(self, every: float = 0.2) -> bool:
        """Whether it is time to show something again, in seconds."""
        now = time.perf_counter()
        if now - self._shown < every:
            return False
        self._shown = now
        return True

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def read(self, gather: Gather = list) -> Metrics:
        """The means so far; waits for the device.

        Args:
            gather: adds lists of numbers up over all processes, each of which calls this.
        """
        images, new, *sums = gather([self.images, self.images - self._before, *self._sums.tolist()])
        loss, *counts = sums
        speed = new / max(self.seconds, 1e-9)
        return Metrics(loss / max(1, images), self._task.read(counts, int(images)), int(images), speed)

    def state(self, gather: Gather = list) -> dict[str, Any]:
        """The sums of all processes, to go on from."""
        images, *sums = gather([self.images, *self._sums.tolist()])
        return {"images": int(images), "sums": sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.images = self._before = state["images"]
        self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=self._sums.device)


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    *,
    device: torch.device | None = None,
    amp: str = "none",
    channels_last: bool = False,
    progress: Progress = silent,
    part: str = "test",
) -> Metrics:
    """Loss and accuracy of a classifier; it is in evaluation mode for this, and each module is put back after it.

    Args:
        model: from ``[B, 3, H, W]`` to logits ``[B, K]``; already on the device.
        loader: batches of images and labels, such as ``open_data("digits").loader("test", 256)``.
        device: where to compute; none: where the model's first weight is.
        amp: none, bf16 or fp16.
        channels_last: memory format of the images.
        progress: what to tell a few times per second.
        part: what to call the images there.

    Raises:
        ValueError: if there are no images, or labels that the network has no class for.
    """
    first = next(iter(model.parameters()), None)
    device = device or (first.device if first is not None else torch.device("cpu"))
    check_amp(amp, device)
    return measure(Classification(model), model, loader, Compute(device, amp, channels_last), progress, part)


@torch.inference_mode()
def measure(
    task: Task,
    network: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    compute: Compute,
    progress: Progress = silent,
    part: str = "test",
    gather: Gather = list,
    rounds: int = 0,
) -> Metrics:
    """Loss and scores of a network of a task, in evaluation mode.

    Args:
        task: says what counts.
        network: the task's own, or one like it, such as an average.
        loader: this process's part of the batches.
        compute: where and how exactly.
        progress: what to tell a few times per second.
        part: what to call the images there.
        gather: adds lists of numbers up over all processes, each of which calls this.
        rounds: batches that each process computes at least, repeating its last one, where they must keep step.

    Raises:
        ValueError: if there are no images, or labels that the network has no class for.
    """
    steps = len(loader) if isinstance(loader, Sized) else 0
    meter, step, moved, wanted = Meter(task, compute.device), 0, None, None
    with evaluating(network), compute.autocast():
        for step, (inputs, targets) in enumerate(loader, start=1):
            moved, wanted = compute.move(inputs), compute.move(targets)
            meter.add(*task.measure(network, moved, wanted), wanted)
            if meter.due():
                progress(Step(part, 0, step, steps, *figures(meter.read())))
        for _ in range(step, rounds):
            task.measure(network, moved, wanted)
    metrics = meter.read(gather)
    if metrics.images == 0:
        raise ValueError("there is not one image to evaluate")
    return metrics


def figures(metrics: Metrics) -> tuple[float, float, float]:
    """What a progress shows: the loss, the first score and the speed."""
    return metrics.loss, next(iter(metrics.scores.values()), 0.0), metrics.images_per_second
