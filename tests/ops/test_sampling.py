"""Where an output reads its input: crops, strides and layouts of the integer shift, in place and quantised too."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from shiftconv import ops
from shiftconv.ops.sampling import PLAIN, Axis, axes_of, geometry
from shiftconv.ops.shift import reference, shift_

from . import oracle
from .cases import (
    LAYOUTS,
    MODES,
    array,
    assert_close,
    cases,
    every_mode,
    laid_out,
    native_or_skip,
    normal,
    often,
    poison,
)

raw = torch.ops.shiftconv.shift.default
CROP, STRIDE = ((-2, 1), (1, -3)), (2, 1)
FORMATS = (torch.contiguous_format, torch.channels_last)
REGISTRATION = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("padding_mode", "name"),
    [("reflect", "reflect"), ("symmetric", "symmetric"), ("circular", "wrap"), ("replicate", "edge")],
)
def test_oracle_pads_as_numpy_does(padding_mode, name, size):
    padded = np.pad(np.arange(size), 20, name)
    assert [oracle.pixel(i, size, padding_mode) for i in range(-20, size + 20)] == padded.tolist()


@settings(often, max_examples=300)
@given(cases(whole=True))
def test_forward(case):
    """Bit for bit, as nothing is computed."""
    expected = oracle.forward(array(case.x), case.offset.numpy(), *case.arguments, rounded=True)
    poison(case.grad.shape, case.x.dtype)
    y = ops.shift(case.x, case.offset, *case.arguments)
    assert y.dtype == case.x.dtype
    assert np.array_equal(array(y), expected)
    y = reference(case.x, case.offset, MODES[case.padding_mode], False, case.geometry)
    assert np.array_equal(array(y), expected)


@settings(often, max_examples=300)
@given(cases(whole=True))
def test_gradient(case):
    rest = case.x.shape, case.offset.numpy(), *case.arguments
    grad = array(case.grad)
    expected, scale = oracle.gradient_x(grad, *rest, rounded=True), oracle.gradient_x(abs(grad), *rest, rounded=True)
    x = case.x.detach().requires_grad_()
    y = ops.shift(x, case.offset, *case.arguments)
    poison(x.shape, x.dtype)
    assert_close(torch.autograd.grad(y, x, case.grad)[0], expected, scale, case.offset)
    grad_x = reference(case.grad, case.offset, MODES[case.padding_mode], True, case.geometry)
    assert_close(grad_x, expected, scale, case.offset)


@every_mode
def test_crop_is_what_slicing_leaves(padding_mode):
    x, offset = normal((2, 5, 6, 9)), torch.arange(-5, 5).view(5, 2)
    whole = ops.shift(x, offset, padding_mode)
    assert torch.equal(ops.shift(x, offset, padding_mode, ((1, 2), (3, 0))), whole[:, :, 1:4, 3:])
    assert torch.equal(ops.shift(x, offset, padding_mode, stride=(2, 3)), whole[:, :, ::2, ::3])
    assert torch.equal(ops.shift(x, offset, padding_mode, ((1, 0), (0, 1)), 2), whole[:, :, 1::2, :-1:2])
    assert torch.equal(ops.shift(x, offset, padding_mode, ((0, 0), (0, 0)), 1), whole)


def test_negative_crop_is_padding():
    x, offset = normal((2, 5, 6, 9)), torch.arange(-5, 5).view(5, 2) % 3 - 1
    wide = ops.shift(F.pad(x, (4, 5, 2, 3)), offset)
    assert torch.equal(ops.shift(x, offset, crop=((-1, -2), (-3, -4))), wide[:, :, 1:-1, 1:-1])
    assert torch.equal(ops.shift(x, offset, crop=((7, -3), (0, 0))), wide[:, :, 9:11, 4:-5])  # starts below the image


def test_equals_a_depthwise_convolution_with_stride():
    x, offset = normal((2, 5, 7, 10)), torch.arange(-5, 5).view(5, 2) % 3 - 1
    kernel = torch.zeros(5, 1, 3, 3, dtype=x.dtype)
    kernel[range(5), 0, 1 - offset[:, 0], 1 - offset[:, 1]] = 1
    for padding, stride in itertools.product((0, 1, 2), (1, 2, 3)):
        y = ops.shift(x, offset, crop=[(1 - padding, 1 - padding)] * 2, stride=stride)
        torch.testing.assert_close(y, F.conv2d(x, kernel, None, stride, padding, groups=5))


def test_geometry_of_an_output():
    x = torch.empty(2, 3, 5, 6)
    assert geometry(x, None, 1) == PLAIN
    assert geometry(x, ((1, -2), (0, 3)), (2, 3)) == (5, 1, 3, 2, 6, 0, 1, 3)
    assert axes_of(x, (5, 1, 3, 2, 6, 0, 1, 3)) == [Axis(5, 1, 3, 2), Axis(6, 0, 1, 3)]
    assert axes_of(x, PLAIN) == [Axis(5, 0, 5, 1), Axis(6, 0, 6, 1)]
    with pytest.raises(ValueError, match=r"spatial sizes \[3, 1\] came with x \[2, 3, 5, 6\]"):
        axes_of(x, (5, 1, 3, 2, 6, 0, 1, 3), transpose=True)


@pytest.mark.parametrize("geometry", [[5, 0, 5, 1], [4, 0, 4, 1, 6, 0, 6, 1], [5, 0, 5, 0, 6, 0, 6, 1]], ids=str)
def test_kernels_refuse_a_geometry_of_another_input(geometry):
    native_or_skip("shift", "active_shift")
    x, offset = torch.zeros(2, 3, 5, 6), torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="geometry"):
        raw(x, offset.long(), 0, False, geometry)
    with pytest.raises(RuntimeError, match="geometry"):
        torch.ops.shiftconv.active_shift(x, offset, 0, False, 0, False, geometry)
    with pytest.raises(RuntimeError, match="geometry"):
        torch.ops.shiftconv.active_shift_backward(x, x, offset, 0, False, geometry)


@every_mode
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn, torch.complex64, torch.complex128],
    ids=str,
)
def test_moves_every_dtype(padding_mode, dtype):
    numbers, offset = torch.arange(2 * 4 * 5 * 6).view(2, 4, 5, 6) % 99, torch.arange(-4, 4).view(4, 2)
    expected = torch.from_numpy(oracle.forward(numbers.numpy(), offset.numpy(), padding_mode, CROP, STRIDE, True))
    for format_ in FORMATS:
        x = numbers.to(dtype).contiguous(memory_format=format_)
        y = ops.shift(x, offset, padding_mode, CROP, STRIDE)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=format_)
        assert torch.equal(y.contiguous().view(torch.uint8), expected.to(dtype).view(torch.uint8))


@every_mode
def test_offsets_at_the_ends_of_int64(padding_mode):
    x = normal((1, 2, 5, 6))
    ends = torch.tensor([[2**63 - 1, -(2**63)], [-(2**63), 2**63 - 1]])
    expected = np.empty((1, 2, 4, 8))
    for c, row in enumerate(ends.tolist()):  # beyond what floats can tell apart
        source = [
            [oracle.pixel(first + o * step - w, size, padding_mode) for o in range(count)]
            for w, (size, first, count, step) in zip(row, oracle.window(x.shape, CROP, STRIDE), strict=True)
        ]
        for (i, a), (j, b) in itertools.product(enumerate(source[0]), enumerate(source[1])):
            expected[0, c, i, j] = 0 if a is None or b is None else x[0, c, a, b]
    for run in (raw, reference):
        y = run(x, ends, MODES[padding_mode], False, geometry(x, CROP, STRIDE))
        assert np.array_equal(y.numpy(), expected[:, :, : y.shape[2], : y.shape[3]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 1, 5, 6), (2, 3, 1, 1), (2, 3, 4), (1, 2, 3, 1, 4)], ids=str)
def test_strides_are_those_that_were_foretold(shape, layout):
    x, offset = normal(shape, layout=layout), torch.ones(shape[1], len(shape) - 2, dtype=torch.long)
    for crop, stride in ((None, 1), (None, 2), ([(-1, -1)] * (len(shape) - 2), 1)):
        with FakeTensorMode() as mode:
            foretold = ops.shift(mode.from_tensor(x), mode.from_tensor(offset), crop=crop, stride=stride)
        assert ops.shift(x, offset, crop=crop, stride=stride).stride() == foretold.stride()
        assert reference(x, offset, 0, False, geometry(x, crop, stride)).stride() == foretold.stride()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
def test_registration_is_sound(layout, transpose):
    x, offset = normal((2, 4, 3, 6) if transpose else (2, 4, 5, 6), layout=layout), torch.arange(-4, 4).view(4, 2)
    numbers = [5, -1, 3, 2, 6, 1, 6, 1]
    torch.library.opcheck(
        raw,
        (x, offset, 1, transpose, numbers),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = ops.shift(x, torch.ones(shape[1], len(shape) - 2, dtype=torch.long), "reflect", stride=3)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (*shape[:2], *(-(-n // 3) for n in shape[2:]))
    assert grad.shape == shape


class TestInPlace:
    # The kernel tells planes that lie in a few lines of cache from larger ones.
    SHAPES = ((2, 7, 5), (2, 7, 1030), (2, 7, 5, 6), (1, 7, 37, 41), (1, 7, 2, 5, 3), (1, 7, 11, 12, 13))

    @every_mode
    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_moves_the_first_channels(self, shape, layout, padding_mode):
        before, columns = normal(shape, 0, torch.bfloat16), len(shape) - 2
        for moving, reach in ((0, 1), (1, 2), (4, 50), (7, 5), (7, 2**40)):
            numbers = np.random.default_rng(reach).integers(-reach, reach + 1, (moving, columns))
            expected = array(before)
            if moving:
                expected[:, :moving] = oracle.forward(expected[:, :moving], numbers, padding_mode, rounded=True)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                x = laid_out(before.to(dtype, copy=True), layout)
                assert shift_(x, torch.from_numpy(numbers), padding_mode) is x
                assert np.array_equal(array(x), expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.complex64, torch.complex128], ids=str)
    def test_moves_every_dtype(self, dtype):
        for shape in ((2, 4, 5, 6), (2, 4, 37, 41)):
            x, offset = (normal(shape) * 50).to(dtype), torch.arange(-4, 4).view(4, 2)
            assert torch.equal(shift_(x.clone(), offset), ops.shift(x, offset))

    @pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 4), (2, 3, 0)], ids=str)
    def test_empty(self, shape):
        assert shift_(torch.zeros(shape), torch.ones(shape[1], 1, dtype=torch.long)).shape == shape

    def test_registration_is_sound(self):
        offset = torch.arange(-2, 2).view(2, 2)
        for layout in ("contiguous", "channels last"):
            arguments = (normal((2, 4, 5, 6), layout=layout), offset, 3)
            torch.library.opcheck(torch.ops.shiftconv.shift_.default, arguments, test_utils=REGISTRATION)

    def test_is_noticed_by_automatic_differentiation(self):
        w, offset = normal((1, 3, 4, 4)).requires_grad_(), torch.ones(3, 2, dtype=torch.long)
        y = w.sigmoid()  # its gradient needs its result
        with torch.no_grad():
            shift_(y, offset)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_compiles_in_one_graph(self):
        x, offset = normal((2, 4, 5, 6)), torch.arange(-3, 3).view(3, 2)

        def f(x):
            return shift_(x * 2, offset, "circular") + 1

        with torch.no_grad():
            torch._dynamo.reset()
            assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))

    def test_refuses_what_it_would_spoil(self):
        x, offset = torch.zeros(2, 3, 4, 4), torch.ones(3, 2, dtype=torch.long)
        with pytest.raises(RuntimeError, match=r"no gradient; use shift, or torch.no_grad\(\)"):
            shift_(x.requires_grad_(), offset)
        with pytest.raises(RuntimeError, match=r"single memory location|API call failed"):  # torch 2.11 says no more
            shift_(torch.zeros(2, 1, 4, 4).expand(2, 3, 4, 4), offset)
        with pytest.raises(ValueError, match=r"K <= C channels of x \[N, C, \*S\], got \[3, 2\] for x \[2, 2, 4, 4\]"):
            shift_(torch.zeros(2, 2, 4, 4), offset)
        with pytest.raises(TypeError, match=r"integer offsets, got torch\.float32"):
            shift_(torch.zeros(2, 3, 4, 4), offset.float())
        with pytest.raises(ValueError, match="did you mean 'reflect'"):
            shift_(torch.zeros(2, 3, 4, 4), offset, "reflec")  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("offset", [[[1, 1]] * 3, torch.tensor(1)], ids=["list", "number"])
    def test_errors_name_what_was_expected_and_what_came(self, offset):
        with pytest.raises((TypeError, ValueError), match="offset"):
            shift_(torch.zeros(2, 3, 4, 4), offset)


class TestQuantised:
    KINDS = ((torch.quint8, (0, 128, 255)), (torch.qint8, (-128, 3, 127)), (torch.qint32, (0, 7, -(2**31))))

    @every_mode
    @pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:")
    def test_zeros_are_the_zero_point(self, padding_mode):
        offset = torch.arange(-3, 3).view(3, 2)
        for (dtype, zero_points), format_ in itertools.product(self.KINDS, FORMATS):
            for zero_point, (crop, stride) in itertools.product(zero_points, ((None, 1), (CROP, STRIDE))):
                x = torch.quantize_per_tensor(normal((2, 3, 5, 6)).float() * 30, 0.25, zero_point, dtype)
                x = x.contiguous(memory_format=format_)
                numbers = x.int_repr().long().numpy() - zero_point
                expected = (
                    oracle.forward(numbers, offset.numpy(), padding_mode, crop, stride, rounded=True) + zero_point
                )
                for shift, by in ((ops.shift, offset), (ops.sparse_shift, offset + 0.25)):
                    y = shift(x, by, padding_mode, crop, stride)
                    assert (y.dtype, y.q_scale(), y.q_zero_point()) == (dtype, 0.25, zero_point)
                    assert y.is_contiguous(memory_format=format_)
                    assert np.array_equal(y.int_repr().numpy(), expected)

    @pytest.mark.filterwarnings("ignore:.*quantize_per_channel.*:")
    def test_refuses_a_zero_point_per_channel(self):
        x = torch.quantize_per_channel(torch.zeros(1, 2, 3), torch.ones(2), torch.zeros(2), 1, torch.quint8)
        with pytest.raises(TypeError, match=r"quantised as a whole, got torch\.per_channel"):
            ops.shift(x, torch.ones(2, 1, dtype=torch.long))

    @pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:")
    @pytest.mark.parametrize("shift", [ops.shift, shift_])
    def test_other_kinds_of_tensors_are_moved_or_refused(self, shift):
        dense, offset = torch.ones(1, 2, 3), torch.ones(2, 1, dtype=torch.long)
        x = torch.quantize_per_tensor(dense, 0.1, 10, torch.quint8) if shift is shift_ else dense.to_sparse()
        with pytest.raises(TypeError):
            shift(x, offset)


@pytest.mark.slow
def test_indexes_past_two_to_the_31():
    native_or_skip("shift")
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if free is None or int(free[1]) < 6 << 20:
        pytest.skip("needs 6 GiB of free memory")
    x = torch.zeros(1, 3, 29_000, 25_000, dtype=torch.int8)
    x[0, 2, -2, -2] = 7
    offset = torch.tensor([[0, 0], [0, 0], [1, -1]])
    y = raw(x, offset, MODES["zeros"], False, [29_000, 28_990, 10, 1, 25_000, 24_990, 10, 1])
    assert y.nonzero().tolist() == [[0, 2, 9, 7]]
    assert y[0, 2, 9, 7] == 7
    y = shift_(x, offset)
    assert y[0, 2, -1, -3] == 7
    assert y[0, 2, -2:].sum() == 7
