"""Floor 1: functions on tensors, one file per operator; :mod:`shiftconv.ops.backend` picks the kernel that runs."""

from shiftconv.ops.shift import PaddingMode, shift

__all__ = ["PaddingMode", "shift"]
