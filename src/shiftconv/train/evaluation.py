"""How good a network is on a set of images."""

import time
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shiftconv.analysis.mode import evaluating
from shiftconv.train.data.loader import Batch, to_device
from shiftconv.train.device import autocast, check_amp
from shiftconv.train.events import Progress, Step, silent


@dataclass(frozen=True)
class Metrics:
    """Means over ``images`` images.

    Attributes:
        loss: cross entropy.
        top1: share whose most probable class is right, 0..1.
        top5: share whose class is among the five most probable ones (all, with fewer classes), 0..1.
        images: how many there were.
        images_per_second: reading, transforming and computing.
    """

    loss: float
    top1: float
    top5: float
    images: int
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        speed = f"{self.images_per_second:.0f} images/s"
        return f"loss {self.loss:.4f}, top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, {self.images} images, {speed}"


class Meter:
    """Sums over images, kept on the device so that a GPU need not wait for the CPU at each step."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._start = time.perf_counter()
        self._shown = 0.0
        self.images = 0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch of logits ``[B, K]`` with labels ``[B]`` and their mean loss."""
        ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        right = torch.stack([ranks[:, 0].sum(), ranks.sum()])
        self._sums += torch.cat([loss.detach().double().view(1) * len(labels), right.double()])
        self.images += len(labels)

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

    def read(self) -> Metrics:
        """The means so far; waits for the device."""
        loss, top1, top5 = (value / max(1, self.images) for value in self._sums.tolist())
        return Metrics(loss, top1, top5, self.images, self.images / max(self.seconds, 1e-9))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
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
    steps = len(loader) if isinstance(loader, Sized) else 0
    meter = Meter(device)
    with evaluating(model):
        for step, batch in enumerate(loader, start=1):
            images, labels = to_device(batch, device, channels_last)
            with autocast(amp, device):
                logits = model(images)
            if int(batch[1].max()) >= logits.shape[1]:
                raise ValueError(f"the network has {logits.shape[1]} classes, but a label is {int(batch[1].max())}")
            meter.add(logits, labels, cross_entropy(logits.float(), labels))
            if meter.due():
                now = meter.read()
                progress(Step(part, 0, step, steps, now.loss, now.top1, now.images_per_second))
    if meter.images == 0:
        raise ValueError("there is not one image to evaluate")
    return meter.read()
