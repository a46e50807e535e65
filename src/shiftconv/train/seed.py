"""Randomness that follows from the recipe's seed alone, so that a resumed run repeats the uninterrupted one."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a random number is for; two streams of the same seed have nothing in common."""

    WEIGHTS = 0
    STEPS = 1
    ORDER = 2
    AUGMENT = 3
    WORKERS = 4
    MIX = 5


def derive(seed: int, stream: Stream, *parts: int) -> int:
    """A seed in 0..2^32-1 (the range that numpy's global generator takes) for this stream and, say, epoch and image."""
    return int(np.random.SeedSequence([seed, int(stream), *parts]).generate_state(1)[0])


def generator(seed: int, stream: Stream, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, stream, *parts))


@contextmanager
def seeded(number: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block the global generators of python, numpy and torch start from ``number``; then all is as before.

    Networks (dropout, initial weights) and the transforms of timm and torchvision draw from these and nothing else.

    Args:
        number: a seed in 0..2^32-1.
        device: the GPU whose generator is seeded too; none: the CPU's only.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm's RandAugment draws from it
    with torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 - see above
        torch.default_generator.manual_seed(number)  # torch.manual_seed would change every GPU's generator as well
        if cuda is not None:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002 - see above


def reseed(number: int, device: torch.device) -> None:
    """Start the global generators from ``number``, within a block of ``seeded`` that puts them back at its end."""
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - see there
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
