"""Depthwise convolution tap by tap: any dtype, any kernel, both memory formats, in full precision."""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shiftconv.ops.triton import _depthwise_work as shared
from shiftconv.ops.triton._depthwise_work import Branch, filled, summed_in

_ENOUGH_PROGRAMS = 2048
_LEAST = 16  # pixels of a tile; where all sizes of one are 1, Triton takes it for a scalar and trips over its hints


def convolve(
    x: Sequence[Tensor], branches: Sequence[Branch], bias: Tensor | None, y: Sequence[Tensor], last: bool
) -> None:
    """Write the branches to ``y``, or their sum if there is one ``y``.

    At most three branches; all maps are dense, channels last if so said.
    """
    weights = [b.weight.flatten(1) for b in branches]
    if last:
        weights = [w.t().contiguous() for w in weights]
    maps = [x[i % len(x)] for i in range(len(branches))]
    geometry = [(*m.shape[2:], *b.weight.shape[1:], b.top, b.left) for m, b in zip(maps, branches, strict=True)]
    channels, (height, width) = y[0].shape[1], y[0].shape[2:]
    flags = tiles(channels, height * width, last)
    blocks = triton.cdiv(height * width, flags["PIXELS"]) * triton.cdiv(channels, flags["CHANNELS"])
    with torch.cuda.device_of(y[0]):
        plain_kernel[(blocks * y[0].shape[0],)](
            *filled(maps),
            *filled(weights),
            weights[0] if bias is None else bias.contiguous(),
            *filled(y),
            channels,
            height,
            width,
            *filled(geometry),
            BRANCHES=len(branches),
            EACH=len(y) > 1,
            LAST=last,
            LONG=shared.is_long(*x, *y),
            BIAS=bias is not None,
            DOUBLE=y[0].dtype == torch.float64,
            **flags,
        )


