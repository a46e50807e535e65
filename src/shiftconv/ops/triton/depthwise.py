"""The raw operators of depthwise convolution on the GPU; see :mod:`shiftconv.ops.branches` for what they compute.

================  =========================================================================================
16 bits, TF32     tensor cores: a row of outputs is a row of inputs times a band matrix made of a kernel row
float32           the same in three steps of TF32 for long kernels, tap by tap for short ones
float64           tap by tap
================  =========================================================================================
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftconv.ops.sampling import format_of
from shiftconv.ops.triton import _depthwise_band, _depthwise_plain
from shiftconv.ops.triton._depthwise_work import BRANCHES, Branch, branch, summed_in


def depthwise_sum_direct(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, padding: Sequence[int], transpose: bool
) -> Tensor:
    """Same arguments and result as the raw operator."""
    memory_format = format_of(x[0])
    maps = [m.contiguous(memory_format=memory_format) for m in x]
    branches: list[Branch] = []
    read: list[Tensor] = []
    size = 0, 0
    for b, kernel in enumerate(weight):
        source = maps[b % len(maps)]
        made, size = branch(source, kernel, padding[4 * b : 4 * b + 4], transpose)
        if made.weight.numel() and source.numel():
            branches.append(made)
            read.append(source)
    y = _empty(maps[0], size, memory_format, x[0].dtype)
    if y.numel() == 0 or not branches:
        y.zero_()
        return y if bias is None else y.add_(bias.view(-1, 1, 1))
    if len(branches) <= BRANCHES:
        _convolve(read, branches, bias, [y], memory_format)
        return y
    total: Tensor | None = None
    for b in range(0, len(branches), BRANCHES):
        part = _empty(y, size, memory_format, summed_in(y.dtype))
        _convolve(read[b : b + BRANCHES], branches[b : b + BRANCHES], None if b else bias, [part], memory_format)
        total = part if total is None else total.add_(part)
    assert total is not None
    return y.copy_(total)


def depthwise_each_direct(x: Tensor, weight: Sequence[Tensor], padding: Sequence[int], transpose: bool) -> list[Tensor]:
    """Same arguments and results as the raw operator."""
    memory_format = format_of(x)
    x = x.contiguous(memory_format=memory_format)
    made = [branch(x, kernel, padding[4 * b : 4 * b + 4], transpose) for b, kernel in enumerate(weight)]
    results = [_empty(x, size, memory_format, x.dtype) for _, size in made]
    left: list[int] = []
    for b, ((one, _), y) in enumerate(zip(made, results, strict=True)):
        if y.numel() == 0 or x.numel() == 0 or one.weight.numel() == 0:
            y.zero_()
        else:
            left.append(b)
    while left:  # those of one size go together
        alike = [b for b in left if made[b][1] == made[left[0]][1]][:BRANCHES]
        left = [b for b in left if b not in alike]
        _convolve([x], [made[b][0] for b in alike], None, [results[b] for b in alike], memory_format)
    return results


def _empty(x: Tensor, size: tuple[int, int], memory_format: torch.memory_format, dtype: torch.dtype) -> Tensor:
    return torch.empty((*x.shape[:2], *size), dtype=dtype, device=x.device, memory_format=memory_format)


def _convolve(
    x: Sequence[Tensor],
    branches: Sequence[Branch],
    bias: Tensor | None,
    y: Sequence[Tensor],
    memory_format: torch.memory_format,
) -> None:
    """Write the branches to ``y``, or their sum if there is one ``y``; at most three branches."""
    last = memory_format is torch.channels_last
    longest = max(max(b.weight.shape[1:]) for b in branches)
    precision = precision_of(x[0].dtype, longest)
    if precision is None:
        _depthwise_plain.convolve(x, branches, bias, y, last)
    elif last:  # a band needs pixels side by side
        planes = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in y]
        _depthwise_band.convolve([m.contiguous() for m in x], branches, bias, planes, precision)
        for to, plane in zip(y, planes, strict=True):
            to.copy_(plane)
    else:
        _depthwise_band.convolve(x, branches, bias, y, precision)


def precision_of(dtype: torch.dtype, longest: int) -> str | None:
    """How tensor cores multiply for a kernel of this length, or None where tap by tap is the better way.

    float32 is multiplied in full unless TF32 was asked for by the setting of matrix products: that of convolutions
    allows it by default, but torch's depthwise kernels do not make use of it.
    """
    if dtype == torch.float32:
        if longest < _LONG:
            return None
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return None if dtype == torch.float64 or longest < _SHORT else "tf32"  # which 16-bit types do not look at


_LONG = 7  # taps; from here on three products on tensor cores take less time than taps in float32, by count
_SHORT = 4  # and in 16 bits
