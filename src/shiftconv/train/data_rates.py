"""Whether reading images keeps up with training, and how many processes must read them."""

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from shiftconv.models import create_model
from shiftconv.train.checks import integer, number, optional
from shiftconv.train.data import DataSets, open_data
from shiftconv.train.device import pick_device
from shiftconv.train.settings import OWN_DATA, TIMM_DATA, Data

KEEPS_UP = 1.1  # times as fast as the network: reading has its ups and downs


@dataclass(frozen=True)
class DataRates:
    """How fast images are read, and how fast a network learns from them.

    Attributes:
        name: the data set.
        image_size: side of the images in pixels.
        batch_size: images per step.
        cores: processors that this process may use.
        loading: images per second of the loader alone, by its number of workers; 0: the process that trains.
        model: name of the network; none: only the loader was measured.
        training: images per second of its training steps alone; none: not measured.
        device: where it trained.
    """

    name: str
    image_size: int
    batch_size: int
    cores: int
    loading: dict[int, float]
    model: str | None = None
    training: float | None = None
    device: str = "cpu"

    @property
    def workers_needed(self) -> int | None:
        """Fewest workers that read a tenth faster than the network learns; none: no network was measured.

        Where no measured number is enough, it follows from the rate of one worker.
        """
        if self.training is None:
            return None
        goal = KEEPS_UP * self.training
        enough = [workers for workers, rate in sorted(self.loading.items()) if workers and rate >= goal]
        each = max(rate / max(1, workers) for workers, rate in self.loading.items())
        return enough[0] if enough else math.ceil(goal / each)

    @property
    def verdict(self) -> str:
        """One sentence: whether reading holds training up, and what to do."""
        workers, best = max(self.loading.items(), key=lambda item: item[1])
        if self.training is None or self.workers_needed is None:
            return f"fastest: {best:.0f} images/s with {_count(workers)}"
        learns, needed = f"{self.model} learns from {self.training:.0f} images/s on {self.device}", self.workers_needed
        if best >= KEEPS_UP * self.training:
            return f"reading keeps up: {learns}; data.workers {needed} is enough"
        held = f"reading is the bottleneck: {learns}, but at best {best:.0f} are read, with {_count(workers)}"
        if needed > self.cores:
            return f"{held}; about {needed} workers would be needed, and there are {self.cores} processors"
        return f"{held}; try data.workers {needed}"

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.image_size} px, batches of {self.batch_size}", "workers  images/s"]
        lines += [f"{workers:7}  {rate:8.0f}" for workers, rate in sorted(self.loading.items())]
        return "\n".join([*lines, self.verdict])


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def data_rates(
    data: Data | str | Path,
    model: str | None = None,
    *,
    batch_size: int = 64,
    seconds: float = 5.0,
    workers: int | None = None,
    device: torch.device | str | None = None,
) -> DataRates:
    """Measure the loader of the training images by itself, and a network's training steps by themselves.

    On a CPU both share the processors, so training is slower than either.

    Args:
        data: settings, the name of a data set (also by timm's prefixes), or a folder of images.
        model: name of a network; none: only the loader is measured.
        batch_size: images per step.
        seconds: how long to measure each number of workers, and the steps.
        workers: the only number of workers to try; none: 0, 1, 2, 4 ... up to the number of processors.
        device: where the network trains; none: a GPU if there is one.

    Raises:
        ValueError: for an unknown name, data that cannot be used, or numbers out of range.
        FileNotFoundError: if the data set is not there.
    """
    integer("batch_size", batch_size, 1)
    number("seconds", seconds, above=0)
    optional(integer, "workers", workers, 0)
    picked = pick_device(device)
    settings = _settings(data)
    opened, cores = open_data(settings), _cores()
    tries = [workers] if workers is not None else sorted({0, cores, *(2**k for k in range(cores.bit_length()))})
    loading = {count: _loading(replace(opened, workers=count), batch_size, seconds) for count in tries}
    training = None if model is None else _training(model, opened, batch_size, seconds, picked)
    name = settings.folder if settings.name == "folder" and settings.folder else settings.name
    return DataRates(name, opened.image_size, batch_size, cores, loading, model, training, str(picked))


def _settings(data: Data | str | Path) -> Data:
    if isinstance(data, Data):
        return data
    if isinstance(data, Path) or (data not in OWN_DATA and not data.startswith(TIMM_DATA) and Path(data).exists()):
        return Data(name="folder", folder=str(data))
    return Data(name=data)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _loading(data: DataSets, batch_size: int, seconds: float) -> float:
    """Images per second from the second batch on, over as many epochs as fit in."""
    loader, epoch, images, start = data.loader("train", batch_size), 0, 0, None
    while True:
        loader.start_epoch(epoch)
        for batch, *_ in loader.steps():
            now = time.perf_counter()
            if start is None:
                start, images = now, -len(batch)  # workers have started, the first batch was no part of the time
            images += len(batch)
            if images > 0 and now - start >= seconds:
                return images / (now - start)
        epoch += 1


def _training(model: str, data: DataSets, batch_size: int, seconds: float, device: torch.device) -> float:
    """Images per second of forward, backward and AdamW on images that are there already."""
    network = create_model(model, num_classes=data.num_classes).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, data.image_size, data.image_size, generator=draw).to(device)
    labels = torch.randint(0, data.num_classes, (batch_size,), generator=draw).to(device)
    _step(network, optimizer, images, labels)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        _step(network, optimizer, images, labels)
        steps += 1
    return steps * batch_size / (time.perf_counter() - start)


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss = cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    loss.item()  # waits for a GPU
