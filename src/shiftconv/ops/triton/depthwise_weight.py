"""The gradient of depthwise convolutions to their kernels on the GPU; see :mod:`shiftconv.ops.branches`.

On tensor cores the products of a row of inputs and a row of gradients, summed over images, hold the taps on their
diagonals; elsewhere it goes tap by tap. Sums are made in a fixed order, without atomic operations.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftconv.ops.sampling import format_of
from shiftconv.ops.triton import _depthwise_band, _depthwise_plain
from shiftconv.ops.triton._depthwise_work import span
from shiftconv.ops.triton.depthwise import precision_of


def depthwise_weight_direct(x: Sequence[Tensor], grad: Sequence[Tensor], padding: Sequence[int]) -> list[Tensor]:
    """Same arguments and results as the raw operator."""
    memory_format = format_of(x[0])
    maps = [m.contiguous(memory_format=memory_format) for m in x]
    grads = [g.contiguous(memory_format=memory_format) for g in grad]
    results: list[Tensor] = []
    for b in range(len(padding) // 4):
        m, g = maps[b % len(maps)], grads[b % len(grads)]
        top, bottom, left, right = padding[4 * b : 4 * b + 4]
        kh, kw = m.shape[2] + top + bottom - g.shape[2] + 1, m.shape[3] + left + right - g.shape[3] + 1
        result = m.new_zeros((m.shape[1], 1, kh, kw))
        results.append(result)
        rows, columns = span(m.shape[2], g.shape[2], kh, top), span(m.shape[3], g.shape[3], kw, left)
        reached = result[:, 0, rows.begin : rows.end, columns.begin : columns.end]
        if reached.numel() and m.numel() and g.numel():
            taps, before = (reached.shape[1], reached.shape[2]), (rows.before, columns.before)
            reached.copy_(_weigh(m, g, taps, before, memory_format))
    return results


def _weigh(
    x: Tensor, grad: Tensor, size: tuple[int, int], before: tuple[int, int], memory_format: torch.memory_format
) -> Tensor:
    """The gradient to a kernel of ``size`` that begins ``before`` its output, ``[C, kh, kw]`` in the dtype of sums."""
    precision = precision_of(x.dtype, max(size))
    if precision is None:
        return _depthwise_plain.weigh(x, grad, size, before, memory_format is torch.channels_last)
    return _depthwise_band.weigh(x.contiguous(), grad.contiguous(), size, before, precision)
