"""Shift-wise convolution of the stages of SW-T: composed kernels against the original formulation.

The original convolves each channel with ``S`` small kernels and adds their maps, each shifted to its slot, once for
every random arrangement. Its operator for that is CUDA only, so here it is torch's: a convolution, then slices that are
added, which write the same maps; its backward pass is written by hand, as autograd's of slices and indices would take
four times as long. Normalisations are left out of both. ``4 shifts`` are SW-T's. Cases named ``shifts`` compare our own
operator with 1 to 4 of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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


class ShiftAdd(torch.autograd.Function):
    """Maps of the small kernels ``[N, C * S, H + s - 1, W + s - 1]`` to the tall, the wide and the small branch.

    ``tall`` and ``wide`` ``[R, S, C]`` name the map that each arrangement has in each slot, ``picks`` ``[R, C]`` that
    of the small branch. Nothing is kept for the backward pass, and all maps of an arrangement are gathered at once.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, maps: Tensor, tall: Tensor, wide: Tensor, picks: Tensor, kernel: int, small: int
    ) -> tuple[Tensor, ...]:
        ctx.tables, ctx.sizes, ctx.shape = (tall, wide, picks), (kernel, small), maps.shape
        height, width = (size - small + 1 for size in maps.shape[2:])
        middle = slice(small // 2, small // 2 + height), slice(small // 2, small // 2 + width)
        out = [maps.new_zeros(len(maps), tall.shape[2], height, width) for _ in range(3)]
        for r in range(len(tall)):
            parts = maps.index_select(1, tall[r].flatten()).split(tall.shape[2], 1)
            for slot, to, of in _spans(len(parts), kernel, small, height):
                out[0][:, :, to] += parts[slot][:, :, of, middle[1]]
            parts = maps.index_select(1, wide[r].flatten()).split(tall.shape[2], 1)
            for slot, to, of in _spans(len(parts), kernel, small, width):
                out[1][:, :, :, to] += parts[slot][:, :, middle[0], of]
            out[2] += maps.index_select(1, picks[r])[:, :, middle[0], middle[1]]
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tall, wide, picks), (kernel, small) = ctx.tables, ctx.sizes
        height, width = grads[0].shape[2:]
        middle = slice(small // 2, small // 2 + height), slice(small // 2, small // 2 + width)
        total = grads[0].new_zeros(ctx.shape)
        for r in range(len(tall)):
            moved = torch.zeros_like(total)
            parts = moved.split(tall.shape[2], 1)
            for slot, to, of in _spans(len(parts), kernel, small, height):
                parts[slot][:, :, of, middle[1]] = grads[0][:, :, to]
            total += moved.index_select(1, tall[r].flatten().argsort())
            moved = torch.zeros_like(total)
            parts = moved.split(tall.shape[2], 1)
            for slot, to, of in _spans(len(parts), kernel, small, width):
                parts[slot][:, :, middle[0], of] = grads[1][:, :, :, to]
            total += moved.index_select(1, wide[r].flatten().argsort())
            total[:, :, middle[0], middle[1]].index_add_(1, picks[r], grads[2])
        return total, None, None, None, None, None


def _spans(slots: int, kernel: int, small: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Each slot that reaches the map, the pixels of the output along the axis, and those of the slot's map."""
    for slot in range(slots):
        first = slot * small + small - 1 - kernel // 2  # the pixel of the map that meets output pixel 0
        start, stop = max(first, 0), min(first + size, size + small - 1)
        if start < stop:
            yield slot, slice(start - first, stop - first), slice(start, stop)


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

    # From the slot of each small kernel to the map in each slot of each arrangement, [R, S, C].
    first = torch.arange(stage.channels, device=device) * slots
    tall, wide = (layer.get_buffer(f"{name}_slots").argsort(1).permute(2, 1, 0) + first for name in ("tall", "wide"))
    picks = (layer.get_buffer("small_slots") == 0).to(torch.int64).argmax(1).t() + first

    def original(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        maps = F.conv2d(x, weight, padding=stage.small - 1, groups=stage.channels)
        return ShiftAdd.apply(maps, tall, wide, picks, stage.kernel, stage.small)  # pyright: ignore[reportReturnType]

    return own, original
