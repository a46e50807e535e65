"""Active shift against matrices written out in NumPy, torch's own checks of derivatives, and the originals."""

import functools
import itertools
import math
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftconv import ops
from shiftconv.ops.active_shift import reference, reference_backward

from . import oracle
from .cases import (
    MODES,
    Case,
    array,
    assert_close,
    cases,
    check_forward,
    check_gradients,
    every_mode,
    native_or_skip,
    normal,
    often,
    originals,
    poison,
    recover_offset,
)

raw, raw_backward = torch.ops.shiftconv.active_shift.default, torch.ops.shiftconv.active_shift_backward.default
WINDOWED = {"crop": ((-1, 0), (1, -2)), "stride": 2}
every_window = pytest.mark.parametrize("window", [{}, WINDOWED], ids=["plain", "windowed"])


@settings(often, max_examples=300)
@given(cases())
def test_forward(case):
    poison(case.grad.shape, case.x.dtype)
    check_forward(case, ops.active_shift(case.x, case.offset, *case.arguments))


@settings(often, max_examples=300)
@given(cases(), st.booleans())
def test_gradients(case, of_higher_order):
    """By the kernel that computes both at once, and by the operators that are differentiable again."""
    x, offset = case.x.detach().requires_grad_(), case.offset.detach().requires_grad_()
    y = ops.active_shift(x, offset, *case.arguments)
    poison(x.shape, x.dtype)
    create_graph = of_higher_order and x.dtype.itemsize > 2
    check_gradients(case, *torch.autograd.grad(y, (x, offset), case.grad, create_graph=create_graph))


@settings(often, max_examples=300)
@given(cases(), st.booleans())
def test_reference(case, rounded):
    mode, window = MODES[case.padding_mode], case.geometry
    check_forward(case, reference(case.x, case.offset, mode, rounded, 0, False, window), rounded)
    grad_x, grad_offset = reference_backward(case.grad, case.x, case.offset, mode, rounded, window)
    check_gradients(case, grad_x, grad_offset, rounded=rounded)


