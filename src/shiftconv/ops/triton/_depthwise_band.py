"""Depthwise convolution on tensor cores.

A row of outputs is a row of inputs times a band matrix, which holds one row of the kernel along its diagonals; so a
wide kernel is as many matrix products as it has rows, and nearly nothing is multiplied by zero. The rows of all images
of a channel share a band. A tall kernel is the same on transposed planes. A plane of up to 64 pixels is a row of its
own: the kernel becomes one matrix. In numbers, with ``shifts`` taps on the short axis::

    y[n, r, j] = sum over s, k of x[n, r + s - before, start + k] * stack[c, s, block, k, j]

The bands are written to memory before, where all programs read them out of the L2 cache, a few channels at a time.

The gradient to the kernel is the product the other way round, summed along the diagonals at the end.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from shiftconv.ops.triton import _depthwise_work as shared
from shiftconv.ops.triton._depthwise_tiles import band_kernel, band_weight_kernel, diagonals_kernel, stack_kernel
from shiftconv.ops.triton._depthwise_work import Branch, filled

WIDE, TALL, DENSE = 0, 1, 2
_STACK = 16 << 20  # bytes of bands at a time; a third of the L2 cache of a large GPU
_SUMS = 32 << 20  # bytes of sums that are kept for the diagonals
_ENOUGH_PROGRAMS = 512
_PIXELS = 64  # of a plane that is a row of its own
_REGISTERS = 255  # at most, of a thread
_VECTOR = 16  # bytes; the widest access of a thread


class Band(NamedTuple):
    """How a branch becomes matrix products; ``kind`` is WIDE, TALL or DENSE, the other words as above."""

    kind: int
    shifts: int
    before: int
    blocks: int
    start: int


class Layout(NamedTuple):
    """Tiles of a launch: whether planes are rows, height, width, images of a program, and numbers that lie aligned."""

    dense: bool
    tile_h: int
    tile_w: int
    images: int
    align: int

    def plane(self, size: Sequence[int]) -> tuple[int, int]:
        """Height of a plane, and its width in aligned units."""
        height, width = (1, math.prod(size)) if self.dense else size
        return height, width // self.align

    def tiles(self, size: Sequence[int]) -> int:
        height, width = self.plane(size)
        return triton.cdiv(height, self.tile_h) * triton.cdiv(width * self.align, self.tile_w)

    def side(self, kind: int) -> int:
        """Size of a band."""
        return self.tile_h if kind == TALL else self.tile_w

    def numbers(self, kind: int, itemsize: int) -> int:
        """How many numbers of ``itemsize`` bytes stand for a band in memory."""
        return _PIXELS**2 if kind == DENSE else _VECTOR // itemsize * 2 * self.side(kind)

    def band(self, size: Sequence[int], outputs: Sequence[int], taps: Sequence[int], before: Sequence[int]) -> Band:
        """The products for a kernel of ``taps`` that begins ``before`` its output; all are heights and widths."""
        if self.dense:
            return Band(DENSE, 1, 0, 1, 0)
        kind = TALL if taps[0] > taps[1] else WIDE
        long, side = (0 if kind == TALL else 1), self.side(kind)
        if max(size[long], outputs[long]) <= side:
            return Band(kind, taps[1 - long], before[1 - long], 1, 0)
        start = -16 * math.ceil(before[long] / 16)  # so that vectors stay aligned
        blocks = math.ceil((taps[long] - before[long] + side - 1 - start) / side)
        return Band(kind, taps[1 - long], before[1 - long], blocks, start)


def layout(planes: Sequence[Sequence[int]], itemsize: int, batch: int, rows: int) -> Layout:
    """Tiles for ``planes`` (height, width) of maps of ``batch`` images, about ``rows`` rows of them in a program."""
    dense = all(math.prod(plane) <= _PIXELS for plane in planes)
    sizes = [(1, math.prod(plane)) if dense else plane for plane in planes]
    align = math.gcd(_VECTOR // itemsize, *(width for _, width in sizes))
    if dense:
        return Layout(True, 1, _PIXELS, min(max(triton.next_power_of_2(batch), 16), rows), align)
    tile_h, tile_w = (min(max(triton.next_power_of_2(max(size)), 16), 64) for size in zip(*sizes, strict=True))
    images = max(min(triton.next_power_of_2(batch), rows // max(tile_h, tile_w)), 1)
    return Layout(False, tile_h, tile_w, images, align)


def convolve(
    x: Sequence[Tensor], branches: Sequence[Branch], bias: Tensor | None, y: Sequence[Tensor], precision: str
) -> None:
    """Write the branches to ``y``, or their sum if there is one ``y``; at most three branches, all maps contiguous."""
    maps = [x[b % len(x)] for b in range(len(branches))]
    batch, channels, *size = y[0].shape
    itemsize = x[0].itemsize
    plan = layout([size, *(m.shape[2:] for m in x)], itemsize, batch, rows_of(x[0].dtype))
    bands = [plan.band(m.shape[2:], size, b.weight.shape[1:], b[1:]) for m, b in zip(maps, branches, strict=True)]
    order = sorted(range(len(bands)), key=lambda b: bands[b].kind != TALL)  # tall ones come first
    geometry = [(*plan.plane(maps[b].shape[2:]), *bands[b][1:]) for b in order]
    flags = _flags(plan, [bands[b].kind for b in order], x[0], precision)
    flags |= {
        "VECTOR": _VECTOR // itemsize,
        "EACH": len(y) > 1,
        "BIAS": bias is not None,
        "LONG": shared.is_long(*x, *y),
    }
    targets = [y[b] for b in order] if len(y) > 1 else y
    cost = sum(b.shifts * b.blocks * plan.numbers(b.kind, itemsize) for b in bands) * itemsize
    step = max(8, _STACK // cost // 8 * 8)  # pointers stay aligned
    with torch.cuda.device_of(x[0]):
        for c in range(0, channels, step):
            some = min(step, channels - c)
            stacks = [stack(branches[b], c, some, bands[b], plan, (maps[b].shape[3], size[1])) for b in order]
            band_kernel[(triton.cdiv(batch, plan.images) * plan.tiles(size) * some,)](
                *filled([maps[b].narrow(1, c, some) for b in order]),
                *filled(stacks),
                stacks[0] if bias is None else bias.contiguous().narrow(0, c, some),
                *filled([t.narrow(1, c, some) for t in targets]),
                batch,
                channels,
                *plan.plane(size),
                *filled(geometry),
                **flags,
            )


def capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU of ``x``; where there is none, of one that kernels are compiled for."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def rows_of(dtype: torch.dtype) -> int:
    """Rows of a program's tile."""
    return 64 if dtype == torch.float32 else 128


