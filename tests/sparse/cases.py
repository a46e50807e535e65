"""Small networks, their training, and what a mask means for each weight, told apart from the library's own words."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.sparse import Calibration, Schedule, SparseTraining

ALWAYS = Schedule(every_steps=1, stop_fraction=1.0)
"""An update after each step, all of the same size."""


class Tiny(nn.Module):
    """Convolutions, a depthwise one, norms and linear layers, all of odd sizes, and chains of hidden units."""

    def __init__(self, width: int = 7, hidden: int = 11):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, (3, 5), padding=(1, 2), groups=width, bias=False)
        self.mix = nn.Conv2d(width, 5, 2)
        self.fc1 = nn.Linear(5, hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.gelu(self.norm(self.stem(x))))
        return self.fc2(F.gelu(self.fc1(F.gelu(self.mix(x)).mean((2, 3)))))


class Fours(nn.Sequential):
    """Inputs in multiples of four."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, (3, 1), padding=(1, 0)),
            nn.GELU(),
            nn.Conv2d(8, 8, (2, 4), groups=8),
            nn.Conv2d(8, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 12),
            nn.GELU(),
            nn.Linear(12, 4),
        )


class Large(nn.Sequential):
    """Our large kernels: two paths that share their masks, and the three branches of a cross."""

    def __init__(self, paths: int = 2) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 2, stride=2),
            ShiftwiseConv2d(6, 13, 3, num_paths=paths, num_shifts=2, ghost_ratio=0.2),
            nn.GELU(),
            LargeKernelConv2d(6, 11, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )


def made(kind: type[nn.Module] = Tiny, seed: int = 0, **arguments: int) -> nn.Module:
    """A network whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(**arguments)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 4:
                    parameter.mul_(3)
    return network


def batch(seed: int = 0, channels: int = 3, size: int = 8, count: int = 6) -> tuple[Tensor, Tensor]:
    """Images ``[count, channels, size, size]`` and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def backward(model: nn.Module, seed: int = 0, channels: int = 3, size: int = 8) -> Tensor:
    x, y = batch(seed, channels, size)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0, channels: int = 3, size: int = 8) -> None:
    optimizer.zero_grad()
    backward(model, seed, channels, size)
    optimizer.step()


def calibration(count: int = 2, channels: int = 3, size: int = 8) -> Calibration:
    return Calibration([batch(100 + i, channels, size) for i in range(count)])


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def counts(sparse: SparseTraining) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in sparse.masks.items()}


def actives(sparse: SparseTraining) -> Iterator[tuple[nn.Parameter, np.ndarray]]:
    """Each masked parameter, and which of its weights the mask lets live, from the shapes alone."""
    for group in sparse.groups:
        mask = group.mask.numpy()
        for number, member in enumerate(group.members):
            shape = member.weight.shape
            if number and mask.ndim == 1 and len(shape) > 1:  # the inputs that a hidden unit gives
                yield member.weight, np.broadcast_to(mask.reshape(1, -1, *(1,) * (len(shape) - 2)), shape)
            elif mask.ndim == len(shape) and mask.shape != shape and mask.size == shape.numel():
                yield member.weight, np.moveaxis(mask, -1, 1)  # a pattern among the inputs of a convolution
            else:
                repeated = np.repeat(mask, shape[0] // mask.shape[0], axis=0)
                yield (
                    member.weight,
                    np.broadcast_to(repeated.reshape(*repeated.shape, *(1,) * (len(shape) - mask.ndim)), shape),
                )


def leaks(sparse: SparseTraining) -> list[str]:
    """The parameters with an inactive weight that is not zero."""
    names = {id(member.weight): member.name for group in sparse.groups for member in group.members}
    return [names[id(weight)] for weight, alive in actives(sparse) if (weight.detach().numpy()[~alive] != 0).any()]


def state_leaks(
    sparse: SparseTraining, state: dict, regrown: Callable[[nn.Parameter], np.ndarray] | None = None
) -> int:
    """How many numbers that an optimiser keeps of inactive weights (or of the ``regrown``) are not zero.

    Adafactor adds 1e-30 to each square, which is none.
    """
    wrong = 0
    for weight, alive in actives(sparse):
        where = ~alive if regrown is None else regrown(weight)
        for value in state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                wrong += int((value.detach().float().abs().numpy()[where] > 1e-25).sum())
    return wrong
