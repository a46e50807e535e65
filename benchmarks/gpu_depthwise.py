"""The depthwise, cross and shift-wise operators on a GPU, for :mod:`benchmarks.gpu`.

The baseline is a copy of the map: what reading it and writing a result takes at least. Goals in bfloat16, as multiples
of the floor that the specification derives: 7x7 and 13x13 at most 1.4 forward, stripes 1.6, the cross operator 1.7
forward and 1.8 with the backward pass; a shift-wise step at least 30 times as fast as the original formulation.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.gpu import Candidate, near
from benchmarks.ops import shiftwise
from shiftconv.ops import cross_conv, depthwise_conv
from shiftconv.ops.branches import apply_weight
from shiftconv.ops.depthwise_paths import sum_by_fft

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
IMAGES = 64
ROTATION = 128 << 20  # bytes of maps that the calls of a candidate go through


class Stage(NamedTuple):
    network: str
    channels: int
    side: int
    long: int
    short: int


STAGES = [
    *(Stage("slak", c, s, k, 5) for c, s, k in ((124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13))),
    *(Stage("shiftwise", c, s, k, 3) for c, s, k in ((60, 56, 51), (122, 28, 49), (246, 14, 47), (492, 7, 13))),
]
SQUARES = [(124, 56, k) for k in (7, 13, 31, 51)] + [(249, 28, k) for k in (7, 13, 49)] + [(499, 14, 47), (998, 7, 13)]
CONVNEXT = [(96, 56, 7), (192, 28, 7), (384, 14, 7), (768, 7, 7)]
Maps = dict[str, list[Tensor]]


def maps(channels: int, side: int, dtype: torch.dtype, device: str, images: int) -> Maps:
    """Random inputs in both memory formats."""
    x = torch.randn(images, channels, side, side, device=device).to(dtype)
    calls = max(2, min(16, ROTATION // (x.numel() * x.itemsize)))
    plain = [x, *(torch.randn_like(x) for _ in range(calls - 1))]
    return {"nchw": plain, "channels_last": [x.contiguous(memory_format=torch.channels_last) for x in plain]}


def depthwise_cases(device: str, images: int = IMAGES) -> Iterator[Case]:
    """One kernel against cuDNN, torch's own kernels and spectra: the map, and the gradient to the kernel."""
    shapes = [(c, s, (k, k)) for c, s, k in (*SQUARES, *CONVNEXT)]
    shapes += [(s.channels, s.side, size) for s in STAGES for size in ((s.long, s.short), (s.short, s.long))]
    for channels, side, (kh, kw) in shapes:
        for kind, dtype in DTYPES.items():
            weight = (torch.randn(channels, 1, kh, kw, device=device) / (kh * kw) ** 0.5).to(dtype)
            padding, pads = (kh // 2, kw // 2), [kh // 2, kh // 2, kw // 2, kw // 2]

            def own(x: Tensor, w: Tensor = weight, p: tuple[int, int] = padding) -> Tensor:
                return depthwise_conv(x, w, None, p)

            def peer(x: Tensor, w: Tensor = weight, p: tuple[int, int] = padding) -> Tensor:
                return F.conv2d(x, w, None, 1, p, 1, len(w))

            def own_weight(x: Tensor, g: Tensor, p: list[int] = pads) -> Tensor:
                return apply_weight([x], [g], p)[0]

            def peer_weight(x: Tensor, g: Tensor, w: Tensor = weight, p: tuple[int, int] = padding) -> Tensor:
                rest = (None, [1, 1], [*p], [1, 1], False, [0, 0], len(w), [False, True, False])
                return torch.ops.aten.convolution_backward(g, x, w, *rest)[1]

            xs = maps(channels, side, dtype, device, images)

            def check(xs: Maps = xs, w: Tensor = weight, own=own, own_weight=own_weight, peer=peer) -> None:
                x = xs["nchw"][0]
                truth = peer(x.double(), w.double())
                wide = w.double().requires_grad_()
                slope = torch.autograd.grad(peer(x.double(), wide), wide, truth)[0]
                for format_name in xs:
                    near(own(xs[format_name][0]), truth, x.dtype, f"depthwise_conv {format_name}")
                near(own_weight(x, truth.to(x.dtype)), slope, x.dtype, "the gradient to the kernel")

            name = f"{channels}@{side} {kh}x{kw} batch {images} {kind}"
            forward: dict[str, Callable[[], object]] = {"copy": Candidate(torch.clone, _each(xs["nchw"]))}
            backward: dict[str, Callable[[], object]] = {"copy": Candidate(torch.clone, _each(xs["nchw"]))}
            for format_name, some in xs.items():
                pairs = list(zip(some, reversed(some), strict=True))
                forward[f"depthwise_conv {format_name}"] = Candidate(own, _each(some))
                forward[f"torch {format_name}"] = Candidate(peer, _each(some))
                backward[f"depthwise_conv {format_name}"] = Candidate(own_weight, pairs)
                backward[f"torch {format_name}"] = Candidate(peer_weight, pairs)
            if dtype is torch.float32 and min(kh, kw) >= 31:
                spectra = lambda x, w=weight, p=pads: sum_by_fft([x], [w], None, p, False)  # noqa: E731
                forward["torch.fft"] = Candidate(spectra, _each(xs["nchw"]))
            yield Case(name, "forward", "copy", forward, check)
            yield Case(name, "weight", "copy", backward, lambda: None)


def cross_cases(device: str, images: int = IMAGES) -> Iterator[Case]:
    """The cross operator against three of torch's convolutions, summed, and in a training step."""
    for stage in STAGES:
        for kind, dtype in DTYPES.items():
            sizes = [(stage.long, stage.short), (stage.short, stage.long), (stage.short, stage.short)]
            weights = [
                (torch.randn(stage.channels, 1, *size, device=device) / (3 * size[0] * size[1]) ** 0.5).to(dtype)
                for size in sizes
            ]

            def own(x: Tensor, *w: Tensor) -> Tensor:
                return cross_conv(x, w[0], w[1], w[2])

            def peers(x: Tensor, *w: Tensor) -> list[Tensor]:
                return [F.conv2d(x, k, None, 1, (k.shape[2] // 2, k.shape[3] // 2), 1, len(k)) for k in w]

            def peer(x: Tensor, *w: Tensor) -> Tensor:
                a, b, c = peers(x, *w)
                return a + b + c

            def apart(x: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
                return cross_conv(x, w[0], w[1], w[2], summed=False)

            def step(function: Callable[..., Sequence[Tensor]], *leaves: Tensor) -> object:
                leaves = tuple(t.detach().requires_grad_() for t in leaves)
                y = function(*leaves)
                return torch.autograd.grad(y, leaves, [leaves[0].detach()] * 3)  # any map serves as a gradient

            xs = maps(stage.channels, stage.side, dtype, device, images)

            def check(xs: Maps = xs, weights: list[Tensor] = weights, own=own, apart=apart, peers=peers) -> None:
                x = xs["nchw"][0]
                truth = peers(x.double(), *(w.double() for w in weights))
                near(own(x, *weights), truth[0] + truth[1] + truth[2], x.dtype, "cross_conv")
                for y, expected in zip(apart(xs["channels_last"][0], *weights), truth, strict=True):
                    near(y, expected, x.dtype, "a branch of cross_conv")

            name = f"{stage.network} {stage.channels}@{stage.side} {stage.long}x{stage.short} batch {images} {kind}"
            forward: dict[str, Callable[[], object]] = {"copy": Candidate(torch.clone, _each(xs["nchw"]))}
            both: dict[str, Callable[[], object]] = {"copy": Candidate(torch.clone, _each(xs["nchw"]))}
            for format_name, some in xs.items():
                inputs = [(x, *weights) for x in some]
                forward[f"cross_conv {format_name}"] = Candidate(own, inputs)
                forward[f"torch {format_name}"] = Candidate(peer, inputs)
                both[f"cross_conv {format_name}"] = Candidate(lambda *t, f=apart, s=step: s(f, *t), inputs)
                both[f"torch {format_name}"] = Candidate(lambda *t, f=peers, s=step: s(f, *t), inputs)
            yield Case(name, "forward", "copy", forward, check)
            yield Case(name, "forward+backward", "copy", both, lambda: None)


def shiftwise_cases(device: str, images: int = IMAGES) -> Iterator[Case]:
    """Shift-wise convolution composed in weight space against the original formulation in torch's operators."""
    for stage in shiftwise.STAGES:
        for shifts in (1, 4):
            yield from shiftwise.directions(stage._replace(images=images), shifts, device, _graph)


def _graph(function: Callable[..., object], *arguments: Tensor) -> Candidate:
    return Candidate(function, [arguments])


def _each(some: list[Tensor]) -> list[tuple[Tensor, ...]]:
    return [(x,) for x in some]
