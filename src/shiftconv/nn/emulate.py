"""A shift in the place of a depthwise convolution: the same output positions, looking as far."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import nn

from shiftconv.names import unknown
from shiftconv.nn import learned_shift as learned
from shiftconv.nn.arguments import Range
from shiftconv.nn.base import ShiftModule
from shiftconv.nn.convs import Conv, check_conv
from shiftconv.nn.shift import GroupShift1d, GroupShift2d, GroupShift3d
from shiftconv.ops import PaddingMode

Kind = Literal["sparse", "active", "group"]

_GROUPED = {1: GroupShift1d, 2: GroupShift2d, 3: GroupShift3d}
_LEARNED = {
    "sparse": {1: learned.SparseShift1d, 2: learned.SparseShift2d, 3: learned.SparseShift3d},
    "active": {1: learned.ActiveShift1d, 2: learned.ActiveShift2d, 3: learned.ActiveShift3d},
}


def emulate_depthwise(
    conv: nn.Module,
    kind: Kind = "sparse",
    normalize_gradient: bool = False,
    generator: torch.Generator | None = None,
) -> ShiftModule:
    """Build a shift that can stand in for a depthwise convolution, for maps of any size.

    Its outputs are as many and lie at the same places: one whose offset is that of a tap of the kernel is the
    convolution with a kernel that is 1 at this tap and 0 elsewhere, for every padding (also one that enlarges the map,
    ``same`` and ``valid``), stride, dilation and padding mode. Weight and bias of the convolution are not used.

    A stride samples the shifted map, as the convolution does. The original (ActiveSparseShifts-PyTorch, ``emulate_dw``)
    takes the mean of ``stride ** D`` positions instead, which no kernel with one tap does: that blurs the map and
    computes what it throws away. It also ignores the padding mode and the dilation, and never enlarges the map.

    Args:
        conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with as many groups and outputs as inputs.
        kind: ``sparse`` and ``active`` start with offsets drawn uniformly from the reach of the kernel; where a kernel
            has no tap in its middle, the range goes one pixel further to larger reading positions. ``group`` gives
            channel ``c`` the tap ``c % K``, as :class:`GroupShift2d`.
        normalize_gradient: of the learned kinds, as in :class:`SparseShift2d`.
        generator: of the learned kinds, as there.

    Returns:
        A shift of the rank of ``conv`` on its device, in its training mode.

    Raises:
        TypeError: ``conv`` is none of these, or a class of its own that may compute something else.
        ValueError: ``conv`` is not depthwise, or the kind is unknown.
    """
    plain, ndim = check_conv(conv)
    if kind not in get_args(Kind):
        raise unknown("kind", kind, get_args(Kind))
    channels = plain.in_channels
    if not plain.groups == channels == plain.out_channels:
        came = f"{channels} inputs, {plain.out_channels} outputs and {plain.groups} groups"
        raise ValueError(f"only a depthwise convolution with one output per input can be a shift, got {came}")
    mode = cast("PaddingMode", plain.padding_mode)
    sizes = [*zip(plain.dilation, plain.kernel_size, strict=True)]
    if kind == "group":
        crop = _crop(plain, [d * (k // 2) for d, k in sizes])
        shift = _GROUPED[ndim](channels, plain.kernel_size, plain.dilation, "interleaved", mode, crop, plain.stride)
    else:
        middle = [d * (k - 1) // 2 for d, k in sizes]
        reach: list[Range] = [(m - d * (k - 1), m) for m, (d, k) in zip(middle, sizes, strict=True)]
        crop = _crop(plain, middle)
        make = _LEARNED[kind][ndim]
        shift = make(channels, reach, mode, crop, plain.stride, "uniform", normalize_gradient, generator)
    dtype = torch.promote_types(plain.weight.dtype, torch.float32)  # a 16-bit offset would hardly learn
    return shift.to(plain.weight.device, dtype).train(plain.training)


def _crop(conv: Conv, middle: Sequence[int]) -> list[tuple[int, int]]:
    """The window of the convolution, of which the tap ``middle``, in pixels from the first one, has offset zero."""
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":  # torch puts the odd pixel behind
        pads = [(span // 2, span - span // 2) for span in spans]
    elif conv.padding == "valid":
        pads = [(0, 0)] * len(spans)
    else:
        pads = [(int(pad), int(pad)) for pad in conv.padding]
    return [(at - lower, span - at - upper) for at, span, (lower, upper) in zip(middle, spans, pads, strict=True)]
