"""``shiftconv::active_shift`` and its backward on the GPU, see :mod:`shiftconv.ops.active_shift`.

Cells, fractions and weights are found in the kernel from the real offsets, so nothing waits for the GPU; channels whose
offsets are not finite or not below 2**31 either way become NaN. The backward reads the incoming gradient and the input
once and writes the gradient of the input on the way; programs leave partial sums for the gradient of the offsets, which
a second kernel adds in a fixed order.

The taps of a channel lie at any alignment, so they are loaded one number at a time, a warp's side by side. Threads that
own several neighbours would not load less often, only spread each of a warp's loads over more lines.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shiftconv.ops.sampling import PLAIN, empty_output, format_of
from shiftconv.ops.triton._gather import gather_kernel, weights
from shiftconv.ops.triton._sources import real_offset
from shiftconv.ops.triton._work import work

_CHANNELS = 16  # of a program that adds partial sums
_PARTS = 64  # partial sums that it reads at once


def active_shift(
    x: Tensor,
    offset: Tensor,
    mode: int,
    rounded: bool,
    derivative: int,
    transpose: bool,
    geometry: Sequence[int] = PLAIN,
) -> Tensor:
    """Same arguments and result as the raw operator."""
    y = empty_output(x, geometry, transpose)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_()
    rounded = rounded and derivative == 0
    x, offset = x.contiguous(memory_format=format_of(x)), offset.contiguous()
    plan = work(x, y, geometry, mode, transpose, 1 if rounded else 1 << (x.ndim - 2))
    flags = dict(plan.flags, ROUNDED=rounded, DERIVATIVE=derivative, CORRELATE=False)
    with torch.cuda.device_of(x):
        gather_kernel[(plan.programs,)](x, y, offset, x, y, *plan.sizes, **flags)
    return y


def active_shift_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mode: int, rounded: bool, geometry: Sequence[int] = PLAIN
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as the raw operator."""
    grad_x, grad_offset = empty_output(x), torch.empty_like(offset, memory_format=torch.contiguous_format)
    if grad.numel() == 0 or x.numel() == 0:
        return grad_x.zero_(), grad_offset.zero_()
    memory_format = format_of(x)
    x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
    offset = offset.contiguous()
    axes = offset.shape[1]
    plan = work(grad, grad_x, geometry, mode, True, 1 << axes)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty((plan.blocks, 1 << axes, x.shape[1]), dtype=kind, device=x.device)
    flags = dict(plan.flags, ROUNDED=rounded, DERIVATIVE=0, CORRELATE=True)
    second = dict(AXES=axes, ROWS=_PARTS, COLS=_CHANNELS, num_warps=4, enable_fp_fusion=True)
    groups = triton.cdiv(x.shape[1], _CHANNELS)
    with torch.cuda.device_of(x):
        gather_kernel[(plan.programs,)](grad, grad_x, offset, x, partial, *plan.sizes, **flags)
        offset_kernel[(groups,)](partial, offset, grad_offset, plan.blocks, x.shape[1], **second)
    return grad_x, grad_offset


@triton.jit(do_not_specialize=["blocks", "channels"])
def offset_kernel(
    partial,
    offset,
    grad_offset,
    blocks,
    channels,
    AXES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``grad_offset`` ``[C, AXES]`` from the correlations ``partial`` ``[blocks, 2**AXES, C]``, always in one order."""
    TAPS: tl.constexpr = 1 << AXES
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, None, :]
    tap = tl.arange(0, TAPS)[None, :, None]
    known = c < channels
    total = tl.zeros([ROWS, TAPS, COLS], dtype=tl.float64)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)[:, None, None]
        place = (row.to(tl.int64) * TAPS + tap) * channels + c
        total += tl.load(partial + place, mask=known & (row < blocks), other=0).to(tl.float64)
    total = tl.sum(total, 0, keep_dims=True)
    here = offset + c * AXES
    _, usable = real_offset(here, known)
    if AXES > 1:
        _, also = real_offset(here + 1, known)
        usable &= also
    if AXES > 2:
        _, also = real_offset(here + 2, known)
        usable &= also
    for axis in tl.static_range(AXES):
        weight = weights(here, known, tap, AXES, 1 << axis, False, tl.float64)
        change = tl.where(usable, tl.sum(total * weight, 1, keep_dims=True), float("nan"))
        tl.store(grad_offset + c * AXES + axis, change.to(grad_offset.dtype.element_ty), mask=known)