def _flags(plan: Layout, kinds: Sequence[int], x: Tensor, precision: str) -> dict[str, int | bool | str]:
    """Constants of :func:`band_kernel` for branches of these kinds."""
    warps = 8 if plan.images * max(plan.tile_h, _PIXELS if plan.dense else plan.tile_w) > 64 else 4
    return {
        "BRANCHES": len(kinds),
        "TALLS": sum(kind == TALL for kind in kinds),
        "IMAGES": plan.images,
        "TILE_H": plan.tile_h,
        "TILE_W": plan.tile_w,
        "ALIGN": plan.align,
        "VECTOR": _VECTOR // x.itemsize,
        "DEPTH": 128 // x.itemsize,
        **_common(x, precision, warps),
    }


def _common(x: Tensor, precision: str, warps: int) -> dict[str, int | bool | str]:
    # Two programs of 8 warps a multiprocessor, where tensor cores read their operands out of shared memory. Unset, the
    # assembler saves registers that nobody needs, and spills.
    crowded = x.itemsize == 2 and capability(x) >= (9, 0)
    return {
        "PRECISION": precision,
        "UPCAST": x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,  # which multiplies raw bits
        "num_warps": warps,
        "num_stages": 2,
        "maxnreg": min(1024 // warps, _REGISTERS) if crowded else _REGISTERS,
        "enable_fp_fusion": True,
    }


def stack(branch: Branch, first: int, some: int, bands: Band, plan: Layout, widths: tuple[int, int]) -> Tensor:
    """The bands of some channels, see :func:`stack_kernel`; ``widths`` are those of inputs and outputs."""
    weight, side = branch.weight.narrow(0, first, some), plan.side(bands.kind)
    result = weight.new_empty((some, bands.shifts, bands.blocks, plan.numbers(bands.kind, weight.itemsize)))
    stack_kernel[(some * bands.shifts * bands.blocks,)](
        weight,
        result,
        (*weight.shape[1:], *branch[1:]),
        *widths,
        bands.shifts,
        bands.blocks,
        bands.start,
        KIND=bands.kind,
        SIDE=side,
        VECTOR=_VECTOR // weight.itemsize,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return result


def weigh(x: Tensor, grad: Tensor, size: tuple[int, int], before: tuple[int, int], precision: str) -> Tensor:
    """The gradient to a kernel of ``size`` that begins ``before`` its output, ``[C, kh, kw]`` in float32."""
    batch, channels = x.shape[:2]
    deep = 128 // x.itemsize  # rows of a product
    plan = layout([x.shape[2:], grad.shape[2:]], x.itemsize, batch, deep)
    bands = plan.band(x.shape[2:], grad.shape[2:], size, before)
    side = plan.side(bands.kind)
    rows = 1 if plan.dense else min(plan.tile_w if bands.kind == TALL else plan.tile_h, deep)
    wide = 128 if bands.kind == TALL else 256  # loads of single numbers take more registers
    share = min(triton.next_power_of_2(bands.shifts), 2 * wide // x.itemsize // side, 8)
    products = bands.shifts * bands.blocks  # of a channel
    programs = triton.cdiv(bands.shifts, share) * bands.blocks
    parts = min(triton.cdiv(batch, plan.images), max(1, _ENOUGH_PROGRAMS // (channels * programs)))
    images = triton.cdiv(triton.cdiv(batch, parts), plan.images) * plan.images
    parts = triton.cdiv(batch, images)
    step = min(channels, max(8, _SUMS // (4 * parts * products * side**2) // 8 * 8))
    partial = torch.empty((parts, step, products, side, side), dtype=torch.float32, device=x.device)
    result = torch.empty((channels, *size), dtype=torch.float32, device=x.device)
    taps = size[0] * size[1] // bands.shifts
    group = min(triton.next_power_of_2(taps), 64)
    flags = _common(x, precision, 8 if share * side > 64 or x.itemsize > 2 else 4)
    flags |= {"IMAGES": plan.images, "ALIGN": plan.align, "SHARE": share}
    with torch.cuda.device_of(x):
        for c in range(0, channels, step):
            some = min(step, channels - c)
            band_weight_kernel[(parts * some * programs,)](
                x.narrow(1, c, some),
                grad.narrow(1, c, some),
                partial,
                batch,
                images,
                channels,
                some,
                *plan.plane(grad.shape[2:]),
                (*plan.plane(x.shape[2:]), *bands[1:]),
                KIND=bands.kind,
                ROWS=rows,
                COLUMNS=side,
                LONG=shared.is_long(x, grad),
                **flags,
            )
            diagonals_kernel[(some * bands.shifts * triton.cdiv(taps, group),)](
                partial,
                result.narrow(0, c, some),
                parts,
                some,
                (*size, *before),
                tuple(x.shape[2:]),
                tuple(grad.shape[2:]),
                *bands[1:2],
                *bands[3:],
                KIND=bands.kind,
                SIDE=side,
                TAPS=group,
                num_warps=4,
                maxnreg=_REGISTERS,
                enable_fp_fusion=True,
            )
    return result