@settings(often, max_examples=300)
@given(cases(), st.booleans(), st.integers(0, 7), st.booleans())
def test_raw_operator(case, rounded, derivative, transpose):
    """All derivatives and their transposes, of which the higher orders are made."""
    derivative &= (1 << case.offset.shape[1]) - 1
    x = case.grad if transpose else case.x
    rest = case.axes, array(case.offset), case.padding_mode, rounded, derivative
    expected = oracle.apply(oracle.matrices(*rest), array(x), transpose)
    scale = oracle.apply(oracle.matrices(*rest, magnitude=True), abs(array(x)), transpose)
    for run in (raw, reference):
        poison(expected.shape, x.dtype)
        y = run(x, case.offset, MODES[case.padding_mode], rounded, derivative, transpose, case.geometry)
        assert_close(y, expected, scale, case.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    "shape",
    [(1, 40, 56, 56), (2, 96, 14, 14), (8, 40, 7, 7), (1, 5, 63, 61), (2, 4, 3, 500), (1, 9, 9, 17, 19)],
    ids=str,
)
def test_sizes_of_networks(shape, layout, dtype):
    """Planes of many vectors, channels enough for those of equal cells to be worked on together."""
    crop, generator = None, np.random.default_rng(0)
    for padding_mode, reach, stride in (("zeros", 1.5, 1), ("zeros", 1.5, 2), ("reflect", 4, 1), ("circular", 40, 1)):
        offset = torch.from_numpy(generator.uniform(-reach, reach, (shape[1], len(shape) - 2))).float()
        offset[::5] = offset[::5].round()
        x = normal(shape, 0, dtype, layout)
        grad = normal([*shape[:2], *(-(-n // stride) for n in shape[2:])], 1, dtype, layout)
        case = Case(x.requires_grad_(), offset.requires_grad_(), grad, padding_mode, crop, stride)
        y = ops.active_shift(x, offset, padding_mode, crop, stride)
        check_forward(case, y)
        check_gradients(case, *torch.autograd.grad(y, (x, offset), grad))


def test_equals_the_originals():
    """The kernels of the Active Shift paper, run, and the exact statement of what ActiveSparseShifts meant."""
    names = []
    for name, (x, offset, grad, *expected), arguments in originals("active"):
        names.append(name)
        x.requires_grad_()
        offset.requires_grad_()
        y = ops.active_shift(x, offset, *arguments)
        for actual, array_ in zip((y, *torch.autograd.grad(y, (x, offset), grad)), expected, strict=True):
            torch.testing.assert_close(actual, array_, msg=lambda text, name=name: f"{name}: {text}")
    assert len(names) > 50
    assert sum("asl" in name for name in names) == 5


@every_mode
def test_pixels_as_written_down(padding_mode):
    """Numbers by hand, so that the oracle's sign, rounding and padding do not stand on themselves alone."""
    x = torch.tensor([[[1.0, 2, 4, 8]]])
    outside = {"zeros": 0, "replicate": 1, "circular": 8, "reflect": 2, "symmetric": 1}[padding_mode]
    y = ops.active_shift(x, torch.tensor([[0.25]]), padding_mode)  # a quarter of the left neighbour
    assert y.flatten().tolist() == [0.75 + 0.25 * outside, 1.75, 3.5, 7]
    y = ops.active_shift(x, torch.tensor([[-1.5]]), padding_mode, [(1, 0)], 2)  # at 2.5 and 4.5
    beyond = {"zeros": 0, "replicate": (8 + 8) / 2, "circular": (1 + 2) / 2, "reflect": (4 + 2) / 2}
    assert y.flatten().tolist() == [6, beyond.get(padding_mode, (8 + 4) / 2)]


@every_mode
@every_window
def test_derivatives_of_any_order(padding_mode, window):
    for shape in ((1, 2, 3, 4), (2, 1, 4, 1)):
        x = normal(shape).requires_grad_()
        whole = torch.tensor([[1.0, -2.0], [0.0, 3.0]])[: shape[1]]
        offset = (whole + 0.1 + 0.8 * torch.rand(whole.shape, generator=torch.Generator().manual_seed(0))).double()

        def active(x, offset):
            return ops.active_shift(x, offset, padding_mode, **window)

        def slopes(x, offset, wanted):
            grads = torch.autograd.grad(active(x, offset).square().sum(), (x, offset), create_graph=True)
            return grads[wanted]

        assert torch.autograd.gradcheck(active, (x, offset.requires_grad_()))
        assert torch.autograd.gradgradcheck(active, (x, offset))
        for wanted in (0, 1):  # one by one, as the checks pass over outputs that have lost their graph
            assert torch.autograd.gradcheck(functools.partial(slopes, wanted=wanted), (x, offset))


@pytest.mark.parametrize("shape", [(1, 2, 5), (1, 1, 2, 3, 2)], ids=["1-D", "3-D"])
def test_derivatives_in_other_ranks(shape):
    x, offset = normal(shape).requires_grad_(), (normal([shape[1], len(shape) - 2], 1) * 2).requires_grad_()
    for padding_mode in get_args(ops.PaddingMode):
        active = functools.partial(ops.active_shift, padding_mode=padding_mode)
        assert torch.autograd.gradcheck(active, (x, offset))
        assert torch.autograd.gradgradcheck(active, (x, offset))


@every_mode
def test_is_continuous_where_offsets_are_whole(padding_mode):
    """The original jumps there; at the whole number it is the integer shift, bit for bit."""
    x = normal((2, 7, 5, 6))
    whole = torch.arange(-7, 7).view(7, 2)
    at = ops.shift(x, whole, padding_mode)
    assert torch.equal(ops.active_shift(x, whole.double(), padding_mode), at)
    for nudge in ((1e-9, 1e-9), (-1e-9, 1e-9), (1e-9, -1e-9), (-1e-9, -1e-9)):
        near = ops.active_shift(x, whole + torch.tensor(nudge, dtype=torch.float64), padding_mode)
        torch.testing.assert_close(near, at, rtol=0, atol=1e-7)


@every_mode
def test_trained_by_sgd_it_finds_the_offset(padding_mode):
    offset, error = recover_offset(ops.active_shift, padding_mode)
    assert error < 1e-6
    torch.testing.assert_close(offset, torch.tensor([[2.0, -1.0]] * 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("run", [raw, reference])
def test_what_is_not_finite_stays_local(run):
    """It reaches the two taps of an axis, however small their weights, and of a whole-number offset only the one."""
    native_or_skip("active_shift", "shift")

    @settings(often, max_examples=300)
    @given(case=cases(), transpose=st.booleans(), value=st.sampled_from([math.inf, -math.inf, math.nan]))
    def check(case, transpose, value):
        x = (case.grad if transpose else case.x).contiguous().clone()
        x.flatten()[x.numel() // 2] = x.flatten()[-1] = value
        check_locality(run, case, x, transpose)

    check()


@every_mode
def test_what_is_not_finite_stays_local_in_planes_of_equal_cells(padding_mode):
    """These are worked on together, many to a loop."""
    native_or_skip("active_shift", "shift")
    places = (..., -1), (..., 0), (..., -1, slice(None)), (..., 0, slice(None)), (..., slice(1, None, 4), slice(5, 7))
    offsets = [1.0, 2.0], [-1.0, -2.0], [1.0, 0.5], [0.25, 2.0], [-0.5, 0.75]
    for place, offset in itertools.product(places, offsets):
        x = torch.zeros(3, 20, 9, 11)
        x[:, ::3][place] = math.inf
        case = Case(x, torch.tensor([offset] * 20), torch.ones_like(x), padding_mode, None, 1)
        for transpose in (False, True):
            check_locality(raw, case, x, transpose)


def check_locality(run, case, x, transpose):
    mode, local = MODES[case.padding_mode], ~x.isfinite().numpy()
    weights = oracle.matrices(case.axes, array(case.offset), case.padding_mode)
    found = ~run(x, case.offset, mode, False, 0, transpose, case.geometry).isfinite().numpy()
    assert not (found & ~(oracle.apply(taps(case), local, transpose) > 0)).any()
    assert not ((oracle.apply(weights, local, transpose) > 1e-3) & ~found).any()
    if run is raw and not transpose:
        _, grad_offset = raw_backward(torch.ones_like(case.grad), x, case.offset, mode, False, case.geometry)
        for axis in range(grad_offset.shape[1]):
            reached = (oracle.apply(taps(case, axis), local) > 0).any((0, *range(2, x.ndim)))
            assert not (~grad_offset[:, axis].isfinite().numpy() & ~reached).any()


def taps(case, slope=None):
    """Matrices of ones where an axis has taps: two, but of a whole-number offset one, unless it is the derivative's."""
    return [
        [
            oracle.axis_matrix(axis, w, case.padding_mode, "nearest" if w == np.floor(w) and a != slope else "taps")
            for a, (axis, w) in enumerate(zip(case.axes, row, strict=True))
        ]
        for row in array(case.offset)
    ]


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bit_numbers(dtype, format_):
    """A whole image of ones folds into one pixel, and a slope of -1 adds up: 16-bit sums would stop at 256 or 2048."""
    ones = torch.ones(1, 3, 50, 60, dtype=dtype).contiguous(memory_format=format_)
    far, none = torch.full((3, 2), 99.5), torch.full((3, 2), 0.5)
    ramp = torch.arange(60, dtype=dtype).expand(1, 3, 50, 60).contiguous(memory_format=format_)
    for run in (raw_backward, reference_backward):
        grad_x, _ = run(ones, ones, far, MODES["replicate"], False)
        assert (grad_x[..., 0, 0] == torch.tensor(3000).to(dtype)).all()
        assert grad_x.count_nonzero() == 3
        _, grad_offset = run(ones, ramp, none, MODES["replicate"], False)
        assert grad_offset.tolist() == [[0, -50 * 59]] * 3


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_empty(shape, stride):
    x, offset = torch.zeros(shape, requires_grad=True), torch.ones(shape[1], len(shape) - 2, requires_grad=True)
    for shift in (ops.active_shift, ops.sparse_shift):
        y = shift(x, offset, "circular", stride=stride)
        assert y.shape == (*shape[:2], *(-(-n // stride) for n in shape[2:]))
        grad_x, grad_offset = torch.autograd.grad(y.sum(), (x, offset))
        assert grad_x.shape == shape
        assert torch.equal(grad_offset, torch.zeros_like(offset))


@every_mode
def test_size_one_axes_read_their_only_pixel(padding_mode):
    x, offset = torch.ones(1, 1, 1, 1), torch.full((1, 2), 0.25, requires_grad=True)
    y = ops.active_shift(x, offset, padding_mode)
    (grad,) = torch.autograd.grad(y.sum(), offset)
    assert y.item() == (0.75**2 if padding_mode == "zeros" else 1)
    assert grad.tolist() == [[-0.75, -0.75] if padding_mode == "zeros" else [0, 0]]


@pytest.mark.slow
def test_indexes_past_two_to_the_31():
    native_or_skip("active_shift")
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if free is None or int(free[1]) < 14 << 20:
        pytest.skip("needs 14 GiB of free memory")
    x = torch.zeros(1, 43_000, 250, 200, dtype=torch.float16)
    x[0, -1, -2, -3] = 8
    x[0, -1, -2, -4] = 2
    offset = torch.zeros(43_000, 2)
    offset[-1] = torch.tensor([0.5, -1.25])
    y = raw(x, offset, MODES["zeros"], False, 0, False)
    assert y[0, -1, -3:, -6:].tolist() == [[0] * 6, [0.25, 1.75, 3, 0, 0, 0], [0.25, 1.75, 3, 0, 0, 0]]
    assert y[0, -1, -4:].sum() == 10
    del y
    grad_x, grad_offset = raw_backward(x, x, offset, MODES["zeros"], False)
    assert grad_x[0, -1, -3:, -5:].tolist() == [[0, 0, 0.75, 3.25, 1], [0, 0, 0.75, 3.25, 1], [0] * 5]
    assert grad_offset[-2:].tolist() == [[0, 0], [-12, 8]]
