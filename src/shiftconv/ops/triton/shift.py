"""``shiftconv::shift`` on the GPU: y = S x or y = S' x, see :mod:`shiftconv.ops.shift`.

Every output element gathers what it reads, in the transpose too, so there are no atomics and results are the same in
every run. Along an axis S' gathers at most two sources; under ``replicate`` the pixels at the two ends gather a range.
"""

# Tensors inside a kernel are triton's own, which has no types for them.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# ruff: noqa: SIM109 (kernels know no sets of constants)

import torch
import triton
import triton.language as tl
from torch import Tensor

ZEROS, REPLICATE, CIRCULAR, REFLECT, SYMMETRIC = (tl.constexpr(mode) for mode in range(5))  # ops.shift.MODES

BLOCK = 1024
_MOVED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_INT32_LIMIT = 2**31 - 2 * BLOCK


def shift(x: Tensor, offset: Tensor, mode: int, transpose: bool) -> Tensor:
    """Same arguments and result as the raw operator."""
    from shiftconv.ops.shift import empty_output

    y = empty_output(x)
    if x.numel() == 0:
        return y
    x = torch.empty_like(y).copy_(x) if x.stride() != y.stride() else x
    last = not x.is_contiguous()
    folds = transpose and mode in (REPLICATE.value, REFLECT.value, SYMMETRIC.value)
    parts = x.itemsize // 8 if x.itemsize == 16 else 1
    source, target = x, y
    if folds:
        if x.is_complex():
            source, target, parts = torch.view_as_real(x), torch.view_as_real(y), 2
    else:
        if x.itemsize == 16:
            source, target = torch.view_as_real(x), torch.view_as_real(y)
        moved = _MOVED_AS[x.itemsize]
        source, target = source.view(moved), target.view(moved)
    size = [1] * (5 - x.ndim) + [*x.shape[2:]]
    numel = x.numel() * parts
    grid = (triton.cdiv(numel, BLOCK),)
    shift_kernel[grid](
        source,
        target,
        offset.contiguous(),
        numel,
        x.shape[1],
        *size,
        PARTS=parts,
        AXES=x.ndim - 2,
        MODE=mode,
        TRANSPOSE=transpose,
        LAST=last,
        LONG=numel > _INT32_LIMIT,
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # the kernel has no products; unset, newer Triton warns of a changing default
    )
    return y


