"""Depthwise convolutions against torch's in both memory formats and against ``torch.fft``.

Shapes are the stages of SLaK-T, whose 51, 49, 47 and 13 wide kernels are whole or cut into stripes, and of ConvNeXt-T.
The baseline is torch's convolution in that one of its two memory formats that is faster here, in that direction.
Directions are the map (``forward``), the gradient to the kernel (``weight``), and a training step's
``forward+backward``.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.ops.shift import FORMATS
from shiftconv.ops import depthwise_conv
from shiftconv.ops.branches import apply_weight
from shiftconv.ops.depthwise_paths import sum_by_fft, sum_by_torch, weight_by_torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE = "torch, better format"
_CLIFF = 14  # from this width on torch's NCHW form of a case takes 20 to 400 times as long, so it runs but seldom


class Shape(NamedTuple):
    images: int
    channels: int
    side: int
    kernel: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.channels}@{self.side} {self.kernel[0]}x{self.kernel[1]} batch {self.images}"


SHAPES = [
    *(Shape(2, 124, 56, kernel) for kernel in ((51, 51), (51, 5), (5, 51), (31, 31), (13, 13), (7, 7), (5, 5), (3, 3))),
    *(Shape(4, 249, 28, kernel) for kernel in ((49, 49), (49, 5), (5, 49), (13, 13))),
    *(Shape(8, 499, 14, kernel) for kernel in ((47, 47), (47, 5), (5, 47), (13, 13))),
    *(Shape(16, 998, 7, kernel) for kernel in ((13, 13), (13, 5), (5, 13))),
    *(Shape(n, c, side, (7, 7)) for n, c, side in ((2, 96, 56), (4, 192, 28), (8, 384, 14), (16, 768, 7))),
    *(Shape(1, channels, side, (7, 7)) for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7))),
    Shape(1, 96, 224, (7, 7)),
    Shape(1, 16, 128, (51, 51)),
    Shape(1, 64, 128, (51, 5)),
]


def cases(device: str) -> Iterator[Case]:
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            yield from directions(f"{shape} {name}", shape, dtype, device)


def directions(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    x = torch.randn(shape.images, shape.channels, shape.side, shape.side, device=device).to(dtype)
    kh, kw = shape.kernel
    weight = (torch.randn(shape.channels, 1, kh, kw, device=device) / (kh * kw) ** 0.5).to(dtype)
    pads = [kh // 2, kh // 2, kw // 2, kw // 2]
    own, peers = _functions(shape, dtype)
    inputs = {format_name: x.contiguous(memory_format=f) for format_name, f in FORMATS.items()}

    def check() -> None:
        tolerance = 1e-4 if dtype is torch.float32 else 3e-2
        truth = sum_by_torch([x.double()], [weight.double()], None, pads, False)
        slope = weight_by_torch([x.double()], [truth], pads)[0]
        for label, (format_name, function) in {**own, **peers}.items():
            y = function(inputs[format_name], weight)
            torch.testing.assert_close(
                y.double(), truth, rtol=tolerance, atol=tolerance, msg=lambda m, at=label: f"{at}: {m}"
            )
        (grad,) = apply_weight([x], [truth.to(dtype)], pads)
        worst = (grad.double() - slope).abs().max() / slope.abs().max()
        assert worst < tolerance, f"gradient to the weight: off by {worst} of its largest"

    forward: dict[str, Callable[[], object]] = {}
    to_weight: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for label, (format_name, function) in {**own, **peers}.items():
        source = inputs[format_name]
        grad = torch.randn_like(source)
        leaves = [source.clone().requires_grad_(), weight.clone().requires_grad_()]
        forward[label] = lambda f=function, a=source: f(a, weight)
        if label == "torch.fft":
            continue
        if label in own:
            to_weight[label] = lambda a=source, g=grad: apply_weight([a], [g], pads)
        else:
            to_weight[label] = lambda a=source, g=grad: _torch_weight(a, g, weight, pads)
        both[label] = lambda f=function, a=leaves, g=grad: torch.autograd.grad(f(*a), a, g)
    for direction, candidates in (("forward", forward), ("weight", to_weight), ("forward+backward", both)):
        yield Case(name, direction, BASELINE, with_baseline(candidates, peers), check)


def _functions(
    shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]], dict[str, tuple[str, Callable[..., Tensor]]]]:
    """Ours and the peers, each with its memory format; those that would take minutes are left out."""
    kh, kw = shape.kernel
    padding = (kh // 2, kw // 2)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv(x, weight, None, padding)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, 1, padding, 1, shape.channels)

    def spectra(x: Tensor, weight: Tensor) -> Tensor:
        return sum_by_fft([x], [weight], None, [padding[0], padding[0], padding[1], padding[1]], False)

    peers: dict[str, tuple[str, Callable[..., Tensor]]] = {"torch channels_last": ("channels_last", torchs)}
    if kw < _CLIFF or (shape.side == 56 and dtype is torch.float32 and kh < _CLIFF):
        peers["torch nchw"] = ("nchw", torchs)
    if min(shape.kernel) >= _CLIFF and dtype is torch.float32:
        peers["torch.fft"] = ("nchw", spectra)
    return {"depthwise_conv": ("nchw", ours), "depthwise_conv channels_last": ("channels_last", ours)}, peers


def _torch_weight(x: Tensor, grad: Tensor, weight: Tensor, pads: list[int]) -> Tensor:
    padding = [pads[0], pads[2]]
    rest = (None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], [False, True, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, *rest)[1]


def with_baseline(candidates: dict[str, Callable[[], object]], peers: Iterable[str]) -> dict[str, Callable[[], object]]:
    """Put the fastest form of torch's convolution in front, under a name of its own; drop those that are far off."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, float] = {}
    for name in peers:
        if name in candidates and name != "torch.fft":
            candidates[name]()
            start = clock()
            candidates[name]()
            seconds[name] = clock() - start
    fastest = min(seconds, key=lambda name: seconds[name])
    return {BASELINE: candidates[fastest], **{name: run for name, run in candidates.items() if name != fastest}}
