"""``shiftconv::shift`` on the GPU: y = S x or y = S' x, see :mod:`shiftconv.ops.shift`.

Bits move, and only the transposes that fold a border back onto the image add. The bound is memory: neighbours are
written 128 bits at a time where rows allow it, and read so where a channel moves by a multiple of that along the rows.
Other moves cannot be read in vectors, as a vector must lie at a multiple of its size.
"""

# pyright: basic

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftconv.ops.sampling import CIRCULAR, PLAIN, ZEROS, empty_output, format_of
from shiftconv.ops.triton._gather import gather_kernel
from shiftconv.ops.triton._work import work

_MOVED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def shift(x: Tensor, offset: Tensor, mode: int, transpose: bool, geometry: Sequence[int] = PLAIN) -> Tensor:
    """Same arguments and result as the raw operator."""
    y = empty_output(x, geometry, transpose)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_()
    x = x.contiguous(memory_format=format_of(x))
    adds = transpose and mode != ZEROS and (mode != CIRCULAR or bool(geometry))
    parts = 2 if x.itemsize == 16 or (adds and x.is_complex()) else 1
    plan = work(x, y, geometry, mode, transpose, 1, parts)
    source, target = (torch.view_as_real(x), torch.view_as_real(y)) if parts == 2 else (x, y)
    if not adds:
        moved = _MOVED_AS[source.itemsize]
        source, target = source.view(moved), target.view(moved)
    offset = offset.contiguous()
    flags = dict(plan.flags, ROUNDED=False, DERIVATIVE=0, CORRELATE=False)
    with torch.cuda.device_of(x):
        gather_kernel[(plan.programs,)](source, target, offset, source, target, *plan.sizes, **flags)
    return y
