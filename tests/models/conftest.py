"""Weights and images that are functions of their names, so that the goldens need to store neither.

Every tensor stands on n(key): float64 standard normal numbers of numpy's PCG64, seeded with the CRC-32 of the key.
"""

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))


def _weight(key: str, like: Tensor) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    n = torch.from_numpy(_generator(key).standard_normal(tuple(like.shape)))
    if key.endswith("running_var"):
        return n.abs() + 0.5
    if key.endswith(("running_mean", "bias")):
        return 0.1 * n
    if n.ndim == 4:
        return n * 0.7 / n[0].numel() ** 0.5
    return n / n.shape[1] ** 0.5 if n.ndim == 2 else 1 + 0.1 * n


@pytest.fixture(scope="session")
def fill() -> Callable[[nn.Module], nn.Module]:
    """Give a network the weights that its state-dict keys stand for."""

    def fill(model: nn.Module) -> nn.Module:
        model.load_state_dict({key: _weight(key, value) for key, value in model.state_dict().items()})
        return model

    return fill


@pytest.fixture(scope="session")
def images() -> Callable[[str], Tensor]:
    """The three float64 images ``[3, 3, 32, 32]`` of a golden case."""
    return lambda case: torch.from_numpy(_generator(f"input:{case}").standard_normal((3, 3, 32, 32)))