@triton.jit
def shift_kernel(
    x,
    y,
    offset,
    numel,
    channels,
    depth,
    height,
    width,
    PARTS: tl.constexpr,
    AXES: tl.constexpr,
    MODE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One output element per lane; ``PARTS`` real numbers in each (complex), ``LAST`` for channels last."""
    lane = tl.program_id(0)
    if LONG:
        lane = lane.to(tl.int64)
    lane = lane * BLOCK + tl.arange(0, BLOCK)
    valid = lane < numel
    part = lane % PARTS
    at = lane // PARTS
    if LAST:
        c = at % channels
        at = at // channels
        w = at % width
        at = at // width
        h = at % height
        at = at // height
        d = at % depth
        n = at // depth
    else:
        w = at % width
        at = at // width
        h = at % height
        at = at // height
        d = at % depth
        at = at // depth
        c = at % channels
        n = at // channels

    # The first source on each axis, how many follow it, and the second one (with replicate they follow in a row).
    d0, d_count, d1 = sources(d, offset + c * AXES, depth, valid, AXES > 2, MODE, TRANSPOSE)
    h0, h_count, h1 = sources(h, offset + c * AXES + (AXES - 2), height, valid, AXES > 1, MODE, TRANSPOSE)
    w0, w_count, w1 = sources(w, offset + c * AXES + (AXES - 1), width, valid, True, MODE, TRANSPOSE)
    if LAST:
        base = n * depth * height * width * channels + c
        step = channels
    else:
        base = (n * channels + c) * depth * height * width
        step = 1

    FOLDS: tl.constexpr = TRANSPOSE and (MODE == REPLICATE or MODE == REFLECT or MODE == SYMMETRIC)
    if FOLDS:
        kind: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        total = tl.zeros([BLOCK], dtype=kind)
        d_most = tl.max(tl.where(valid, d_count, 0), 0)
        h_most = tl.max(tl.where(valid, h_count, 0), 0)
        w_most = tl.max(tl.where(valid, w_count, 0), 0)
        for i in range(d_most):
            ds = source_at(i, d0, d1, MODE)
            for j in range(h_most):
                hs = source_at(j, h0, h1, MODE)
                for k in range(w_most):
                    ws = source_at(k, w0, w1, MODE)
                    reads = valid & (i < d_count) & (j < h_count) & (k < w_count)
                    from_ = base + ((ds * height + hs) * width + ws) * step
                    total += tl.load(x + from_ * PARTS + part, mask=reads, other=0).to(kind)
        tl.store(y + lane, total.to(y.dtype.element_ty), mask=valid)
    else:
        reads = valid & (d_count > 0) & (h_count > 0) & (w_count > 0)
        from_ = base + ((d0 * height + h0) * width + w0) * step
        tl.store(y + lane, tl.load(x + from_ * PARTS + part, mask=reads, other=0), mask=valid)


@triton.jit
def source_at(i, first, second, MODE: tl.constexpr):
    """Source number ``i`` of an axis."""
    if MODE == REPLICATE:
        return first + i
    return tl.where(i == 0, first, second)


@triton.jit
def sources(p, offset, size, valid, PRESENT: tl.constexpr, MODE: tl.constexpr, TRANSPOSE: tl.constexpr):
    """What position ``p`` of an axis reads: the first source, how many there are, the second one."""
    if not PRESENT:
        return p, p * 0 + 1, p
    o = normal(tl.load(offset, mask=valid, other=0), size, MODE).to(p.dtype)
    one = p * 0 + 1
    if not TRANSPOSE or MODE == CIRCULAR or MODE == ZEROS:
        if TRANSPOSE:
            o = -o
        at = p - o
        inside = (at >= 0) & (at < size)
        if MODE == ZEROS:
            return at, tl.where(inside, one, 0), at
        if MODE == REPLICATE:
            at = tl.minimum(tl.maximum(at, 0), size - 1)
        elif MODE == CIRCULAR:
            at = tl.where(at < 0, at + size, tl.where(at >= size, at - size, at))
        elif MODE == REFLECT:
            at = tl.where(at < 0, -at, tl.where(at >= size, 2 * (size - 1) - at, at))
        else:
            at = tl.where(at < 0, -1 - at, tl.where(at >= size, 2 * size - 1 - at, at))
        return at, one, at
    # S' at p: all q with p as the source of q. The direct one is p + o, the folded one a mirror image of it.
    direct = p + o
    if MODE == REPLICATE:
        # Positions whose source falls off an end read the pixel there: [0, o] the first, [size - 1 + o, size) the last.
        low = tl.where(p == 0, 0, direct)
        high = tl.where(p == size - 1, size - 1, direct)
        low = tl.maximum(low, 0)
        high = tl.minimum(high, size - 1)
        return low, tl.maximum(high - low + 1, 0), low
    if MODE == REFLECT:
        mirrored = tl.where(o > 0, o - p, 2 * (size - 1) - p + o)
        folds = tl.where(o > 0, (p > 0) & (p <= o), (p < size - 1) & (p >= size - 1 + o))
    else:
        mirrored = tl.where(o > 0, o - 1 - p, 2 * size - 1 - p + o)
        folds = tl.where(o > 0, p < o, p >= size + o)
    folds = folds & (mirrored >= 0) & (mirrored < size)
    is_direct = (direct >= 0) & (direct < size)
    first = tl.where(is_direct, direct, mirrored)
    return first, is_direct.to(p.dtype) + folds.to(p.dtype), mirrored


@triton.jit
def normal(o, size, MODE: tl.constexpr):
    """The smallest offset that does the same; at most ``size`` either way, so that one fold finds every source."""
    if MODE == ZEROS or MODE == REPLICATE:
        return tl.minimum(tl.maximum(o, -size), size)
    if MODE == CIRCULAR:
        period = size
    elif MODE == REFLECT:
        period = tl.maximum(2 * size - 2, 1)
    else:
        period = 2 * size
    o = o % period  # in the range of C: the sign of o
    o = tl.where(o + o > period, o - period, o)
    return tl.where(o + o < -period, o + period, o)
