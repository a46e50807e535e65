"""Branches of a depthwise convolution as its Triton kernels see them."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INT32 = 2**30  # elements; below it indices, and sums of two, fit in 32 bits
BRANCHES = 3  # of a launch


class Branch(NamedTuple):
    """A kernel on a map: y[n, c, i, j] = sum over u, v of weight[c, u, v] * x[n, c, i + u - top, j + v - left].

    ``weight`` is ``[C, kh, kw]``; transposes have flipped kernels, so ``top`` and ``left`` may have any sign.
    """

    weight: Tensor
    top: int
    left: int


class Span(NamedTuple):
    """The taps ``begin <= t < end`` of an axis that some output reaches, the first of them ``before`` its output."""

    begin: int
    end: int
    before: int


def span(size: int, outputs: int, taps: int, before: int) -> Span:
    """The taps along an axis that matter for a map of ``size`` pixels when the first lies ``before`` its output."""
    begin = min(max(before - outputs + 1, 0), taps)
    return Span(begin, max(begin, min(taps, before + size)), before - begin)


def branch(x: Tensor, weight: Tensor, padding: Sequence[int], transpose: bool) -> tuple[Branch, tuple[int, int]]:
    """The branch of ``weight`` ``[C, 1, kh, kw]`` on ``x`` without taps that reach nothing, and its output size."""
    kernel = weight[:, 0].flip(1, 2) if transpose else weight[:, 0]
    sizes: list[int] = []
    spans: list[Span] = []
    for axis in range(2):
        before, after = padding[2 * axis : 2 * axis + 2]
        taps, size = kernel.shape[1 + axis], x.shape[2 + axis]
        if transpose:
            before, after = taps - 1 - before, taps - 1 - after
        sizes.append(size + before + after - taps + 1)
        spans.append(span(size, sizes[axis], taps, before))
    rows, columns = spans
    kernel = kernel[:, rows.begin : rows.end, columns.begin : columns.end].contiguous()
    return Branch(kernel, rows.before, columns.before), (sizes[0], sizes[1])


def is_long(*tensors: Tensor) -> bool:
    """Whether indices need 64 bits."""
    return max(t.numel() for t in tensors) >= INT32


def filled(values: Sequence[Tensor]) -> list[Tensor]:
    """As many as a launch takes; those too many are not looked at."""
    return [*values, *[values[-1]] * (BRANCHES - len(values))]


def summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
