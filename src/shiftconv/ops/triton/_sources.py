"""What the shifts' kernels share: which elements a position reads, axis by axis.

A function here sees one axis: ``p`` are positions, ``o`` whole offsets of the channels, in any shapes that broadcast.
An axis is the tuple ``(size, first, length, step)`` of :class:`shiftconv.ops.sampling.Axis`. Without ``WINDOW`` the
output is as large as the input, and only ``size`` is looked at.
"""

# Tensors inside a kernel are triton's own, which has no types for them.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# ruff: noqa: SIM109 (kernels know no sets of constants)

import triton
import triton.language as tl

ZEROS, REPLICATE, CIRCULAR, REFLECT, SYMMETRIC = (tl.constexpr(mode) for mode in range(5))  # sampling.MODES

LIMIT = tl.constexpr(2.0**31)  # pixels; real offsets stay below it


@triton.jit
def real_offset(offset, known):
    """Real offsets of channels, and whether they can be used; those that cannot count as 0."""
    value = tl.load(offset, mask=known, other=0)
    usable = tl.abs(value) < LIMIT  # NaN is not
    return tl.where(usable, value, 0), usable


@triton.jit
def nearest(value):
    """Whole numbers, halves to even."""
    low = tl.floor(value)
    d = value - low
    odd = low - 2 * tl.floor(low * 0.5)
    return tl.where((d > 0.5) | ((d == 0.5) & (odd == 1)), low + 1, low)


@triton.jit
def tap_offset(value, bit, ROUNDED: tl.constexpr):
    """Whole offset of a tap: of the cell's lower end for ``bit`` 0, its upper end for 1; or the rounded offset."""
    return nearest(value).to(tl.int64) if ROUNDED else -tl.floor(-value).to(tl.int64) - bit


@triton.jit
def axis_offset(offset, known, bit, axis, MODE: tl.constexpr, WINDOW: tl.constexpr, ROUNDED: tl.constexpr):
    """The offset that matters, whole and small, of the channels at ``offset``, and whether theirs can be used."""
    if offset.dtype.element_ty.is_int():
        o = tl.load(offset, mask=known, other=0)
        usable = known
    else:
        value, usable = real_offset(offset, known)
        o = tap_offset(value, bit, ROUNDED)
    return normal(o, axis, MODE, WINDOW).to(axis[0].dtype), usable


@triton.jit
def axis_weight(offset, known, bit, DERIVED: tl.constexpr, ROUNDED: tl.constexpr):
    """How much the taps of the channels at ``offset`` count: in the sum, or ``DERIVED`` with respect to the offset."""
    value, _ = real_offset(offset, known)
    if DERIVED:
        weight = 0 * value + (1 - 2 * bit)
    elif ROUNDED:
        weight = (tap_offset(value, bit, False) == tap_offset(value, bit, True)).to(value.dtype)
    else:
        d = -value - tl.floor(-value)
        weight = tl.where(bit == 1, d, 1 - d)
    return weight


