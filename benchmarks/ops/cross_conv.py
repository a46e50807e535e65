"""The cross operator of SLaK and of shift-wise convolution against torch's three convolutions and their sum.

The baseline runs each of the three in that one of torch's memory formats that is faster for it, the map given in that
format for free, and adds the results. ``branches`` are the three maps apart, as training wants them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.ops.depthwise_conv import DTYPES
from benchmarks.ops.shift import FORMATS
from shiftconv.ops import cross_conv
from shiftconv.ops.branches import apply_sum

BASELINE = "three of torch's convolutions"


class Shape(NamedTuple):
    network: str
    images: int
    channels: int
    side: int
    long: int
    short: int

    def __str__(self) -> str:
        return f"{self.network} {self.channels}@{self.side} {self.long}x{self.short} batch {self.images}"

    def kernels(self) -> list[tuple[int, int]]:
        return [(self.long, self.short), (self.short, self.long), (self.short, self.short)]


STAGES = ((2, 56, 51), (4, 28, 49), (8, 14, 47), (16, 7, 13))
SHAPES = [
    *(Shape("slak_tiny", n, c, side, k, 5) for (n, side, k), c in zip(STAGES, (124, 249, 499, 998), strict=True)),
    *(Shape("shiftwise_tiny", n, c, side, k, 3) for (n, side, k), c in zip(STAGES, (60, 122, 246, 492), strict=True)),
    *(Shape("slak_tiny", 1, c, side, k, 5) for (_, side, k), c in zip(STAGES, (124, 249, 499, 998), strict=True)),
]


def cases(device: str) -> Iterator[Case]:
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            yield from directions(f"{shape} {name}", shape, dtype, device)


def directions(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x = torch.randn(shape.images, shape.channels, shape.side, shape.side, device=device).to(dtype)
    weights = [
        (torch.randn(shape.channels, 1, kh, kw, device=device) / (3 * kh * kw) ** 0.5).to(dtype)
        for kh, kw in shape.kernels()
    ]
    inputs = {format_name: x.contiguous(memory_format=f) for format_name, f in FORMATS.items()}

    def summed(x: Tensor, *kernels: Tensor) -> Tensor:
        return cross_conv(x, kernels[0], kernels[1], kernels[2])

    def apart(x: Tensor, *kernels: Tensor) -> tuple[Tensor, ...]:
        return cross_conv(x, kernels[0], kernels[1], kernels[2], summed=False)

    def by_torch(x: Tensor, *kernels: Tensor) -> list[Tensor]:
        return [_convolve(inputs if x is inputs["nchw"] else x, kernel) for kernel in kernels]

    def check() -> None:
        tolerance = 1e-4 if dtype is torch.float32 else 4e-2
        pads = [pad for kh, kw in shape.kernels() for pad in (kh // 2, kh // 2, kw // 2, kw // 2)]
        truth = torch.zeros_like(x, dtype=torch.float64)
        for b, kernel in enumerate(weights):
            top, _, left, _ = pads[4 * b : 4 * b + 4]
            wide = x.double().contiguous(memory_format=torch.channels_last)
            truth += F.conv2d(wide, kernel.double(), None, 1, (top, left), 1, shape.channels)
        for label, y in {
            "nchw": summed(x, *weights),
            "channels_last": summed(inputs["channels_last"], *weights),
            "branches": sum(y.double() for y in apart(x, *weights)),
            "by torch": sum(y.double() for y in by_torch(x, *weights)),
            "adjoint of adjoint": apply_sum([x], [w.flip(2, 3) for w in weights], None, pads, True),
        }.items():
            torch.testing.assert_close(
                y.double(), truth, rtol=tolerance, atol=tolerance, msg=lambda m, at=label: f"{at}: {m}"
            )

    leaves = {key: [t.clone().requires_grad_() for t in (inputs[key], *weights)] for key in FORMATS}
    grads = {key: [torch.randn_like(inputs[key]) for _ in weights] for key in FORMATS}
    torch_leaves = [t.clone().requires_grad_() for t in (inputs["channels_last"], *weights)]

    def step(key: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(apart(*leaves[key]), leaves[key], grads[key])

    def torch_step() -> object:
        return torch.autograd.grad(by_torch(*torch_leaves), torch_leaves, grads["channels_last"])

    def torch_sum() -> Tensor:
        maps = by_torch(x, *weights)
        return maps[0] + maps[1] + maps[2]

    forward = {
        BASELINE: torch_sum,
        "cross_conv": lambda: summed(x, *weights),
        "cross_conv channels_last": lambda: summed(inputs["channels_last"], *weights),
        "cross_conv branches": lambda: apart(x, *weights),
    }
    both = {BASELINE: torch_step, "cross_conv": step("nchw"), "cross_conv channels_last": step("channels_last")}
    yield Case(name, "forward", BASELINE, forward, check)
    yield Case(name, "forward+backward", BASELINE, both, check)


def _convolve(x: Tensor | dict[str, Tensor], kernel: Tensor) -> Tensor:
    """One of the three; given in both formats, in that one which torch runs faster."""
    kh, kw = kernel.shape[2:]
    if isinstance(x, dict):
        x = x["channels_last" if kw >= 14 or kh * kw >= 200 else "nchw"]
    return F.conv2d(x, kernel, None, 1, (kh // 2, kw // 2), 1, x.shape[1])
