"""``shiftconv::shift_linear`` on the GPU: a 1x1 convolution whose pixels are read where they have shifted.

    y[n, o, p] = act(bias[o] + sum over c of weight[o, c] * x~[n, c, stride * p - offset[c]]) + residual[n, o, p]

The shifted map is never written: a tile of it is gathered channel by channel and goes straight to the tensor cores.
Pixels of all images are counted through, so small maps fill tiles, too. Each channel of a tile has its own alignment,
so its numbers are loaded one by one, side by side in a warp, while the previous tile is multiplied; weights and the
result of channels last move in vectors.
"""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shiftconv.ops.sampling import Axis, format_of
from shiftconv.ops.triton._gather import widen
from shiftconv.ops.triton._sources import normal, sample

_INT32 = 2**30
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shift_linear(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mode: int,
    stride: Sequence[int],
    relu: bool,
) -> Tensor:
    """Same arguments and result as the raw operator."""
    from shiftconv.ops.shift_linear import reference

    lengths = [-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True)]
    pixels, outputs = x.shape[0] * math.prod(lengths), weight.shape[0]
    if x.dtype not in _KERNEL_DTYPES or pixels * outputs == 0 or x.shape[1] == 0:
        return reference(x, offset, weight, bias, residual, mode, stride, relu)
    memory_format = format_of(x)
    x = x.contiguous(memory_format=memory_format)
    y = torch.empty((x.shape[0], outputs, *lengths), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    axes = [Axis(1, 0, 1, 1)] * (5 - x.ndim)
    axes += [Axis(size, 0, length, step) for size, length, step in zip(x.shape[2:], lengths, stride, strict=True)]
    precise = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    flags = tiles(outputs, x.shape[1], precise)
    grid = (triton.cdiv(pixels, flags["PIXELS"]) * triton.cdiv(outputs, flags["OUTPUTS"]),)
    with torch.cuda.device_of(x):
        shift_linear_kernel[grid](
            x,
            offset.contiguous(),
            weight,
            weight if bias is None else bias.contiguous(),
            y if residual is None else residual,
            y,
            x.shape[0],
            x.shape[1],
            outputs,
            *weight.stride(),
            *map(tuple, axes),
            AXES=x.ndim - 2,
            MODE=mode,
            WINDOW=any(step != 1 for step in stride),
            LAST=memory_format is not torch.contiguous_format,
            LONG=max(x.numel(), y.numel()) >= _INT32,
            BIAS=bias is not None,
            RELU=relu,
            RESIDUAL=residual is not None,
            PRECISION="ieee" if precise else "tf32",
            UPCAST=x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,  # which multiplies raw bits
            **flags,
        )
    return y


def tiles(outputs: int, channels: int, precise: bool) -> dict[str, int | bool]:
    """Sizes of a program's tile and its warps.

    Few numbers a thread: gathering takes many registers for addresses, and what counts is how many loads are under way.
    """
    depth = min(max(triton.next_power_of_2(channels), 16), 16 if precise else 32)
    return {
        "OUTPUTS": min(max(triton.next_power_of_2(outputs), 16), 64 if precise else 128),
        "PIXELS": 32 if precise else 64,
        "CHANNELS": depth,
        "num_warps": 8 if precise else depth // 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


@triton.jit(do_not_specialize=["batch"])
def shift_linear_kernel(
    x,
    offset,
    weight,
    bias,
    residual,
    y,
    batch,
    channels,
    outputs,
    weight_o,
    weight_c,
    d_axis,
    h_axis,
    w_axis,
    AXES: tl.constexpr,
    MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of y, ``[OUTPUTS, PIXELS]``, or for channels last ``[PIXELS, OUTPUTS]``."""
    axes = (widen(d_axis, LONG), widen(h_axis, LONG), widen(w_axis, LONG))
    blocks = tl.cdiv(outputs, OUTPUTS)
    q = (tl.program_id(0) // blocks).to(axes[0][0].dtype) * PIXELS + tl.arange(0, PIXELS)
    o = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, CHANNELS)
    if LAST:
        q, o, k = q[:, None], o[None, :], k[None, :]
    else:
        q, o, k = q[None, :], o[:, None], k[:, None]
    weights = weight + o * weight_o + tl.trans(k) * weight_c
    plane = axes[0][2] * axes[1][2] * axes[2][2]
    n = q // plane
    p = q % plane
    spot = (p // (axes[1][2] * axes[2][2]), p // axes[2][2] % axes[1][2], p % axes[2][2])
    valid = n < batch
    image = n * (axes[0][0] * axes[1][0] * axes[2][0]) * channels
    total = tl.zeros([PIXELS, OUTPUTS] if LAST else [OUTPUTS, PIXELS], dtype=tl.float32)
    tile = shifted(x, image, offset, k, channels, spot, valid, axes, AXES, MODE, WINDOW, LAST)
    for start in range(0, channels, CHANNELS):
        factor = tl.load(weights + start * weight_c, mask=(o < outputs) & (tl.trans(k) + start < channels), other=0)
        this = tile
        tile = shifted(x, image, offset, k + start + CHANNELS, channels, spot, valid, axes, AXES, MODE, WINDOW, LAST)
        if UPCAST:
            factor, this = factor.to(tl.float32), this.to(tl.float32)
        if LAST:
            total = tl.dot(this, factor, total, input_precision=PRECISION)
        else:
            total = tl.dot(factor, this, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + o, mask=o < outputs, other=0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0, total)  # NaN stays
    stored = valid & (o < outputs)
    if LAST:
        at = q * outputs + o
    else:
        at = tl.where(stored, (n * outputs + o) * plane + p, 0)
        at = tl.max_contiguous(tl.multiple_of(at, [1, 1]), [1, 2])
    if RESIDUAL:
        total += tl.load(residual + at, mask=stored, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=stored)


@triton.jit
def shifted(
    x,
    image,
    offset,
    c,
    channels,
    spot,
    valid,
    axes,
    AXES: tl.constexpr,
    MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    LAST: tl.constexpr,
):
    """The shifted map at channels ``c``, a tile of pixels whose images begin at ``image``."""
    known = c < channels
    axis = tl.arange(0, 4)[None, :]  # of the offsets
    flat = tl.reshape(c, [c.shape[0] * c.shape[1]])[:, None]
    o = tl.load(offset + flat * AXES + axis, mask=(flat < channels) & (axis < AXES), other=0)
    last = normal(o, axes[2], MODE, WINDOW).to(axes[2][0].dtype)
    o_w = pick(last, axis == AXES - 1, LAST)
    at, reads = sample(spot[2], o_w, axes[2], MODE, WINDOW)
    reads &= valid & known
    if AXES > 1:
        middle = normal(o, axes[1], MODE, WINDOW).to(axes[1][0].dtype)
        row, reads_row = sample(spot[1], pick(middle, axis == AXES - 2, LAST), axes[1], MODE, WINDOW)
        at += row * axes[2][0]
        reads &= reads_row
    if AXES > 2:
        first = normal(o, axes[0], MODE, WINDOW).to(axes[0][0].dtype)
        layer, reads_layer = sample(spot[0], pick(first, axis == 0, LAST), axes[0], MODE, WINDOW)
        at += layer * (axes[1][0] * axes[2][0])
        reads &= reads_layer
    if LAST:
        at = at * channels + c
    else:
        at += c * (axes[0][0] * axes[1][0] * axes[2][0])
    at = tl.where(reads, image + at, -1)
    # A warp's threads shall lie along the columns; see _gather.py.
    at = tl.max_contiguous(tl.multiple_of(at, [1, 1]), [1, 2])
    return tl.load(x + at, mask=at >= 0, other=0)


@triton.jit
def pick(o, which, LAST: tl.constexpr):
    """The offsets of one axis, out of those of all."""
    one = tl.sum(tl.where(which, o, 0), 1)
    return one[None, :] if LAST else one[:, None]
