"""What the raw operators cost, for torch's own counter of operations: twice the multiply-accumulates.

As torch does for convolutions, taps that lie on the padding count like all others.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import shiftconv.ops.branches  # pyright: ignore[reportUnusedImport]  # defines operators, as the next one does
import shiftconv.ops.shift_linear  # noqa: F401  # pyright: ignore[reportUnusedImport]

Shape = Sequence[int]

_ops = torch.ops.shiftconv


@register_flop_formula(_ops.shift_linear)
def _shift_linear(x: Shape, offset: Shape, weight: Shape, *rest: Any, out_shape: Shape, **options: Any) -> int:  # pyright: ignore[reportUnusedFunction]
    return 2 * math.prod(out_shape) * weight[1]


@register_flop_formula(_ops.depthwise_sum)
def _depthwise_sum(x: Any, weight: Sequence[Shape], *rest: Any, out_shape: Shape, **options: Any) -> int:  # pyright: ignore[reportUnusedFunction]
    # The adjoint of a map costs what the map does: one operation for each pixel of what the plain one gives and tap.
    pixels = math.prod(x[0] if rest[2] else out_shape)
    return 2 * pixels * sum(math.prod(kernel[2:]) for kernel in weight)


@register_flop_formula(_ops.depthwise_each)
def _depthwise_each(x: Shape, weight: Sequence[Shape], *rest: Any, out_shape: Sequence[Shape], **options: Any) -> int:  # pyright: ignore[reportUnusedFunction]
    maps = [x] * len(weight) if rest[1] else out_shape
    return 2 * sum(math.prod(y) * math.prod(kernel[2:]) for y, kernel in zip(maps, weight, strict=True))


@register_flop_formula(_ops.depthwise_weight)
def _depthwise_weight(x: Any, grad: Sequence[Shape], *rest: Any, out_shape: Sequence[Shape], **options: Any) -> int:  # pyright: ignore[reportUnusedFunction]
    maps = [grad[b % len(grad)] for b in range(len(out_shape))]
    return 2 * sum(math.prod(y) * math.prod(kernel[2:]) for y, kernel in zip(maps, out_shape, strict=True))
