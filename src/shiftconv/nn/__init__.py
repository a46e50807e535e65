"""Floor 2: modules over :mod:`shiftconv.ops`."""

from shiftconv.nn.arrangement import ShiftwiseVariant
from shiftconv.nn.dilated import DilatedReparamConv2d
from shiftconv.nn.emulate import emulate_depthwise
from shiftconv.nn.fold import PartialShift1d, PartialShift2d, PartialShift3d, fold_shift, fold_shifts
from shiftconv.nn.large_kernel import LargeKernelConv2d
from shiftconv.nn.learned_shift import (
    ActiveShift1d,
    ActiveShift2d,
    ActiveShift3d,
    SparseShift1d,
    SparseShift2d,
    SparseShift3d,
)
from shiftconv.nn.offsets import (
    FreezeOffsets,
    freeze_offsets,
    lattice_penalty,
    normalize_offset_gradients,
    offset_groups,
    offset_parameters,
    offset_penalty,
)
from shiftconv.nn.presets import AxialShift2d, FourConnectedShift2d, SpatialShift2d
from shiftconv.nn.shift import GroupShift1d, GroupShift2d, GroupShift3d, Shift1d, Shift2d, Shift3d
from shiftconv.nn.shift_linear import ShiftLinear
from shiftconv.nn.shiftwise import ShiftwiseConv2d
from shiftconv.nn.temporal import OnlineTemporalShift, TemporalShift

__all__ = [
    "ActiveShift1d",
    "ActiveShift2d",
    "ActiveShift3d",
    "AxialShift2d",
    "DilatedReparamConv2d",
    "FourConnectedShift2d",
    "FreezeOffsets",
    "GroupShift1d",
    "GroupShift2d",
    "GroupShift3d",
    "LargeKernelConv2d",
    "OnlineTemporalShift",
    "PartialShift1d",
    "PartialShift2d",
    "PartialShift3d",
    "Shift1d",
    "Shift2d",
    "Shift3d",
    "ShiftLinear",
    "ShiftwiseConv2d",
    "ShiftwiseVariant",
    "SparseShift1d",
    "SparseShift2d",
    "SparseShift3d",
    "SpatialShift2d",
    "TemporalShift",
    "emulate_depthwise",
    "fold_shift",
    "fold_shifts",
    "freeze_offsets",
    "lattice_penalty",
    "normalize_offset_gradients",
    "offset_groups",
    "offset_parameters",
    "offset_penalty",
]
