"""The cross-shaped large kernel: a tall, a wide and a small depthwise kernel on one map, which is read once.

    y = tall * x + wide * x + small * x + bias

SLaK's decomposed kernels and both shift-wise convolutions are this operator. Training normalises the three maps
apart, so it can return them instead of their sum.

Sources: Liu et al., "More ConvNets in the 2020s", ICLR 2023, arXiv:2207.03620, section 3.2; Li et al., "ShiftwiseConv",
CVPR 2025, arXiv:2401.12736, whose shifted small kernels :mod:`shiftconv.ops.compose` turns into these three.
"""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from shiftconv.ops.branches import apply_each, apply_sum
from shiftconv.ops.depthwise import Sides, check_fit, prepare, sides_of


@overload
def cross_conv(
    x: Tensor,
    tall: Tensor,
    wide: Tensor,
    small: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Sequence[Sequence[Sequence[int]]] | None = None,
    summed: Literal[True] = True,
) -> Tensor: ...


@overload
def cross_conv(
    x: Tensor,
    tall: Tensor,
    wide: Tensor,
    small: Tensor | None = None,
    bias: None = None,
    padding: Sequence[Sequence[Sequence[int]]] | None = None,
    *,
    summed: Literal[False],
) -> tuple[Tensor, ...]: ...


def cross_conv(
    x: Tensor,
    tall: Tensor,
    wide: Tensor,
    small: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Sequence[Sequence[Sequence[int]]] | None = None,
    summed: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """Convolve ``x`` with two or three depthwise kernels at once.

    Args:
        x: ``[N, C, H, W]``, float64, float32, float16 or bfloat16, any strides.
        tall: ``[C, 1, kh, kw]`` in the dtype of ``x``; any sizes, but tall ones run fastest here.
        wide: ``[C, 1, kh, kw]``.
        small: ``[C, 1, kh, kw]``, or None.
        bias: ``[C]``, or None; goes with the sum.
        padding: per kernel ``((top, bottom), (left, right))`` in pixels, such that all results are of one size; by
            default ``((kh // 2, kh - 1 - kh // 2), (kw // 2, kw - 1 - kw // 2))``, which keeps the size of ``x``.
        summed: whether to add the results; else they come one by one, in the order of the kernels.

    Returns:
        ``[N, C, H', W']``, or a tuple of them, in the dtype and memory format of ``x``. Differentiable in all tensors,
        any order; 16-bit types are summed in float32 over all kernels and rounded once. Under autocast the tensors
        are cast as those of a convolution are.

    Raises:
        TypeError: an argument is no tensor, the dtypes differ or are not floating, or a size is no whole number.
        ValueError: shapes or devices that do not fit, a negative padding, a kernel that is larger than the padded x, or
            a bias without a sum.
    """
    if bias is not None and not summed:
        raise ValueError("bias goes with the sum of the branches, got one with summed=False")
    kernels = {"tall": tall, "wide": wide, **({} if small is None else {"small": small})}
    x, weights, bias = prepare("cross_conv", x, kernels, bias)
    if padding is not None and (not isinstance(padding, Sequence) or len(padding) != len(weights)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"padding must be one pair of pairs for each of {len(weights)} kernels, got {padding!r}")
    sides = _centred(weights) if padding is None else [sides_of(item, weights[0]) for item in padding]
    for name, weight, side in zip(kernels, weights, sides, strict=True):
        check_fit(x, name, weight, side)
    results = [
        tuple(sum(side[axis]) - w.shape[2 + axis] for axis in (0, 1)) for w, side in zip(weights, sides, strict=True)
    ]
    if any(result != results[0] for result in results):
        sizes = [[x.shape[2 + axis] + result[axis] + 1 for axis in (0, 1)] for result in results]
        raise ValueError(f"padding must give results of one size, got {sizes} for {', '.join(kernels)}")
    flat = [number for pair in sides for side in pair for number in side]
    return apply_sum([x], weights, bias, flat) if summed else apply_each(x, weights, flat)


def _centred(weights: Sequence[Tensor]) -> list[Sides]:
    """The padding of each kernel that keeps the size of the map, the larger half in front."""
    halves = [[(taps // 2, taps - 1 - taps // 2) for taps in weight.shape[2:]] for weight in weights]
    return [(height, width) for height, width in halves]
