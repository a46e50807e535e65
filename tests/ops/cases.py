"""Calls of the shifts that hypothesis draws, the originals' calls, and how an answer is compared with the oracle's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from shiftconv.ops import native

from . import oracle

LAYOUTS = ("contiguous", "channels last", "sliced", "sliced, channels last", "transposed", "expanded", "within storage")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
MODES = {mode: code for code, mode in enumerate(oracle.PADDING_MODES)}
every_mode = pytest.mark.parametrize("padding_mode", oracle.PADDING_MODES)
often = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

NEAR = st.one_of(
    st.floats(-3, 3, width=16),
    st.integers(-4, 4).map(float),
    st.integers(-9, 9).map(lambda k: k / 2),
    st.sampled_from([1e-6, -1e-6, 1e-30, -1e-30, 0.999, -0.999, -0.0, 1 - 2**-24, 2**-24 - 1]),
)
FAR = st.one_of(
    st.floats(-40, 40, width=32),
    st.sampled_from([2.0**30, -(2.0**30), 2.0**22 + 0.5, -(2.0**22) - 0.5, 2.0**31 - 128, 1e5, -99999.25]),
)


@dataclass(frozen=True)
class Case:
    """One call; ``x`` and ``grad`` in any layout, ``grad`` as large as the result."""

    x: torch.Tensor
    offset: torch.Tensor
    grad: torch.Tensor
    padding_mode: Any
    crop: list[tuple[int, int]] | None
    stride: int | list[int]

    @property
    def arguments(self) -> Any:
        return self.padding_mode, self.crop, self.stride

    @property
    def axes(self):
        return oracle.window(self.x.shape, self.crop, self.stride)

    @property
    def geometry(self):
        """What the raw operators take."""
        return [] if self.crop is None and self.stride == 1 else [number for axis in self.axes for number in axis]


def laid_out(x, layout):
    """``x`` with other strides; where that leaves gaps they hold NaN, so that to read them is seen."""
    last = LAST.get(x.ndim, torch.contiguous_format)
    if layout == "channels last":
        return x.contiguous(memory_format=last)
    if layout == "transposed":
        axes = [*reversed(range(x.ndim))]
        return x.permute(axes).contiguous().permute(axes)
    if layout == "expanded":
        return x[:1, :1].expand(x.shape)
    if layout == "within storage":
        storage = x.new_full((x.numel() + 8,), float("nan"))
        return storage[3 : 3 + x.numel()].view(x.shape).copy_(x)
    if layout.startswith("sliced"):
        wide = x.new_full([*x.shape[:2], *(2 * n + 1 for n in x.shape[2:])], float("nan"))
        wide = wide.contiguous(memory_format=last) if layout.endswith("last") else wide
        return wide[..., *(slice(1, None, 2) for _ in x.shape[2:])].copy_(x)
    return x


def normal(shape, seed=0, dtype=torch.float64, layout="contiguous"):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return laid_out(torch.from_numpy(numbers).to(dtype), layout)


@st.composite
def windows(draw, sizes):
    """A crop, which may enlarge, or none; and a stride."""
    crop = None
    if draw(st.booleans()):
        lows = [draw(st.integers(-4, n + 2)) for n in sizes]
        extents = [draw(st.integers(1, n + 4)) for n in sizes]
        crop = [(low, n - low - extent) for n, low, extent in zip(sizes, lows, extents, strict=True)]
    each = st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes))
    return crop, draw(st.one_of(st.just(1), st.integers(1, 4), each))


@st.composite
def shapes(draw):
    """``[N, C, *S]``: odd sizes, rows beyond a vector, channels beyond a vector; few pixels, as the oracle is slow."""
    ndim = draw(st.integers(1, 3))
    sizes = [draw(st.sampled_from([1, 2, 3, 5, 7])) for _ in range(ndim)]
    if draw(st.integers(0, 3)) == 0:
        sizes[draw(st.integers(0, ndim - 1))] = draw(st.sampled_from([16, 33, 63]))
    channels = draw(st.sampled_from([1, 2, 3, 7] if ndim > 2 else [1, 2, 3, 7, 20, 33]))
    return [draw(st.sampled_from([1, 2, 3])), channels, *sizes]


@st.composite
def cases(draw, whole=False):
    """Any call; with ``whole`` the offsets are int64."""
    shape, seed, dtype = draw(shapes()), draw(st.integers(0, 2**32)), draw(st.sampled_from(DTYPES))
    # Kernels group the channels of equal offset, so there are fewer values than offsets.
    pool = draw(st.lists(st.one_of(NEAR, NEAR, FAR), min_size=1, max_size=6))
    offset = torch.from_numpy(np.random.default_rng(seed).choice(pool, (shape[1], len(shape) - 2)))
    offset = offset.round().long() if whole else offset.to(draw(st.sampled_from([torch.float32, torch.float64])))
    if draw(st.booleans()):
        offset = offset.T.contiguous().T
    elif draw(st.booleans()):
        offset = offset[:1].expand(offset.shape)
    crop, stride = draw(windows(shape[2:]))
    x = normal(shape, seed + 1, dtype, draw(st.sampled_from(LAYOUTS)))
    out = [*shape[:2], *(axis[2] for axis in oracle.window(shape, crop, stride))]
    grad = normal(out, seed + 2, dtype, draw(st.sampled_from(LAYOUTS)))
    return Case(x, offset, grad, draw(st.sampled_from(oracle.PADDING_MODES)), crop, stride)


def originals(kind):
    """What the kernels of the papers' authors, and ActiveSparseShifts where it is right, computed: name, arrays, call.

    Yields:
        per call its name; x, offset, grad, out, grad_x and grad_offset, float64; padding mode, crop and stride.
    """
    with np.load(Path(__file__).with_name("golden") / "active_shift.npz") as file:
        index, numbers = json.loads(str(file["index"])), file["numbers"]
    at = 0
    for name, shape, crop, stride in index:
        offset = [shape[1], len(shape) - 2]
        out = [*shape[:2], *(axis[2] for axis in oracle.window(shape, crop, stride))]
        arrays = []
        for sizes in (shape, offset, out, out, shape, offset):
            arrays.append(torch.from_numpy(numbers[at : at + np.prod(sizes)].reshape(sizes)))
            at += np.prod(sizes)
        if name.startswith(kind):
            yield name, arrays, (name.rpartition("-")[2], crop, stride)
    assert at == len(numbers)


def native_or_skip(*operators):
    """Load C++ kernels, so that the raw operators run them."""
    try:
        native.compiler()
    except native.NativeError as error:
        pytest.skip(str(error))
    for operator in operators:
        native.load(operator)


def array(tensor):
    return tensor.detach().double().numpy()


def poison(shape, dtype):
    """Leave NaN where the allocator will most likely put a result of this size."""
    for _ in range(2):
        torch.full(shape, float("nan"), dtype=dtype)


def assert_close(actual, expected, scale, offset, arithmetic=None):
    """Equal but for rounding: one of the result, and some of the arithmetic, relative to the sum of magnitudes.

    Args:
        actual: a tensor.
        expected: the oracle's answer.
        scale: the oracle's answer to the magnitudes.
        offset: the offsets; weights are no more precise than they are.
        arithmetic: the dtype of x if it is not that of ``actual``; sums are taken in float32 at least.
    """
    precisions = [min(torch.finfo(arithmetic or actual.dtype).eps, torch.finfo(torch.float32).eps)]
    if offset.is_floating_point():
        precisions.append(torch.finfo(offset.dtype).eps)
    result = torch.finfo(actual.dtype)
    assert actual.shape == expected.shape
    error = np.abs(array(actual) - expected)
    bound = result.eps * np.abs(expected) + 32 * max(precisions) * scale + result.tiny
    assert (error <= bound).all(), f"off by {error.max()}, at most {(error / bound).max()} times the bound"


def check_forward(case, y, rounded=False):
    x, rest = array(case.x), (array(case.offset), *case.arguments)
    scale = oracle.forward(abs(x), *rest, rounded=rounded, magnitude=True)
    assert_close(y, oracle.forward(x, *rest, rounded=rounded), scale, case.offset)
    assert y.dtype == case.x.dtype


def check_gradients(case, grad_x, grad_offset, rounded=False):
    x, grad, rest = array(case.x), array(case.grad), (array(case.offset), *case.arguments)
    scale = oracle.gradient_x(abs(grad), x.shape, *rest, rounded=rounded, magnitude=True)
    assert_close(grad_x, oracle.gradient_x(grad, x.shape, *rest, rounded=rounded), scale, case.offset)
    scale = oracle.gradient_offset(abs(grad), abs(x), *rest, magnitude=True)
    assert_close(grad_offset, oracle.gradient_offset(grad, x, *rest), scale, case.offset, case.x.dtype)
    assert grad_x.dtype == case.x.dtype
    assert grad_offset.dtype == case.offset.dtype


def smooth(padding_mode, channels=2):
    """Smooth random images ``[4, C, 24, 24]``, and what they look like moved by (2, -1)."""
    spectrum = np.fft.fft2(np.random.default_rng(0).standard_normal((4, channels, 24, 24)))
    spectrum[..., 4:-3, :] = spectrum[..., 4:-3] = 0
    x = np.fft.ifft2(spectrum).real
    x /= x.std()
    moved = oracle.forward(x, [[2, -1]] * channels, padding_mode)
    return torch.from_numpy(x).float(), torch.from_numpy(moved).float()


def recover_offset(shift, padding_mode):
    """Plain SGD from (0, 0); the offsets that it ends at, and their mean squared error."""
    x, target = smooth(padding_mode)
    offset = torch.zeros(x.shape[1], 2, requires_grad=True)
    optimizer = torch.optim.SGD([offset], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (shift(x, offset, padding_mode) - target).square().mean().backward()
        optimizer.step()
    return offset.detach(), (shift(x, offset.detach(), padding_mode) - target).square().mean().item()
