"""Shift-wise convolution of the stages of SW-T: composed kernels against the original formulation.

The original convolves each channel with ``S`` small kernels and adds their maps, each shifted to its slot, once for
every random arrangement. Its operator for that is CUDA only, so here it is torch's: a convolution, then slices that are
added, which write the same maps. Normalisations are left out of both. ``4 shifts`` are SW-T's. Cases named ``shifts``
compare our own operator with 1 to 4 of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from shiftconv.nn import ShiftwiseConv2d
from shiftconv.ops import compose, cross_conv
from shiftconv.ops.compose import composed_padding

BASELINE = "original formulation"
Candidates = dict[str, Callable[[], object]]
Bind = Callable[..., Callable[[], object]]


class Stage(NamedTuple):
    images: int
    channels: int
    side: int
    kernel: int
    small: int = 3

    def __str__(self) -> str:
        return f"shiftwise_tiny {self.channels}@{self.side} {self.kernel}/{self.small} batch {self.images}"


STAGES = [Stage(2, 60, 56, 51), Stage(4, 122, 28, 49), Stage(8, 246, 14, 47), Stage(16, 492, 7, 13)]


def cases(device: str) -> Iterator[Case]:
    for stage in STAGES:
        for shifts in (1, 4):
            yield from directions(stage, shifts, device)
        yield from by_shifts(stage, device)


def directions(stage: Stage, shifts: int, device: str, bind: Bind = partial) -> Iterator[Case]:
    """Both directions; ``bind`` makes a candidate of a function and its arguments."""
    own, original = functions(stage, shifts, device)
    x = torch.randn(stage.images, stage.channels, stage.side, stage.side, device=device)
    weight = torch.randn(stage.channels * _slots(stage), 1, stage.small, stage.small, device=device) / 10
    grads = [torch.randn_like(x) for _ in range(3)]

    def check() -> None:
        for ours, theirs in zip(own(x.double(), weight.double()), original(x.double(), weight.double()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]

    def step(function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, weight: Tensor) -> object:
        return torch.autograd.grad(function(x, weight), (x, weight), grads)

    name = f"{stage} {shifts} shifts float32"
    candidates = {BASELINE: original, "shiftwise": own}
    yield Case(name, "forward", BASELINE, {k: bind(f, x, weight) for k, f in candidates.items()}, check)
    both = {k: bind(partial(step, f), *leaves) for k, f in candidates.items()}
    yield Case(name, "forward+backward", BASELINE, both, check)


def by_shifts(stage: Stage, device: str) -> Iterator[Case]:
    """Our operator alone; ``1 again`` tells how much of a difference is noise."""
    x = torch.randn(stage.images, stage.channels, stage.side, stage.side, device=device)
    weight = torch.randn(stage.channels * _slots(stage), 1, stage.small, stage.small, device=device)
    grads = [torch.randn_like(x) for _ in range(3)]
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    named = {"1": 1, "2": 2, "3": 3, "4": 4, "1 again": 1}
    owns = {name: functions(stage, shifts, device)[0] for name, shifts in named.items()}
    forward: Candidates = {name: partial(own, x, weight) for name, own in owns.items()}
    both: Candidates = {
        name: lambda f=own: torch.autograd.grad(f(*leaves), leaves, grads) for name, own in owns.items()
    }
    yield Case(f"{stage} shifts float32", "forward", "1", forward, lambda: None)
    yield Case(f"{stage} shifts float32", "forward+backward", "1", both, lambda: None)


def _slots(stage: Stage) -> int:
    return -(-stage.kernel // stage.small)


def functions(
    stage: Stage, shifts: int, device: str
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, ...]], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Both formulations, of a map and the small kernels to the tall, the wide and the small branch."""
    layer = ShiftwiseConv2d(stage.channels, stage.kernel, stage.small, num_shifts=shifts).to(device)
    slots = _slots(stage)
    padding = composed_padding(stage.kernel, stage.small)
    grids = [(slots, 1), (1, slots), (1, 1)]

    def own(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        tall, wide, small = compose(weight, layer.placement, grids)
        return cross_conv(x, tall, wide, small, padding=padding, summed=False)

    # The filter in each slot of each arrangement, [R, S, C].
    tall, wide = (layer.get_buffer(f"{name}_slots").argsort(1).permute(2, 1, 0) for name in ("tall", "wide"))
    picks = (layer.get_buffer("small_slots") == 0).to(torch.int64).argmax(1).t()
    rows = torch.arange(stage.channels, device=device)
    reach, before = stage.small - 1, stage.small // 2
    size = stage.side

    def original(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        maps = F.conv2d(x, weight, padding=reach, groups=stage.channels).unflatten(1, (stage.channels, slots))
        middle = slice(before, before + size)
        out = [x.new_zeros(x.shape) for _ in range(3)]
        for r in range(shifts):
            for slot in range(slots):
                first = slot * stage.small + reach - stage.kernel // 2  # the row of the maps that meets output row 0
                start, stop = max(first, 0), min(first + size, size + reach)
                if start >= stop:
                    continue
                to = slice(start - first, stop - first)
                out[0][:, :, to] += maps[:, rows, tall[r, slot]][:, :, start:stop, middle]
                out[1][:, :, :, to] += maps[:, rows, wide[r, slot]][:, :, middle, start:stop]
            out[2] += maps[:, rows, picks[r]][:, :, middle, middle]
        return tuple(out)

    return own, original