def tiles(channels: int, pixels: int, last: bool) -> dict[str, int | bool]:
    """Sizes of a program's tile and its warps; threads lie along what is contiguous."""
    if last:
        lanes = min(triton.next_power_of_2(channels), 64)
        spots = min(triton.next_power_of_2(pixels), 512 // lanes)
    else:
        spots = min(max(triton.next_power_of_2(pixels), _LEAST), 512)
        lanes = min(triton.next_power_of_2(channels), 512 // spots)
    return {"PIXELS": spots, "CHANNELS": lanes, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def plain_kernel(
    x0,
    x1,
    x2,
    w0,
    w1,
    w2,
    bias,
    y0,
    y1,
    y2,
    channels,
    height,
    width,
    g0,
    g1,
    g2,
    BRANCHES: tl.constexpr,
    EACH: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    BIAS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of one image of ``y``: ``[CHANNELS, PIXELS]``, or ``[PIXELS, CHANNELS]`` in channels last.

    Maps, weights and results of three branches come one after the other. A geometry is the height and width of a map
    and of a kernel, and how far the kernel begins before its output.
    """
    spots = tl.cdiv(height * width, PIXELS)
    groups = tl.cdiv(channels, CHANNELS)
    index: tl.constexpr = tl.int64 if LONG else tl.int32
    n = (tl.program_id(0) // (spots * groups)).to(index)
    p = tl.program_id(0) % spots * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(0) // spots % groups * CHANNELS + tl.arange(0, CHANNELS)
    if LAST:
        p, c = p[:, None], c[None, :]
    else:
        p, c = p[None, :], c[:, None]
    at = (n, c.to(index), p // width, p % width, (c < channels) & (p < height * width), channels)
    plane = height * width
    out = (n * plane + p) * channels + at[1] if LAST else (n * channels + at[1]) * plane + p
    total = tl.zeros([PIXELS, CHANNELS] if LAST else [CHANNELS, PIXELS], tl.float64 if DOUBLE else tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=c < channels, other=0).to(total.dtype)
    maps, weights, results, geometries = (x0, x1, x2), (w0, w1, w2), (y0, y1, y2), (g0, g1, g2)
    for b in tl.static_range(BRANCHES):
        total = taps(total, maps[b], weights[b], at, geometries[b], LAST, LONG)
        if EACH:
            tl.store(results[b] + out, total.to(y0.dtype.element_ty), mask=at[4])
            total = tl.zeros_like(total)
    if not EACH:
        tl.store(y0 + out, total.to(y0.dtype.element_ty), mask=at[4])


@triton.jit
def taps(total, x, weight, at, geometry, LAST: tl.constexpr, LONG: tl.constexpr):
    """``total`` plus one branch; ``at`` = image, channels, rows, columns, which of them exist, number of channels."""
    n, c, i, j, exists, channels = at
    h, w, kh, kw, top, left = geometry
    index: tl.constexpr = tl.int64 if LONG else tl.int32
    if LAST:
        first, tap_step, channel_step, w_tap, w_channel = n * h * w * channels, channels, 1, channels, 1
    else:
        first, tap_step, channel_step, w_tap, w_channel = n * channels * h * w, 1, h * w, 1, kh * kw
    plane = x + first + c * channel_step
    weights = weight + c * w_channel
    known = c < channels
    for u in range(kh):
        row = i + u - top
        reads = exists & (row >= 0) & (row < h)
        for v in range(kw):
            column = j + v - left
            spot = (row * w + column).to(index) * tap_step
            # A warp's threads shall lie along what is contiguous; see _gather.py.
            spot = tl.max_contiguous(tl.multiple_of(spot, [1, 1]), [1, 2]) if not LAST else spot
            value = tl.load(plane + spot, mask=reads & (column >= 0) & (column < w), other=0).to(total.dtype)
            factor = tl.load(weights + (u * kw + v) * w_tap, mask=known, other=0).to(total.dtype)
            total += value * factor
    return total


def weigh(x: Tensor, grad: Tensor, size: tuple[int, int], before: tuple[int, int], last: bool) -> Tensor:
    """The gradient to a kernel of ``size`` that begins ``before`` its output, ``[C, kh, kw]`` in the dtype of sums."""
    channels, taps = x.shape[1], size[0] * size[1]
    flags = weight_tiles(channels, taps, grad.shape[2] * grad.shape[3], last)
    blocks = triton.cdiv(channels, flags["CHANNELS"]) * triton.cdiv(taps, flags["TAPS"])
    images = max(1, x.shape[0] * blocks // _ENOUGH_PROGRAMS)
    parts = triton.cdiv(x.shape[0], images)
    partial = torch.empty((parts, channels, taps), dtype=summed_in(x.dtype), device=x.device)
    with torch.cuda.device_of(x):
        plain_weight_kernel[(blocks * parts,)](
            x,
            grad,
            partial,
            x.shape[0],
            images,
            channels,
            *grad.shape[2:],
            (*x.shape[2:], *size, *before),
            LAST=last,
            LONG=shared.is_long(x, grad, partial),
            DOUBLE=x.dtype == torch.float64,
            **flags,
        )
    return partial.sum(0).unflatten(1, size)


def weight_tiles(channels: int, taps: int, pixels: int, last: bool) -> dict[str, int | bool]:
    """Sizes of a program's tile: one sum is kept for each of its numbers."""
    if last:
        lanes, several = min(triton.next_power_of_2(channels), 32), min(triton.next_power_of_2(taps), 8)
    else:
        lanes, several = 1, min(triton.next_power_of_2(taps), 16)
    spots = min(max(triton.next_power_of_2(pixels), _LEAST), 16 if last else 4096 // (lanes * several))
    return {"TAPS": several, "PIXELS": spots, "CHANNELS": lanes, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["batch", "images"])
def plain_weight_kernel(
    x,
    grad,
    partial,
    batch,
    images,
    channels,
    height,
    width,
    geometry,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    DOUBLE: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some taps of some channels, summed over ``images`` images: a part of ``partial`` ``[parts, C, taps]``.

    Tiles are ``[TAPS, CHANNELS, PIXELS]``, or ``[TAPS, PIXELS, CHANNELS]`` in channels last.
    """
    h, w, kh, kw, top, left = geometry
    index: tl.constexpr = tl.int64 if LONG else tl.int32
    several = tl.cdiv(kh * kw, TAPS)
    groups = tl.cdiv(channels, CHANNELS)
    t = tl.program_id(0) % several * TAPS + tl.arange(0, TAPS)
    lane = tl.program_id(0) // several % groups * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(0) // (several * groups)
    u = (t // kw - top)[:, None, None]
    v = (t % kw - left)[:, None, None]
    flat = tl.arange(0, PIXELS)
    c = lane.to(index)
    if LAST:
        c, flat = c[None, None, :], flat[None, :, None]
        total = tl.zeros([TAPS, PIXELS, CHANNELS], tl.float64 if DOUBLE else tl.float32)
    else:
        c, flat = c[None, :, None], flat[None, None, :]
        total = tl.zeros([TAPS, CHANNELS, PIXELS], tl.float64 if DOUBLE else tl.float32)
    known = (c < channels) & (t < kh * kw)[:, None, None]
    for n in range(part * images, min(batch, part * images + images)):
        image = tl.cast(n, index)
        for start in range(0, height * width, PIXELS):
            p = start + flat
            i, j = p // width, p % width
            row, column = i + u, j + v
            reads = known & (p < height * width) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            if LAST:
                at = (image * (height * width) + p) * channels + c
                spot = (image * (h * w) + (row * w + column)) * channels + c
            else:
                at = (image * channels + c) * (height * width) + p
                spot = (image * channels + c) * (h * w) + (row * w + column)
                spot = tl.max_contiguous(tl.multiple_of(spot, [1, 1, 1]), [1, 1, 2])
            factor = tl.load(grad + at, mask=(c < channels) & (p < height * width), other=0).to(total.dtype)
            total += tl.load(x + spot, mask=reads, other=0).to(total.dtype) * factor
    sums = tl.sum(total, 1 if LAST else 2)
    place = (tl.cast(part, index) * channels + lane[None, :]) * (kh * kw) + t[:, None]
    tl.store(partial + place, sums, mask=(lane < channels)[None, :] & (t < kh * kw)[:, None])
