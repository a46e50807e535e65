"""The one kernel of the shifts: every element gathers what it reads, with or without weights.

    y[n, c, p] = sum over the taps of weight[tap, c] * (the sum of x[n, c, s] over what p reads at that tap)

An integer shift has one tap of weight 1 and moves bits. An active shift on D axes has 2**D taps. Their transposes
gather, too: each input position finds the output positions that read it, so there are no atomics and results are the
same in every run. The transpose also carries the gradient of the offsets along: with the taps of ``grad`` at hand for
every input position, only ``x`` at that position is missing for the correlation of both::

    sum over p of grad[p] * x~[cell + tap + p]  =  sum over q of x[q] * (the sum of grad over what reads q at that tap)

A program keeps a block of one channel's or some channels' positions, finds its addresses once, and goes through some
images with them. Tensors in it are ``[rows, columns]``: rows are channels and columns pixels, or for channels last rows
are pixels of a compact patch and columns are channels. A warp's threads shall lie along the columns, where neighbours
are near in memory. Compilers cannot prove that, so addresses claim to be contiguous; they claim no alignment, so that
no vectors come of it.
"""

# Tensors inside a kernel are triton's own, which has no types for them; it knows no unpacking either.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from shiftconv.ops.triton._sources import (
    CIRCULAR,
    ZEROS,
    axis_offset,
    axis_weight,
    reader_at,
    readers,
    source_of,
)


