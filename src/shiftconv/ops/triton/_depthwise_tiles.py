"""Kernels of :mod:`shiftconv.ops.triton._depthwise_band`, where the scheme and its words are explained.

A geometry is the height of a plane, its width in units of ``ALIGN``, and ``shifts``, ``before``, ``blocks`` and
``start`` of a band. Rows are those of planes, columns along the band: for tall kernels the columns of the image are
rows.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

TALL = tl.constexpr(1)
DENSE = tl.constexpr(2)


@triton.jit
def stack_kernel(
    weight,
    stack,
    kernel,
    inputs,
    outputs,
    shifts,
    blocks,
    start,
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The band of one block, for one shift of one channel.

    A band is the same along its diagonals, so it is kept as one line, in ``VECTOR`` copies that begin a number later
    each: every row of the band lies in one of them at a multiple of a vector. A dense matrix is kept as it is.
    ``kernel`` holds its height and width and the taps above and left of the output; then the widths of both planes.
    """
    kh, kw, top, left = kernel
    block = tl.program_id(0) % blocks
    s = tl.program_id(0) // blocks % shifts
    c = tl.program_id(0) // (blocks * shifts)
    if KIND == DENSE:
        k = tl.arange(0, SIDE)[:, None]
        j = tl.arange(0, SIDE)[None, :]
        u, v = k // inputs - j // outputs + top, k % inputs - j % outputs + left
        at = k * SIDE + j
        size = SIDE * SIDE
    else:
        copy = tl.arange(0, VECTOR)[:, None]
        p = tl.arange(0, 2 * SIDE)[None, :]
        tap = start + block * SIDE + SIDE + copy - p
        if KIND == TALL:
            u, v = tap + top, s + tl.zeros_like(tap)
        else:
            u, v = s + tl.zeros_like(tap), tap + left
        at = copy * (2 * SIDE) + p
        size = VECTOR * 2 * SIDE
    known = (u >= 0) & (u < kh) & (v >= 0) & (v < kw)
    value = tl.load(weight + (c * kh + u) * kw + v, mask=known, other=0)
    tl.store(stack + tl.program_id(0).to(tl.int64) * size + at, value)


