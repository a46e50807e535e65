"""Floor 2: modules over :mod:`shiftconv.ops`."""

from shiftconv.nn.shift import GroupShift1d, GroupShift2d, GroupShift3d

__all__ = ["GroupShift1d", "GroupShift2d", "GroupShift3d"]