@triton.jit(do_not_specialize=["batch", "images", "channels", "units"])  # else new sizes would be compiled for
def gather_kernel(
    x,
    y,
    offset,
    other,
    partial,
    batch,
    images,
    channels,
    units,
    d_axis,
    h_axis,
    w_axis,
    AXES: tl.constexpr,
    MODE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    WINDOW: tl.constexpr,
    TAPS: tl.constexpr,
    PARTS: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ROUNDED: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    CORRELATE: tl.constexpr,
):
    """Gather ``y`` from ``x``.

    ``units`` times ``ALIGN`` is the width of y; the other sizes and flags are explained by :func:`_work.work`. With
    ``CORRELATE``, ``x`` is an incoming gradient, ``other`` what it is correlated with, and ``partial``
    ``[blocks, taps, C]`` takes the sums.
    """
    REAL: tl.constexpr = not offset.dtype.element_ty.is_int()
    FOLDS: tl.constexpr = TRANSPOSE and MODE != ZEROS and (MODE != CIRCULAR or WINDOW)
    # Which number of an axis is the size of y, and which that of x.
    Y: tl.constexpr = 2 if WINDOW and not TRANSPOSE else 0
    X: tl.constexpr = 2 if WINDOW and TRANSPOSE else 0
    if LONG:
        channels = channels.to(tl.int64)
    axes = (widen(d_axis, LONG), widen(h_axis, LONG), with_size(widen(w_axis, LONG), units * ALIGN, Y))
    x_shape = (axes[0][X], axes[1][X], axes[2][X], channels)
    y_shape = (axes[0][Y], axes[1][Y], axes[2][Y], channels)
    x_image = (channels * PARTS).to(tl.int64) * (x_shape[0] * x_shape[1] * x_shape[2])
    y_image = (channels * PARTS).to(tl.int64) * (y_shape[0] * y_shape[1] * y_shape[2])
    chunk, block, spot, at, valid = tile(y_shape, AXES, PARTS, LAST, ROWS, COLS, TILE_H, TILE_W)
    begin = chunk * images
    end = tl.minimum(begin + images, batch)
    known = spot[0] < channels
    here = offset + spot[0] * AXES
    if TAPS == 1 and not FOLDS:
        o, usable = offsets(here, known, 0, axes, AXES, MODE, WINDOW, ROUNDED)
        source, reads = single(spot, o, axes, x_shape, AXES, MODE, TRANSPOSE, WINDOW, PARTS, LAST)
        source = tl.where(valid & reads, source, -1)
        source = tl.max_contiguous(tl.multiple_of(source, [1, 1]), [1, 2])
        if MODE == ZEROS and ALIGN > 1 and ROWS == 1 and not (LAST or WINDOW):
            # All of one channel: where it moves by whole vectors along the rows, it is read in vectors, too.
            o_w = tl.max(o[2])
            if o_w % ALIGN == 0:
                aligned = (o[0], o[1], o_w // ALIGN * ALIGN)
                there, does = single(spot, aligned, axes, x_shape, AXES, MODE, TRANSPOSE, WINDOW, PARTS, LAST)
                move(x, there, valid & does, x_image, y, at, valid, y_image, usable, begin, end, REAL)
            else:
                move(x, source, source >= 0, x_image, y, at, valid, y_image, usable, begin, end, REAL)
        else:
            move(x, source, source >= 0, x_image, y, at, valid, y_image, usable, begin, end, REAL)
    else:
        type_x: tl.constexpr = x.dtype.element_ty
        kind: tl.constexpr = tl.float64 if type_x == tl.float64 else (tl.int64 if type_x.is_int() else tl.float32)
        usable = known
        found = ()  # for each tap where it is, or by what lists
        weight = ()
        sums = ()
        for tap in tl.static_range(TAPS):
            o, usable = offsets(here, known, tap, axes, AXES, MODE, WINDOW, ROUNDED and TAPS == 1)
            if FOLDS:
                found = found + (lists(spot, o, axes, AXES, MODE, WINDOW),)
            else:
                source, reads = single(spot, o, axes, x_shape, AXES, MODE, TRANSPOSE, WINDOW, PARTS, LAST)
                source = tl.where(valid & reads, source, -1)
                found = found + (tl.max_contiguous(tl.multiple_of(source, [1, 1]), [1, 2]),)
            if TAPS > 1:
                weight = weight + (weights(here, known, tap, AXES, DERIVATIVE, ROUNDED, kind),)
            sums = sums + (tl.zeros([ROWS, COLS], dtype=kind),)
        for n in range(begin, end):
            total = tl.zeros([ROWS, COLS], dtype=kind)
            grown = ()
            if CORRELATE:
                factor = tl.load(other + n * y_image + at, mask=valid, other=0).to(kind)
            for tap in tl.static_range(TAPS):
                if FOLDS:
                    value = folded(
                        x + n * x_image, spot, valid, found[tap], axes, x_shape, AXES, MODE, WINDOW, PARTS, LAST, total
                    )
                else:
                    value = tl.load(x + n * x_image + found[tap], mask=found[tap] >= 0, other=0).to(kind)
                if CORRELATE:
                    grown = grown + (sums[tap] + value * factor,)
                if TAPS == 1:
                    total = value
                elif ROUNDED:
                    total = tl.where(weight[tap] == 0, total, value)
                else:
                    total += value * weight[tap]
            if CORRELATE:
                sums = grown
            if REAL:
                total = tl.where(usable, total, float("nan"))
            tl.store(y + n * y_image + at, total.to(y.dtype.element_ty), mask=valid)
        if CORRELATE:
            for tap in tl.static_range(TAPS):
                target = partial + (block.to(tl.int64) * TAPS + tap) * channels + spot[0]
                tl.store(target, tl.sum(sums[tap], 0 if LAST else 1, keep_dims=True), mask=known)


@triton.jit
def widen(axis, LONG: tl.constexpr):
    """The numbers of an axis as tensors."""
    wide: tl.constexpr = tl.int64 if LONG else tl.int32
    return tl.cast(axis[0], wide), tl.cast(axis[1], wide), tl.cast(axis[2], wide), tl.cast(axis[3], wide)


@triton.jit
def with_size(axis, size, WHICH: tl.constexpr):
    """The axis with one of its sizes replaced by an equal one, of which the compiler knows a divisor."""
    size = size.to(axis[0].dtype)
    return size if WHICH == 0 else axis[0], axis[1], size if WHICH == 2 else axis[2], axis[3]


@triton.jit
def tile(
    shape,
    AXES: tl.constexpr,
    PARTS: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """This program's part of the work.

    Returns the number of its images' chunk, of its block among those of a group of channels, ``(c, d, h, w, part)`` of
    its elements, their places in an image of ``shape`` (depth, height, width, channels), and which of them exist.
    """
    program = tl.program_id(0)
    depth, height, width, channels = shape[0], shape[1], shape[2], shape[3]
    rows = tl.arange(0, ROWS)[:, None].to(channels.dtype)
    cols = tl.arange(0, COLS)[None, :].to(channels.dtype)
    if LAST:
        TILE_D: tl.constexpr = ROWS // (TILE_H * TILE_W)
        row = channels * PARTS
        groups = tl.cdiv(row, COLS)
        across = tl.cdiv(width, TILE_W)
        down = tl.cdiv(height, TILE_H)
        deep = tl.cdiv(depth, TILE_D)
        block = program // groups
        chunk = block // (across * down * deep)
        col = (program % groups).to(cols.dtype) * COLS + cols
        w = block % across * TILE_W + rows % TILE_W
        h = block // across % down * TILE_H + rows // TILE_W % TILE_H
        d = block // (across * down) % deep * TILE_D + rows // (TILE_W * TILE_H)
        c = col // PARTS
        at = ((d * height + h) * width + w) * row + col
        valid = (d < depth) & (h < height) & (w < width) & (col < row)
    else:
        row = depth * height * width * PARTS
        tiles = tl.cdiv(row, COLS)
        groups = tl.cdiv(channels, ROWS)
        chunk = program // tiles // groups
        block = chunk * tiles + program % tiles
        col = (program % tiles).to(cols.dtype) * COLS + cols
        c = program // tiles % groups * ROWS + rows
        p = col // PARTS
        w = p % width if AXES > 1 else p
        h = p // width % height if AXES > 2 else p // width
        d = p // width // height if AXES > 2 else p * 0
        at = c * row + col
        valid = (c < channels) & (col < row)
    return chunk, block, (c, d, h, w, col % PARTS), at, valid


@triton.jit
def offsets(
    offset, known, tap, axes, AXES: tl.constexpr, MODE: tl.constexpr, WINDOW: tl.constexpr, ROUNDED: tl.constexpr
):
    """Whole offsets of the taps by axis (those of an absent axis mean nothing), and whether they can be used."""
    H: tl.constexpr = AXES - 2 if AXES > 1 else 0
    W: tl.constexpr = AXES - 1
    o_d, usable_d = axis_offset(offset, known, tap & 1, axes[0], MODE, WINDOW, ROUNDED)
    o_h, usable_h = axis_offset(offset + H, known, (tap >> H) & 1, axes[1], MODE, WINDOW, ROUNDED)
    o_w, usable_w = axis_offset(offset + W, known, (tap >> W) & 1, axes[2], MODE, WINDOW, ROUNDED)
    return (o_d, o_h, o_w), usable_d & usable_h & usable_w


@triton.jit
def weights(
    offset, known, tap, AXES: tl.constexpr, DERIVATIVE: tl.constexpr, ROUNDED: tl.constexpr, kind: tl.constexpr
):
    """How much every tap counts. Bit a of ``tap`` and ``DERIVATIVE`` belongs to axis a of the offsets."""
    weight = axis_weight(offset, known, tap & 1, DERIVATIVE & 1, ROUNDED).to(kind)
    if AXES > 1:
        weight *= axis_weight(offset + 1, known, (tap >> 1) & 1, (DERIVATIVE >> 1) & 1, ROUNDED).to(kind)
    if AXES > 2:
        weight *= axis_weight(offset + 2, known, (tap >> 2) & 1, (DERIVATIVE >> 2) & 1, ROUNDED).to(kind)
    return weight


@triton.jit
def place(d, h, w, spot, shape, PARTS: tl.constexpr, LAST: tl.constexpr):
    """Where in an image of ``shape`` the pixel ``(d, h, w)`` is, of the channel and part of ``spot``."""
    at = (d * shape[1] + h) * shape[2] + w
    if LAST:
        at = at * shape[3] + spot[0]
    else:
        at += spot[0] * (shape[0] * shape[1] * shape[2])
    if PARTS > 1:
        at = at * PARTS + spot[4]
    return at


@triton.jit
def single(
    spot,
    o,
    axes,
    shape,
    AXES: tl.constexpr,
    MODE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Where the only element is that each ``spot`` reads, and whether it reads one."""
    d, reads_d = source_of(spot[1], o[0], axes[0], AXES > 2, MODE, TRANSPOSE, WINDOW)
    h, reads_h = source_of(spot[2], o[1], axes[1], AXES > 1, MODE, TRANSPOSE, WINDOW)
    w, reads_w = source_of(spot[3], o[2], axes[2], True, MODE, TRANSPOSE, WINDOW)
    return place(d, h, w, spot, shape, PARTS, LAST), reads_d & reads_h & reads_w


@triton.jit
def move(x, source, reads, x_image, y, at, valid, y_image, usable, begin, end, REAL: tl.constexpr):
    """Copy what is read, bit by bit, in images ``begin`` to ``end``; NaN where offsets cannot be used."""
    for n in range(begin, end):
        value = tl.load(x + n * x_image + source, mask=reads, other=0)
        if REAL:
            value = tl.where(usable, value, float("nan"))
        tl.store(y + n * y_image + at, value, mask=valid)


@triton.jit
def lists(spot, o, axes, AXES: tl.constexpr, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """All that read each ``spot``, by axis; see :func:`readers`."""
    return (
        readers(spot[1], o[0], axes[0], AXES > 2, MODE, WINDOW),
        readers(spot[2], o[1], axes[1], AXES > 1, MODE, WINDOW),
        readers(spot[3], o[2], axes[2], True, MODE, WINDOW),
    )


@triton.jit
def folded(
    x,
    spot,
    valid,
    found,
    axes,
    shape,
    AXES: tl.constexpr,
    MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    LAST: tl.constexpr,
    like,
):
    """Sums of all output positions that read ``spot``, which :func:`lists` has ``found``."""
    total = tl.zeros_like(like)
    d_most = tl.max(tl.where(valid, found[0][2], 0))
    h_most = tl.max(tl.where(valid, found[1][2], 0))
    w_most = tl.max(tl.where(valid, found[2][2], 0))
    for i in range(d_most):
        d, reads_d = reader_at(i, found[0], axes[0], MODE, WINDOW)
        for j in range(h_most):
            h, reads_h = reader_at(j, found[1], axes[1], MODE, WINDOW)
            for k in range(w_most):
                w, reads_w = reader_at(k, found[2], axes[2], MODE, WINDOW)
                reads = valid & reads_d & reads_h & reads_w
                source = tl.where(reads, place(d, h, w, spot, shape, PARTS, LAST), -1)
                source = tl.max_contiguous(tl.multiple_of(source, [1, 1]), [1, 2])
                total += tl.load(x + source, mask=source >= 0, other=0).to(total.dtype)
    return total
