"""Shift against a plain copy, and against what people use for it: a depthwise 3x3 convolution, torch's slices.

Offsets are those of the paper's 3x3 neighbourhood (Wu et al. 2018), channels interleaved; float32. Shapes are the
stages of an ImageNet network and of ShiftResNet-20 with expansion 3 on CIFAR. The copy is of the input, of the incoming
gradient, or of one after the other. Backward it goes through autograd like every candidate: the engine itself costs a
good part of a copy.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from shiftconv.ops.shift import MODES, reference, shift

SHAPES = {
    "imagenet 96@56": (16, 96, 56, 56),
    "imagenet 192@28": (16, 192, 28, 28),
    "imagenet 384@14": (16, 384, 14, 14),
    "imagenet 768@7": (16, 768, 7, 7),
    "cifar 48@32": (128, 48, 32, 32),
    "cifar 96@16": (128, 96, 16, 16),
    "cifar 192@8": (128, 192, 8, 8),
}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BASELINE = "copy"


class Copy(torch.autograd.Function):
    """The floor: one copy forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.clone()


def neighbours(channels: int) -> Tensor:
    """``[C, 2]`` offsets of a 3x3 neighbourhood, interleaved over the channels."""
    c = torch.arange(channels)
    return torch.stack([c // 3 % 3 - 1, c % 3 - 1], 1)


def slices(x: Tensor, offset: list[tuple[int, int]]) -> Tensor:
    """Shift by assigning slices, one group of channels after the other, as common ports do."""
    y = torch.zeros_like(x)
    height, width = x.shape[2:]
    for k, (dh, dw) in enumerate(offset[:9]):
        to = y[:, k::9, max(dh, 0) : height + min(dh, 0), max(dw, 0) : width + min(dw, 0)]
        to.copy_(x[:, k::9, max(-dh, 0) : height + min(-dh, 0), max(-dw, 0) : width + min(-dw, 0)])
    return y


def cases(device: str) -> Iterator[Case]:
    """All shapes, memory formats and directions on ``device``; on the CPU also the cost of a call as such."""
    for name, shape in SHAPES.items():
        for format_name, memory_format in FORMATS.items():
            yield from directions(f"{name} {format_name}", shape, memory_format, device)
    for name in ("imagenet 96@56", "imagenet 192@28", "imagenet 768@7"):
        yield from padding_modes(f"{name} padding", SHAPES[name], device)
    if device == "cpu":
        yield from overhead()


def directions(name: str, shape: tuple[int, ...], memory_format: torch.memory_format, device: str) -> Iterator[Case]:
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    offset = neighbours(shape[1]).to(device)
    pairs = [(int(h), int(w)) for h, w in offset.tolist()]
    kernel = torch.zeros(shape[1], 1, 3, 3, device=device)
    kernel[range(shape[1]), 0, 1 - offset[:, 0], 1 - offset[:, 1]] = 1
    # The convolution runs in both layouts: the better one is what a user could have.
    kinds: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        BASELINE: (x, Copy.apply),
        "shift": (x, lambda x: shift(x, offset)),
        "slices": (x, lambda x: slices(x, pairs)),
    }
    for label, layout in FORMATS.items():
        argument = x.contiguous(memory_format=layout)
        kinds[f"conv3x3 {label}"] = (argument, lambda x: F.conv2d(x, kernel, None, 1, 1, 1, len(kernel)))

    def check() -> None:
        truth = reference(x, offset, MODES["zeros"], False)
        for label, (argument, function) in list(kinds.items())[1:]:
            torch.testing.assert_close(function(argument), truth, msg=lambda m, label=label: f"{label}: {m}")

    forward: dict[str, Callable[[], object]] = {}
    for label, (argument, function) in kinds.items():
        forward[label] = lambda f=function, a=argument: f(a)
    yield Case(name, "forward", BASELINE, forward, check)

    kernel.requires_grad_()
    backward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for label, (argument, function) in kinds.items():
        leaf = argument.clone().requires_grad_()
        y, grad = function(leaf), torch.randn_like(argument)
        # The slices' backward runs the same number of slice copies; the convolution's includes that of its weight.
        wanted = [leaf, kernel] if label.startswith("conv") else [leaf]
        backward[label] = lambda y=y, w=wanted, g=grad: torch.autograd.grad(y, w, g, retain_graph=True)
        both[label] = lambda f=function, a=leaf, w=wanted, g=grad: torch.autograd.grad(f(a), w, g)
    yield Case(name, "backward", BASELINE, backward, check)
    yield Case(name, "forward+backward", BASELINE, both, check)


def padding_modes(name: str, shape: tuple[int, ...], device: str) -> Iterator[Case]:
    """The kernel alone, NCHW, in every padding mode: the map and its transpose, which sums what the border has read."""
    x, offset = torch.randn(shape, device=device), neighbours(shape[1]).to(device)
    kernel = torch.ops.shiftconv.shift.default
    for direction, transpose in (("forward", False), ("transpose", True)):

        def check(transpose: bool = transpose) -> None:
            for code in MODES.values():
                torch.testing.assert_close(kernel(x, offset, code, transpose), reference(x, offset, code, transpose))

        candidates: dict[str, Callable[[], object]] = {BASELINE: x.clone}
        for mode, code in MODES.items():
            candidates[mode] = lambda code=code, transpose=transpose: kernel(x, offset, code, transpose)
        yield Case(name, direction, BASELINE, candidates, check)


def overhead() -> Iterator[Case]:
    """What a call costs beyond its work: a tensor of 64 numbers, without and with a gradient recorded."""
    for direction, needs_grad in (("forward", False), ("forward, recorded", True)):
        x = torch.randn(1, 4, 4, 4, requires_grad=needs_grad)
        offset = neighbours(4)
        candidates = {BASELINE: x.clone, "shift": lambda x=x, o=offset: shift(x, o)}
        yield Case("call overhead", direction, BASELINE, candidates, lambda: None)
