"""Floor 1: functions on tensors, one file per operator; :mod:`shiftconv.ops.backend` picks the kernel that runs."""

from shiftconv.ops.active_shift import active_shift, sparse_shift
from shiftconv.ops.sampling import PaddingMode
from shiftconv.ops.shift import shift, shift_
from shiftconv.ops.shift_linear import shift_linear

__all__ = ["PaddingMode", "active_shift", "shift", "shift_", "shift_linear", "sparse_shift"]