@triton.jit
def normal(o, axis, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """The smallest offset that does the same; at most ``size`` either way where there is no window."""
    size = axis[0]
    if MODE == ZEROS or MODE == REPLICATE:
        reach = tl.abs(axis[1]) + axis[2] * axis[3] + size if WINDOW else size
        o = tl.minimum(tl.maximum(o, -reach), reach)
    else:
        period = period_of(size, MODE)
        o = o % period  # in the range of C: the sign of o
        o = tl.where(o + o > period, o - period, o)
        o = tl.where(o + o < -period, o + period, o)
    return o


@triton.jit
def period_of(size, MODE: tl.constexpr):
    """After how many pixels an extended axis repeats itself."""
    if MODE == CIRCULAR:
        period = size
    elif MODE == REFLECT:
        period = tl.maximum(2 * size - 2, 1)
    else:
        period = 2 * size
    return period


@triton.jit
def modulo(at, period):
    """Remainder in ``[0, period)``."""
    at = at % period
    return tl.where(at < 0, at + period, at)


@triton.jit
def source_of(p, o, axis, PRESENT: tl.constexpr, MODE: tl.constexpr, TRANSPOSE: tl.constexpr, WINDOW: tl.constexpr):
    """The only element that position ``p`` reads along an axis, and whether it reads; an axis may be absent."""
    if not PRESENT:
        at = p
        reads = p == 0
    elif TRANSPOSE and WINDOW:
        # For zeros; elsewhere several output positions may read p.
        ahead = p + o - axis[1]
        at = ahead // axis[3]
        reads = (ahead >= 0) & (at * axis[3] == ahead) & (at < axis[2])
    elif TRANSPOSE:
        at, reads = sample(p, -o, axis, MODE, False)  # for zeros and circular
    else:
        at, reads = sample(p, o, axis, MODE, WINDOW)
    return at, reads


@triton.jit
def sample(p, o, axis, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """Index that output position ``p`` reads, and whether it reads at all."""
    size = axis[0]
    at = axis[1] + p * axis[3] - o if WINDOW else p - o
    if MODE == ZEROS:
        reads = (at >= 0) & (at < size)
    else:
        if MODE == REPLICATE:
            at = tl.minimum(tl.maximum(at, 0), size - 1)
        elif WINDOW:
            period = period_of(size, MODE)
            at = modulo(at, period)
            if MODE == REFLECT:
                at = tl.minimum(at, period - at)
            elif MODE == SYMMETRIC:
                at = tl.minimum(at, period - 1 - at)
        elif MODE == CIRCULAR:  # offsets are normal: one fold finds every source
            at = tl.where(at < 0, at + size, tl.where(at >= size, at - size, at))
        elif MODE == REFLECT:
            at = tl.where(at < 0, -at, tl.where(at >= size, 2 * (size - 1) - at, at))
        else:
            at = tl.where(at < 0, -1 - at, tl.where(at >= size, 2 * size - 1 - at, at))
        reads = at >= 0
    return at, reads


@triton.jit
def readers(p, o, axis, PRESENT: tl.constexpr, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """All output positions that read input position ``p``, as ``(a, b, count)`` for :func:`reader_at`."""
    size = axis[0]
    length = axis[2] if WINDOW else size
    step = axis[3] if WINDOW else 1
    ahead = p + o - axis[1] if WINDOW else p + o  # from the first coordinate to the direct reading of p
    if not PRESENT:
        a = p
        b = p - 1
        count = p + 1
    elif MODE == REPLICATE:
        # A row of positions. Those that fall off an end read the pixel there.
        a = tl.where((p == 0) | (ahead <= 0), 0, (ahead + step - 1) // step)
        b = tl.where(p == size - 1, length - 1, tl.where(ahead < 0, -1, ahead // step))
        b = tl.minimum(b, length - 1)
        count = tl.maximum(b - a + 1, 0)
    else:
        # The axis repeats itself: coordinates in p's class modulo the period, and in that of its mirror image.
        period = period_of(size, MODE)
        last = (length - 1) * step
        repeats = last // period + 1
        a = modulo(ahead, period)
        b = a
        count = repeats + 0 * a
        if MODE != CIRCULAR:
            b = modulo(ahead - 2 * p if MODE == REFLECT else ahead - 2 * p - 1, period)
            b = tl.where((b == a) | (b > last), -1, b)
            swap = (a > last) & (b >= 0)
            a = tl.where(swap, b, a)
            b = tl.where(swap, -1, b)
            count = tl.where((b >= 0) | (repeats > 1), 2 * repeats, 1)
    return a, b, count


@triton.jit
def reader_at(i, found, axis, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """Reader number ``i`` of those that :func:`readers` found, and whether there is it."""
    a, b, count = found[0], found[1], found[2]
    if MODE == REPLICATE:
        at = a + i
        reads = i < count
    else:
        length = axis[2] if WINDOW else axis[0]
        period = period_of(axis[0], MODE)
        if MODE == CIRCULAR:
            ahead = a + i * period
        else:
            start = tl.where(i % 2 == 0, a, b)
            ahead = tl.where(start >= 0, start + (i // 2) * period, -1)
        at = ahead // axis[3] if WINDOW else ahead
        reads = (i < count) & (ahead >= 0) & (at < length)
        if WINDOW:
            reads &= at * axis[3] == ahead
    return at, reads
