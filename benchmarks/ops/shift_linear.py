"""The fused shift and 1x1 convolution against the 1x1 convolution alone, which is what a free shift would cost.

Offsets are those of the paper's 3x3 neighbourhood (Wu et al. 2018), channels interleaved. Shapes are the stages of an
ImageNet network and the second convolutions in the blocks of ShiftResNet-20 with expansion 3 on CIFAR, in batches of
training and of one. The baseline is torch's convolution in that one of its two memory formats that is faster here.
"""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.ops.shift import FORMATS, neighbours
from shiftconv.ops.sampling import MODES
from shiftconv.ops.shift import shift
from shiftconv.ops.shift_linear import reference, shift_linear

# Images, channels in and out, side, stride.
SHAPES = {
    "imagenet 96@56": (16, 96, 96, 56, 1),
    "imagenet 192@28": (16, 192, 192, 28, 1),
    "imagenet 384@14": (16, 384, 384, 14, 1),
    "imagenet 768@7": (16, 768, 768, 7, 1),
    "cifar 48@32": (128, 48, 16, 32, 1),
    "cifar 96@32 stride 2": (128, 96, 32, 32, 2),
    "cifar 96@16": (128, 96, 32, 16, 1),
    "cifar 192@16 stride 2": (128, 192, 64, 16, 2),
    "cifar 192@8": (128, 192, 64, 8, 1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE = "conv1x1"

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str) -> Iterator[Case]:
    """All shapes and dtypes in both directions, in their batches and with one image."""
    for name, (images, *shape) in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            for batch in (images, 1):
                yield from directions(f"{name} batch {batch} {dtype_name}", (batch, *shape), dtype, device)


def directions(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Case]:
    images, channels, outputs, side, stride = shape
    offset = neighbours(channels).to(device)
    still = torch.zeros_like(offset)
    x = torch.randn(images, channels, side, side, device=device).to(dtype)
    weight = (torch.randn(outputs, channels, device=device) / channels**0.5).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype)

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight[:, :, None, None], bias, stride)

    functions: dict[str, tuple[str, Function]] = {
        "shift_linear": ("nchw", lambda x, w, b: shift_linear(x, offset, w, b, stride=stride)),
        "shift_linear channels_last": ("channels_last", lambda x, w, b: shift_linear(x, offset, w, b, stride=stride)),
        "not shifted": ("nchw", lambda x, w, b: shift_linear(x, still, w, b, stride=stride)),
        "shift, then conv1x1": ("nchw", lambda x, w, b: conv(shift(x, offset), w, b)),
        "conv1x1 nchw": ("nchw", conv),
        "conv1x1 channels_last": ("channels_last", conv),
    }

    def check() -> None:
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        for label, (format_name, function) in functions.items():
            moved = still if "conv1x1 " in label or label == "not shifted" else offset
            truth = reference(x, moved, weight, bias, None, MODES["zeros"], [stride, stride], False)
            y = function(x.contiguous(memory_format=FORMATS[format_name]), weight, bias)
            torch.testing.assert_close(y, truth, rtol=tolerance, atol=tolerance, msg=lambda m, at=label: f"{at}: {m}")

    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for label, (format_name, function) in functions.items():
        argument = x.contiguous(memory_format=FORMATS[format_name])
        leaves = [t.clone().requires_grad_() for t in (argument, weight, bias)]
        grad = torch.randn_like(function(argument, weight, bias))
        forward[label] = lambda f=function, a=argument: f(a, weight, bias)
        both[label] = lambda f=function, a=leaves, g=grad: torch.autograd.grad(f(*a), a, g)
    yield Case(name, "forward", BASELINE, with_baseline(forward), check)
    yield Case(name, "forward+backward", BASELINE, with_baseline(both), check)


def with_baseline(candidates: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Put the faster one of torch's convolutions in front, under a name of its own."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(run: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(5):
            start = clock()
            run()
            times.append(clock() - start)
        return min(times)

    faster = min((candidates[name] for name in ("conv1x1 nchw", "conv1x1 channels_last")), key=seconds)
    return {BASELINE: faster, **candidates}
