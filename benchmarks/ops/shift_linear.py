"""Shift fused into the following 1x1 convolution, against that convolution alone.

The baseline is torch's 1x1 convolution in its better layout (of the two, the one that is faster here is named in each
row's candidates; both run). ``unfused`` is our shift and then that convolution. Backward all compute the gradients of
the map and of the weight.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.ops.shift import neighbours
from shiftconv.ops import shift, shift_linear

BASELINE = "conv1x1 nchw"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {  # x, output channels
    "imagenet 96@56": ((16, 96, 56, 56), 96),
    "imagenet 192@28": ((16, 192, 28, 28), 192),
    "imagenet 384@14": ((16, 384, 14, 14), 384),
    "imagenet 768@7": ((16, 768, 7, 7), 768),
    "cifar 48@32": ((128, 48, 32, 32), 16),
    "cifar 96@16": ((128, 96, 16, 16), 32),
    "cifar 192@8": ((128, 192, 8, 8), 64),
    "one image 96@56": ((1, 96, 56, 56), 96),
    "one image 384@14": ((1, 384, 14, 14), 384),
}


def cases(device: str) -> Iterator[Case]:
    """All shapes, dtypes and directions on ``device``; maps lie in NCHW but for the rows named channels_last."""
    for (name, (shape, outputs)), (dtype_name, dtype) in itertools.product(SHAPES.items(), DTYPES.items()):
        x = torch.randn(shape, device=device).to(dtype)
        weight = (torch.randn(outputs, shape[1], device=device) / shape[1] ** 0.5).to(dtype)
        yield from directions(f"{name} {dtype_name}", x, weight)


def directions(name: str, x: Tensor, weight: Tensor) -> Iterator[Case]:
    offset, last = neighbours(x.shape[1]).to(x.device), x.contiguous(memory_format=torch.channels_last)

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight[:, :, None, None])

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        return shift_linear(x, offset, weight)

    def unfused(x: Tensor, weight: Tensor) -> Tensor:
        return conv(shift(x, offset), weight)

    kinds: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        BASELINE: (x, conv),
        "conv1x1 channels_last": (last, conv),
        "shift_linear": (x, fused),
        "shift_linear channels_last": (last, fused),
        "unfused": (x, unfused),
    }

    def check() -> None:
        truth = conv(shift(x.double(), offset), weight.double()).to(x.dtype)
        close = 1e-4 if x.dtype is torch.float32 else 4e-2
        for label, (argument, function) in kinds.items():
            if "conv" not in label:
                torch.testing.assert_close(function(argument, weight), truth, rtol=close, atol=close)

    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    grad = torch.randn_like(conv(x, weight))
    for label, (argument, function) in kinds.items():
        forward[label] = torch.no_grad()(lambda f=function, a=argument: f(a, weight))
        leaf, learned = argument.clone().requires_grad_(), weight.clone().requires_grad_()
        given = grad.contiguous(memory_format=torch.channels_last) if argument is last else grad
        both[label] = lambda f=function, a=leaf, w=learned, g=given: torch.autograd.grad(f(a, w), (a, w), g)
    yield Case(name, "forward", BASELINE, forward, check)
    yield Case(name, "forward+backward", BASELINE, both, check)
