"""Shift feature maps and add groups of them: shift-wise convolution in activation space.

    y[n, g, p] = sum over r, k of coefficient[r, c] * x[n, c, p - offset[r, c]]        c = g * K + k

Behind a convolution :func:`shiftconv.ops.compose` reaches the same with one large kernel, many times faster; this is
its reference, and serves maps that come from elsewhere.

Sources: Li et al., "ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect", CVPR 2025, arXiv:2401.12736;
its operators AddShift and AddShift_mp, with learned coefficients (``linear``) and a table of positions (``em``).
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false

import torch
from torch import Tensor

from shiftconv.ops.sampling import Crop, format_of
from shiftconv.ops.shift import shift


def shift_sum(
    x: Tensor,
    offset: Tensor,
    groups: int,
    coefficient: Tensor | None = None,
    constant: Tensor | None = None,
    crop: Crop | None = None,
) -> Tensor:
    """Shift each channel of ``x`` by whole pixels, in ``R`` ways, and add what belongs to one group.

    Args:
        x: ``[N, groups * K, *S]``, one to three spatial axes, any real or complex dtype, any strides. Channels of one
            group lie together.
        offset: integers ``[R, groups * K, D]`` in pixels, positive ones move the map towards larger indices, or
            ``[groups * K, D]`` for ``R = 1``. What moves beyond the map adds nothing.
        groups: the number of output channels.
        coefficient: ``[R, groups * K]``, or None for 1.
        constant: ``[R, groups * K]``, added to a shifted map wherever one of its pixels lands, or None.
        crop: per spatial axis the pixels that the output lacks on its lower and upper side, as in
            :func:`shiftconv.ops.shift`; negative ones extend it.

    Returns:
        ``[N, groups, *S]``, less the crop, in the dtype and memory format of ``x``; 16-bit types are summed in float32
        and rounded once. Differentiable in all but the offsets, any order. One shifted map of ``groups`` channels is
        held at a time.

    Raises:
        TypeError: an argument is no tensor, or offsets are no integers.
        ValueError: shapes or devices that do not fit.
    """
    offset = _check(x, offset, groups, coefficient, constant)
    ways, channels = offset.shape[:2]
    filters = channels // groups
    half = x.is_floating_point() and x.itemsize <= 2
    y = None
    for k in range(filters):
        part = x[:, k::filters].float() if half else x[:, k::filters]
        for r in range(ways):
            term = _affine(part, coefficient, constant, (r, slice(k, None, filters)))
            term = shift(term, offset[r, k::filters].contiguous(), crop=crop)
            y = term if y is None else y + term
    if y is None:
        y = shift(x[:, :0].new_zeros(x.shape[0], groups, *x.shape[2:]), offset.new_zeros(groups, x.ndim - 2), crop=crop)
    return y.to(x.dtype).contiguous(memory_format=format_of(x))


def _affine(part: Tensor, coefficient: Tensor | None, constant: Tensor | None, index: tuple[int, slice]) -> Tensor:
    """``coefficient * part + constant`` of one way: what shift fills with zeros has neither."""
    shape = (-1, *(1,) * (part.ndim - 2))
    if coefficient is not None:
        part = part * coefficient[index].to(part.dtype).view(shape)
    return part if constant is None else part + constant[index].to(part.dtype).view(shape)


def _check(x: Tensor, offset: Tensor, groups: int, coefficient: Tensor | None, constant: Tensor | None) -> Tensor:
    """The offsets as ``[R, C, D]``, after all that is demanded of the arguments beyond what shift does."""
    if not (isinstance(x, Tensor) and isinstance(offset, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        came = f"{type(x).__name__} and {type(offset).__name__}"
        raise TypeError(f"shift_sum takes two tensors, x [N, C, *S] and offset [R, C, D], got {came}")
    if not isinstance(groups, int | torch.SymInt) or isinstance(groups, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"groups must be a whole number, got {groups!r}")
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"shift_sum takes x [N, C, *S] with one to three spatial axes, got {[*x.shape]}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    whole = offset if offset.ndim == 3 else offset.unsqueeze(0)
    if whole.ndim != 3 or whole.shape[1:] != (channels, x.ndim - 2):
        raise ValueError(f"offset must be [R, {channels}, {x.ndim - 2}] for x {[*x.shape]}, got {[*offset.shape]}")
    for name, table in (("coefficient", coefficient), ("constant", constant)):
        if table is None:
            continue
        if not isinstance(table, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name} must be a tensor [R, C] or None, got {type(table).__name__}")
        if (table.is_floating_point() and not x.is_floating_point() and not x.is_complex()) or (
            table.is_complex() and not x.is_complex()
        ):
            raise TypeError(f"{name} must be of a dtype that x, {x.dtype}, can hold; got {table.dtype}")
        if table.shape != whole.shape[:2] or table.device != x.device:
            expected = f"{[*whole.shape[:2]]} on {x.device}"
            raise ValueError(f"{name} must be [R, C] = {expected}, got {[*table.shape]} on {table.device}")
    return whole
