"""Images per second, measured so that networks compare fairly on a machine that is not quiet."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftconv.analysis.mode import evaluating, home


@dataclass(frozen=True)
class Throughput:
    """Images per second of one network in inference.

    Attributes:
        images_per_second: median over the rounds.
        rounds: images per second of each round.
        batch_size: images in a batch.
        device: where it ran.
        threads: torch's CPU threads.
    """

    images_per_second: float
    rounds: tuple[float, ...]
    batch_size: int
    device: str
    threads: int

    def ratio(self, other: "Throughput") -> float:
        """How many times as fast as ``other``: the median over the rounds that :func:`compare` ran side by side."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def throughput(
    model: nn.Module,
    size: int | Sequence[int] = 32,
    *,
    batch_size: int = 64,
    seconds: float = 2.0,
    rounds: int = 9,
    device: torch.device | str | None = None,
    channels_last: bool = False,
) -> Throughput:
    """Measure one network; see :func:`compare` for the arguments."""
    return compare(
        {"": model},
        size,
        batch_size=batch_size,
        seconds=seconds,
        rounds=rounds,
        device=device,
        channels_last=channels_last,
    )[""]


def compare(
    models: Mapping[str, nn.Module],
    size: int | Sequence[int] = 32,
    *,
    batch_size: int = 64,
    seconds: float = 2.0,
    rounds: int = 9,
    device: torch.device | str | None = None,
    channels_last: bool = False,
) -> dict[str, Throughput]:
    """Measure several networks in turn, round by round, so that a slow moment of the machine hits all alike.

    Inference mode, eval mode, random images, warmed up; a GPU is waited for. The models stay as they were: another
    device or memory format is set on a copy.

    Args:
        models: networks by name.
        size: side of the images in pixels (three channels), or ``(C, H, W)``.
        batch_size: images in a batch.
        seconds: about how long to measure each network, over all rounds.
        rounds: how many numbers the median is of.
        device: where to run; by default where each model is.
        channels_last: run in this memory format.

    Raises:
        ValueError: if a number is not positive, the size is neither form, or there is no such device.
    """
    shape = _shape(size)
    for name, value in (("batch_size", batch_size), ("rounds", rounds), ("seconds", seconds)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not models:
        raise ValueError("there is no model to measure")
    timers = {name: _Timer(_placed(model, device, channels_last), shape, batch_size) for name, model in models.items()}
    if channels_last:
        for timer in timers.values():
            timer.images = timer.images.contiguous(memory_format=torch.channels_last)
    calls = {name: max(1, round(seconds / rounds / timer.warm_up())) for name, timer in timers.items()}
    rates: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            rates[name].append(calls[name] * batch_size / timer(calls[name]))
    threads = torch.get_num_threads()
    return {
        name: Throughput(statistics.median(values), tuple(values), batch_size, str(timers[name].device), threads)
        for name, values in rates.items()
    }


class _Timer:
    def __init__(self, model: nn.Module, shape: tuple[int, int, int], batch_size: int):
        self.model = model
        self.device, dtype = home(model)
        generator = torch.Generator().manual_seed(0)
        self.images: Tensor = torch.randn(batch_size, *shape, generator=generator).to(self.device, dtype)
        self.wait: Callable[[], object] = _waiter(self.device)

    def warm_up(self) -> float:
        """Seconds of one call: the fastest of three, after one that may compile kernels."""
        self(1)
        return min(self(1) for _ in range(3))

    def __call__(self, calls: int) -> float:
        with evaluating(self.model), torch.inference_mode():
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                self.model(self.images)
            self.wait()
            return time.perf_counter() - start


def _waiter(device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _placed(model: nn.Module, device: torch.device | str | None, channels_last: bool) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module, got {type(model).__name__}")
    here = home(model)[0]
    try:
        target = here if device is None else torch.device(device)
        if target == here and not channels_last:
            return model
        model = copy.deepcopy(model).to(target)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _shape(size: int | Sequence[int]) -> tuple[int, int, int]:
    shape = (3, size, size) if isinstance(size, int) else tuple(size)
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"size must be a side in pixels or (C, H, W), all positive, got {size!r}")
    return shape
