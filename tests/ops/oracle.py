"""What the shifts compute, written out in NumPy as one matrix per channel and axis; nothing of the package is used.

A padding mode is the tile of pixel numbers that repeats without end; positions are exact fractions. The gradient of the
input is the transposed matrices', that of an offset has the two taps of its axis weigh (+1, -1).
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Stride = int | Sequence[int]
PADDING_MODES = ("zeros", "replicate", "circular", "reflect", "symmetric")


def pixel(position, size, padding_mode):
    """Number of the pixel that an axis shows at any whole ``position``; None for the zero outside."""
    inside = range(size)
    if padding_mode == "zeros":
        return position if position in inside else None
    if padding_mode == "replicate":
        return min(max(position, 0), size - 1)
    tile = [*inside]
    if padding_mode == "reflect":
        tile += inside[-2:0:-1]
    elif padding_mode == "symmetric":
        tile += inside[::-1]
    return tile[position % len(tile)]


def window(shape, crop=None, stride: Stride = 1):
    """Per spatial axis the input size, the first position, the number of positions and their distance."""
    sizes = shape[2:]
    crops = crop or [(0, 0)] * len(sizes)
    strides = [stride] * len(sizes) if isinstance(stride, int) else stride
    return [
        (n, low, len(range(low, n - high, step)), step)
        for n, (low, high), step in zip(sizes, crops, strides, strict=True)
    ]


@functools.lru_cache(4096)
def axis_matrix(axis, offset, padding_mode, weigh="linear"):
    """``[outputs, inputs]`` of one axis.

    ``weigh`` is ``linear``, ``nearest``, ``slope``, which is the derivative by the offset, or ``taps``: 1 for either.
    """
    size, first, count, step = axis
    offset = Fraction(float(offset))
    if weigh == "nearest":
        offset = Fraction(round(offset))  # Python rounds halves to even
    matrix = np.zeros((count, size))
    for o in range(count):
        t = first + o * step - offset
        cell = math.floor(t)
        weights = {"slope": (1, -1), "taps": (1, 1)}.get(weigh, (float(1 - t + cell), float(t - cell)))
        for at, weight in zip((cell, cell + 1), weights, strict=True):
            i = pixel(at, size, padding_mode)
            if i is not None:
                matrix[o, i] += weight
    return matrix


def matrices(axes, offset, padding_mode, rounded=False, derivative=0, magnitude=False):
    """Per channel a matrix per axis, for real or whole offsets ``[C, D]``.

    A set bit of ``derivative`` asks for the derivative by that axis. With ``magnitude`` all taps weigh 1: applied to
    magnitudes that is what rounding errors are relative to, those of the weights included.
    """
    linear, slope = ("taps", "taps") if magnitude else ("linear", "slope")
    plain = "nearest" if rounded and not derivative else linear
    weigh = [slope if derivative >> a & 1 else plain for a in range(3)]
    return [
        [axis_matrix(axis, w, padding_mode, weigh[a]) for a, (axis, w) in enumerate(zip(axes, row, strict=True))]
        for row in offset
    ]


def apply(maps, x, transpose=False):
    """Every channel through its matrices, or through their transposes; float64."""
    columns = []
    for c, per_axis in enumerate(maps):
        y = np.asarray(x[:, c], dtype=np.float64)
        for a, matrix in enumerate(per_axis):
            y = np.moveaxis(np.tensordot(y, matrix, ([1 + a], [0 if transpose else 1])), -1, 1 + a)
        columns.append(y)
    return np.stack(columns, 1)


def forward(x, offset, padding_mode, crop=None, stride: Stride = 1, rounded=False, magnitude=False):
    """``[N, C, *S]`` of the active, or with ``rounded`` of the sparse and the whole-number, shift."""
    return apply(matrices(window(x.shape, crop, stride), offset, padding_mode, rounded, 0, magnitude), x)


def gradient_x(grad, shape, offset, padding_mode, crop=None, stride: Stride = 1, rounded=False, magnitude=False):
    """Transpose of :func:`forward`, for an input of ``shape``."""
    return apply(matrices(window(shape, crop, stride), offset, padding_mode, rounded, 0, magnitude), grad, True)


def gradient_offset(grad, x, offset, padding_mode, crop=None, stride: Stride = 1, magnitude=False):
    """``[C, D]``: how the sum of ``grad * forward`` answers to each offset, in the cell ``floor(-offset)``."""
    axes = window(x.shape, crop, stride)
    changes = [apply(matrices(axes, offset, padding_mode, False, 1 << a, magnitude), x) for a in range(len(axes))]
    return np.stack([(grad * change).sum(axis=(0, *range(2, x.ndim))) for change in changes], 1)
