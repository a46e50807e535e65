"""Floor 1: functions on tensors, one file per operator; :mod:`shiftconv.ops.backend` picks the kernel that runs."""

from shiftconv.ops import flops as _flops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers formulas
from shiftconv.ops.active_shift import active_shift, sparse_shift
from shiftconv.ops.compose import compose, composed_padding, placements
from shiftconv.ops.cross_conv import cross_conv
from shiftconv.ops.depthwise import depthwise_conv
from shiftconv.ops.sampling import PaddingMode
from shiftconv.ops.shift import shift, shift_
from shiftconv.ops.shift_linear import shift_linear
from shiftconv.ops.shift_sum import shift_sum

__all__ = [
    "PaddingMode",
    "active_shift",
    "compose",
    "composed_padding",
    "cross_conv",
    "depthwise_conv",
    "placements",
    "shift",
    "shift_",
    "shift_linear",
    "shift_sum",
    "sparse_shift",
]