@triton.jit(do_not_specialize=["batch"])
def band_kernel(
    x0,
    x1,
    x2,
    stack0,
    stack1,
    stack2,
    bias,
    y0,
    y1,
    y2,
    batch,
    channels,
    height,
    units,
    g0,
    g1,
    g2,
    BRANCHES: tl.constexpr,
    TALLS: tl.constexpr,
    EACH: tl.constexpr,
    BIAS: tl.constexpr,
    IMAGES: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one channel of some images of y: the sum of the branches, the tall ones first, or each of them.

    ``channels`` are those of the whole maps, of which these may be a part.
    """
    index: tl.constexpr = tl.int64 if LONG else tl.int32
    width = units * ALIGN
    rounds, tiles_w = tl.cdiv(batch, IMAGES), tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_w
    n = tl.program_id(0) % rounds * IMAGES
    c = tl.program_id(0) // rounds // tiles
    i = tl.program_id(0) // rounds % tiles // tiles_w * TILE_H
    j = tl.program_id(0) // rounds % tiles % tiles_w * TILE_W
    lane = tl.arange(0, IMAGES * TILE_H)
    row, column = (i + lane % TILE_H)[:, None], (j + tl.arange(0, TILE_W))[None, :]
    image = (n + lane // TILE_H)[:, None]
    stored = (image < batch) & (row < height) & (column < width)
    out = (image.to(index) * channels + c) * (height * width) + row * width + column
    spot = (n, c, i, j, batch, channels)
    maps, stacks, results, geometries = (x0, x1, x2), (stack0, stack1, stack2), (y0, y1, y2), (g0, g1, g2)
    total = tl.zeros([IMAGES * TILE_H, TILE_W], tl.float32)
    other = tl.zeros([IMAGES * TILE_W, TILE_H], tl.float32)
    if BIAS:
        total += tl.load(bias + c).to(tl.float32)
    for b in tl.static_range(BRANCHES):
        if b < TALLS:
            other = banded(
                other,
                maps[b],
                stacks[b],
                spot,
                geometries[b],
                True,
                IMAGES,
                TILE_W,
                TILE_H,
                ALIGN,
                VECTOR,
                DEPTH,
                LONG,
                PRECISION,
                UPCAST,
            )
            if EACH or b == TALLS - 1:
                total += turned(other, IMAGES, TILE_W, TILE_H)
                other = tl.zeros_like(other)
        else:
            total = banded(
                total,
                maps[b],
                stacks[b],
                spot,
                geometries[b],
                False,
                IMAGES,
                TILE_H,
                TILE_W,
                ALIGN,
                VECTOR,
                DEPTH,
                LONG,
                PRECISION,
                UPCAST,
            )
        if EACH:
            tl.store(results[b] + out, total.to(y0.dtype.element_ty), mask=stored)
            total = tl.zeros_like(total)
    if not EACH:
        tl.store(y0 + out, total.to(y0.dtype.element_ty), mask=stored)


@triton.jit
def banded(
    total,
    x,
    stack,
    spot,
    geometry,
    ON_SIDE: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``total`` ``[IMAGES * ROWS, COLUMNS]`` plus one branch.

    In products ``DEPTH`` deep: of several shifts, or of a part of one.
    """
    n, c, i, j, batch, channels = spot
    h, units, shifts, before, blocks, start = geometry
    w = units * ALIGN
    if ON_SIDE:
        first_row, first_column, rows, columns = j, i + start, w, h
    else:
        first_row, first_column, rows, columns = i, j + start, h, w
    lane = tl.arange(0, IMAGES * ROWS)
    row = (first_row - before + lane % ROWS)[:, None]
    image = (n + lane // ROWS)[:, None]
    SHARE: tl.constexpr = max(DEPTH // COLUMNS, 1)
    SPLIT: tl.constexpr = max(COLUMNS // DEPTH, 1)
    depth = tl.arange(0, DEPTH)
    k, ahead = depth % COLUMNS, depth // COLUMNS
    if ROWS == 1:
        SIZE: tl.constexpr = COLUMNS * COLUMNS
        place = k * COLUMNS
    else:
        SIZE: tl.constexpr = VECTOR * 2 * COLUMNS
        place = k % VECTOR * (2 * COLUMNS) - k // VECTOR * VECTOR + COLUMNS
    place = (place + ahead * blocks * SIZE)[:, None] + tl.arange(0, COLUMNS)[None, :]
    # Only what meets the plane.
    begin, end = tl.maximum(before - first_row - ROWS + 1, 0), tl.minimum(shifts, rows + before - first_row)
    last = tl.minimum(blocks, tl.cdiv(columns - first_column, COLUMNS))
    for block in range(tl.maximum(-first_column, 0) // COLUMNS, last):
        for step in range(begin * SPLIT, end * SPLIT, SHARE):
            s, k_first = step // SPLIT, step % SPLIT * DEPTH
            column = (first_column + block * COLUMNS + k_first + k)[None, :]
            known = s + ahead < end
            at, inside = pixels(image, c, row + s + ahead[None, :], column, (batch, channels, h, w), ON_SIDE, LONG)
            # Out of the L1 cache: the next shift reads most of the tile again, the next row of a band another copy.
            tile = tl.load(x + at, mask=inside & known[None, :], other=0, cache_modifier=".ca")
            band = stack + ((c * shifts + s) * blocks + block) * SIZE
            band += k_first * COLUMNS if ROWS == 1 else -k_first
            factor = tl.load(band + place, mask=known[:, None], other=0, cache_modifier=".ca")
            if UPCAST:
                tile, factor = tile.to(tl.float32), factor.to(tl.float32)
            total = tl.dot(tile, factor, total, input_precision=PRECISION)
    return total


@triton.jit
def pixels(image, c, row, column, sizes, ON_SIDE: tl.constexpr, LONG: tl.constexpr):
    """Where pixels of a channel of some images lie, and which exist; ``ON_SIDE`` rows are columns of the image."""
    batch, channels, h, w = sizes
    index: tl.constexpr = tl.int64 if LONG else tl.int32
    first = (image.to(index) * channels + c) * (h * w)
    if ON_SIDE:
        inside = (row >= 0) & (row < w) & (column >= 0) & (column < h)
        at = first + (column * w + row)
    else:
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        at = first + (row * w + column)
    return at, inside & (image < batch)


@triton.jit
def turned(total, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[IMAGES * ROWS, COLUMNS]`` -> ``[IMAGES * COLUMNS, ROWS]``, every image turned by itself."""
    planes = tl.permute(tl.reshape(total, [IMAGES, ROWS, COLUMNS]), (0, 2, 1))
    return tl.reshape(planes, [IMAGES * COLUMNS, ROWS])


@triton.jit(do_not_specialize=["batch", "images"])
def band_weight_kernel(
    x,
    grad,
    partial,
    batch,
    images,
    channels,
    some,
    height,
    units,
    geometry,
    KIND: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    SHARE: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Products of outputs and inputs of one block, for ``SHARE`` shifts of one channel, summed over ``images`` images.

    A part of ``partial`` ``[parts, some, shifts, blocks, COLUMNS, COLUMNS]``, outputs by inputs, of ``some`` channels.
    """
    h, inner, shifts, before, blocks, start = geometry
    width, w = units * ALIGN, inner * ALIGN
    groups = tl.cdiv(shifts, SHARE)
    block = tl.program_id(0) % blocks
    s = tl.program_id(0) // blocks % groups * SHARE
    c = tl.program_id(0) // (blocks * groups) % some
    part = tl.program_id(0) // (blocks * groups * some)
    if KIND == TALL:
        tiles_r, tiles_c = tl.cdiv(width, ROWS), tl.cdiv(height, COLUMNS)
    else:
        tiles_r, tiles_c = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    lane = tl.arange(0, IMAGES * ROWS)
    depth = tl.arange(0, SHARE * COLUMNS)
    k, shift = depth % COLUMNS, s + depth // COLUMNS
    last = tl.minimum(batch, part * images + images)
    total = tl.zeros([SHARE * COLUMNS, COLUMNS], tl.float32)  # this way round it is tall enough for warp groups
    for tile in range(tiles_r * tiles_c):
        row = (tile // tiles_c * ROWS + lane % ROWS)[:, None]
        first = tile % tiles_c * COLUMNS
        column = (first + tl.arange(0, COLUMNS))[None, :]
        source = (first + start + block * COLUMNS + k)[None, :]
        for n in range(part * images, last, IMAGES):
            image = (n + lane // ROWS)[:, None]
            at, inside = pixels(image, c, row, column, (last, channels, height, width), KIND == TALL, LONG)
            to = tl.load(grad + at, mask=inside, other=0)
            shifted = row + (shift - before)[None, :]
            at, inside = pixels(image, c, shifted, source, (last, channels, h, w), KIND == TALL, LONG)
            of = tl.load(x + at, mask=inside & (shift < shifts)[None, :], other=0, cache_modifier=".ca")
            if UPCAST:
                to, of = to.to(tl.float32), of.to(tl.float32)
            total = tl.dot(tl.trans(of), to, total, input_precision=PRECISION)
    first = ((tl.cast(part, tl.int64) * some + c) * shifts * blocks + block) * (COLUMNS * COLUMNS)
    place = (shift * blocks * (COLUMNS * COLUMNS) + k)[:, None] + tl.arange(0, COLUMNS)[None, :] * COLUMNS
    tl.store(partial + first + place, total, mask=(shift < shifts)[:, None])


@triton.jit(do_not_specialize=["parts"])
def diagonals_kernel(
    partial,
    result,
    parts,
    some,
    kernel,
    inputs,
    outputs,
    shifts,
    blocks,
    start,
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Some taps on the long axis of one channel and shift of ``result`` ``[some, kh, kw]``: sums along diagonals.

    ``partial`` is that of :func:`band_weight_kernel`; ``inputs`` and ``outputs`` are height and width of the planes.
    """
    kh, kw, top, left = kernel
    taps = kh * kw if KIND == DENSE else (kh if KIND == TALL else kw)
    groups = tl.cdiv(taps, TAPS)
    tap = (tl.program_id(0) % groups * TAPS + tl.arange(0, TAPS))[None, :]
    s = tl.program_id(0) // groups % shifts
    c = tl.program_id(0) // (groups * shifts)
    j = tl.arange(0, SIDE)[:, None]
    total = tl.zeros([SIDE, TAPS], tl.float32)
    for part in range(parts):
        for block in range(blocks):
            if KIND == DENSE:
                row, column = j // outputs[1] + tap // kw - top, j % outputs[1] + tap % kw - left
                k = row * inputs[1] + column
                inside = (row >= 0) & (row < inputs[0]) & (column >= 0) & (column < inputs[1])
                inside &= j < outputs[0] * outputs[1]
            else:
                k = tap - (top if KIND == TALL else left) - start - block * SIDE + j
                inside = (k >= 0) & (k < SIDE)
            first = (((tl.cast(part, tl.int64) * some + c) * shifts + s) * blocks + block) * (SIDE * SIDE)
            total += tl.load(partial + first + (j * SIDE + k), mask=inside & (tap < taps), other=0)
    sums = tl.sum(total, 0)[None, :]
    if KIND == DENSE:
        at = tap
    elif KIND == TALL:
        at = tap * kw + s
    else:
        at = s * kw + tap
    tl.store(result + c * (kh * kw) + at, sums, mask=tap < taps)
