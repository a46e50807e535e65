"""The CPU kernels of depthwise convolutions of small maps: sizes, kernels, layouts, dtypes, branches and threads."""

import itertools

import numpy as np
import pytest
import torch

import shiftconv.ops  # noqa: F401  (defines the raw operators)

from .cases import laid_out, native_or_skip, poison

ops = torch.ops.shiftconv
# of a result's rounding, and of sums of wide numbers relative to their magnitudes
TOLERANCE = {
    torch.float64: (1e-15, 1e-14),
    torch.float32: (1e-7, 2e-6),
    torch.bfloat16: (4e-3, 2e-6),
    torch.float16: (5e-4, 2e-6),
}
last = torch.channels_last
both_formats = pytest.mark.parametrize("layout", [torch.contiguous_format, last], ids=["contiguous", "channels_last"])
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Maps [N, C, H, W], kernels and padding (top, bottom, left, right); there are enough channels for this kernel to be in
# charge. Rows are one tile, two, or part of one; channels fill a vector, less, or several; kernels reach over the whole
# map, beside it, or nowhere; padding crops.
CASES = [
    ((2, 33, 14, 14), (47, 47), (23, 23, 23, 23)),
    ((3, 17, 7, 7), (13, 13), (6, 6, 6, 6)),
    ((1, 16, 16, 16), (7, 7), (3, 3, 3, 3)),
    ((2, 5, 1, 1), (3, 3), (1, 1, 1, 1)),
    ((2, 5, 15, 9), (5, 4), (4, 0, 0, 3)),
    ((2, 33, 28, 31), (5, 13), (2, 2, 6, 6)),
    ((1, 16, 27, 20), (41, 3), (22, 18, 1, 1)),
    ((1, 31, 41, 33), (7, 4), (5, 1, 1, 2)),
    ((1, 48, 32, 15), (3, 3), (1, 1, 1, 1)),
    ((3, 17, 13, 2), (2, 51), (0, 1, 30, 20)),
    ((1, 33, 3, 16), (1, 1), (0, 0, 0, 0)),
    ((2, 16, 10, 12), (3, 4), (-2, -1, -3, 1)),
    ((2, 18, 16, 1), (51, 1), (40, 10, 0, 0)),
    ((1, 20, 14, 16), (14, 9), (0, 0, 0, 0)),
    ((2, 20, 3, 2), (5, 6), (9, 8, 7, 9)),
    ((1, 3, 4, 4), (3, 3), (10, -8, 1, 1)),
]
CROSS = [((47, 5), (23, 23, 2, 2)), ((5, 47), (2, 2, 24, 22)), ((5, 5), (2, 2, 2, 2))]


@pytest.fixture(autouse=True, scope="module")
def _native():
    native_or_skip("depthwise", "depthwise_weight")


def sample(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    return (
        torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype).contiguous(memory_format=layout)
    )


def out_shape(shape, kernel, padding):
    top, bottom, left, right = padding
    return *shape[:2], shape[2] + top + bottom - kernel[0] + 1, shape[3] + left + right - kernel[1] + 1


def meeting(x, y, u, v, padding):
    """The pixels of x and of y that the tap (u, v) connects."""
    pixels = []
    for size, out, shift in zip(x.shape[2:], y.shape[2:], (u - padding[0], v - padding[2]), strict=True):
        begin, end = max(0, -shift), min(out, size - shift)
        pixels.append((slice(begin + shift, max(begin, end) + shift), slice(begin, max(begin, end))))
    (x_rows, y_rows), (x_columns, y_columns) = pixels
    return x[..., x_rows, x_columns], y[..., y_rows, y_columns]


def convolved(x, weight, padding):
    """A convolution and the sums of magnitudes in float64, tap by tap."""
    x, weight = x.double(), weight.double()
    truth, scale = x.new_zeros(2, *out_shape(x.shape, weight.shape[2:], padding))
    for u, v in itertools.product(*map(range, weight.shape[2:])):
        tap = weight[:, :, u, v].unsqueeze(-1)
        for y, a, b in ((truth, x, tap), (scale, x.abs(), tap.abs())):
            pixels, results = meeting(a, y, u, v, padding)
            results += pixels * b
    return truth, scale


def weight_gradient(x, grad, kernel, padding):
    """The gradient to a kernel and the sums of magnitudes in float64, tap by tap."""
    x, grad = x.double(), grad.double()
    truth, scale = x.new_zeros(2, x.shape[1], 1, *kernel)
    for u, v in itertools.product(*map(range, kernel)):
        a, b = meeting(x, grad, u, v, padding)
        truth[:, 0, u, v] = (a * b).sum((0, 2, 3))
        scale[:, 0, u, v] = (a * b).abs().sum((0, 2, 3))
    return truth, scale


def assert_exact(actual, dtype, truth, scale):
    rounding, sums = TOLERANCE[dtype]
    assert actual.dtype == dtype
    assert actual.shape == truth.shape
    error = (actual.double() - truth).abs()
    bound = rounding * truth.abs() + sums * scale
    assert (error <= bound).all(), f"off by up to {(error / scale.clamp_min(1e-30)).max():.2e} of the magnitudes"


def flat(paddings):
    return [number for padding in paddings for number in padding]


def check(shape, kernel, padding, dtype=torch.float32, layout=torch.contiguous_format):
    """All three operators with one branch."""
    x, weight = sample(shape, dtype, layout), sample((shape[1], 1, *kernel), dtype, seed=1)
    expected = convolved(x, weight, padding)
    poison(expected[0].shape, dtype)
    y = ops.depthwise_sum_direct([x], [weight], None, padding, False)
    assert_exact(y, dtype, *expected)
    assert y.is_contiguous(memory_format=layout)
    (each,) = ops.depthwise_each_direct(x, [weight], padding, False)
    assert torch.equal(each, y)
    assert each.stride() == y.stride()
    grad = sample(y.shape, dtype, layout, 2)
    poison(weight.shape, dtype)
    (weight_grad,) = ops.depthwise_weight_direct([x], [grad], padding)
    assert_exact(weight_grad, dtype, *weight_gradient(x, grad, kernel, padding))


@both_formats
@every_dtype
@pytest.mark.parametrize(("shape", "kernel", "padding"), CASES)
def test_equals_the_oracle(shape, kernel, padding, dtype, layout):
    check(shape, kernel, padding, dtype, layout)


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_every_size(dtype, layout):
    for size in range(1, 17):
        for shape in ((1, 17, size, 17 - size), (1, 16, size, 16)):
            check(shape, (5, 3), (2, 2, 1, 1), dtype, layout)
        check((2, 17, 3, size), (2, 25), (1, 0, 14, 10), dtype, layout)


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_of_other_sizes_than_maps(dtype, layout):
    for size, out in itertools.product((1, 7, 9, 16), repeat=2):
        check((1, 17, 4, size), (3, 20), (1, 1, 8, out + 19 - size - 8), dtype, layout)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49])
def test_any_number_of_channels(channels):
    for layout in (torch.contiguous_format, last):
        check((2, channels, 6, 2), (3, 3), (1, 1, 1, 1), torch.float32, layout)
        check((2, channels, 6, 2), (3, 3), (1, 1, 1, 1), torch.bfloat16, layout)


def cross(xs, dtype, layout, size=14, channels=18):
    x = [sample((3, channels, size, size), dtype, layout, b) for b in range(xs)]
    weight = [sample((channels, 1, *kernel), dtype, seed=9 + b) for b, (kernel, _) in enumerate(CROSS)]
    return x, weight, [padding for _, padding in CROSS]


@both_formats
@every_dtype
@pytest.mark.parametrize("xs", [1, 3])
def test_sum_of_branches(xs, dtype, layout):
    x, weight, padding = cross(xs, dtype, layout)
    bias = sample((18,), dtype, seed=5)
    parts = [convolved(x[b % xs], weight[b], padding[b]) for b in range(3)]
    truth, scale = (sum(part[i] for part in parts) for i in range(2))
    y = ops.depthwise_sum_direct(x, weight, bias, flat(padding), False)
    bias = bias.double()[:, None, None]
    assert_exact(y, dtype, truth + bias, scale + bias.abs())


@both_formats
@every_dtype
def test_branches_by_themselves(dtype, layout):
    (x,), weight, padding = cross(1, dtype, layout)
    for y, w, pads in zip(ops.depthwise_each_direct(x, weight, flat(padding), False), weight, padding, strict=True):
        assert_exact(y, dtype, *convolved(x, w, pads))
        assert y.stride() == x.stride()


@both_formats
@every_dtype
@pytest.mark.parametrize(("xs", "grads"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_weight_gradients_of_branches(xs, grads, dtype, layout):
    x, _, padding = cross(xs, dtype, layout)
    grad = [sample((3, 18, 14, 14), dtype, layout, 20 + b) for b in range(grads)]
    for b, weight in enumerate(ops.depthwise_weight_direct(x, grad, flat(padding))):
        assert_exact(weight, dtype, *weight_gradient(x[b % xs], grad[b % grads], CROSS[b][0], padding[b]))
        assert weight.is_contiguous()


@every_dtype
def test_dead_taps(dtype):
    """Rows, columns and single taps that are zero in some channels or in all; branches that cancel each other."""
    (x,), weight, padding = cross(1, dtype, last)
    for w in weight:
        w[:, :, ::3] = 0
        w[:, :, :, 1:4:2] = 0
        w[::2, :, 1] = 0
        w[sample(w.shape, seed=3) > 0] = 0
    for kernels in (weight, [torch.zeros_like(w) for w in weight]):
        parts = [convolved(x, w, pads) for w, pads in zip(kernels, padding, strict=True)]
        truth, scale = (sum(part[i] for part in parts) for i in range(2))
        assert_exact(ops.depthwise_sum_direct([x], kernels, None, flat(padding), False), dtype, truth, scale)
    opposite = ops.depthwise_sum_direct([x], [weight[0], -weight[0]], None, flat([padding[0]] * 2), False)
    assert_exact(opposite, dtype, torch.zeros(x.shape), 2 * convolved(x, weight[0], padding[0])[1])


@both_formats
@every_dtype
def test_transpose_is_the_adjoint(dtype, layout):
    (x,), weight, padding = cross(1, dtype, layout)
    padding = [(23, 20, 2, 2), (2, -1, 24, 22), (2, -1, 2, 2)]
    grad = sample(out_shape(x.shape, (47, 5), padding[0]), dtype, layout, 4)
    back = ops.depthwise_sum_direct([grad], weight, None, flat(padding), True)
    turned = [(46 - 23, 46 - 20, 2, 2), (2, 5, 22, 24), (2, 5, 2, 2)]
    parts = [convolved(grad, w.flip(2, 3), pads) for w, pads in zip(weight, turned, strict=True)]
    assert_exact(back, dtype, *(sum(part[i] for part in parts) for i in range(2)))


@pytest.mark.parametrize("layout", ["sliced", "sliced, channels last", "transposed", "expanded", "within storage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    x, grad = (laid_out(sample((3, 20, 9, 8), dtype, seed=seed), layout) for seed in range(2))
    weight = laid_out(sample((20, 1, 5, 3), dtype, seed=2), layout)
    padding = (2, 2, 1, 1)
    assert_exact(ops.depthwise_sum_direct([x], [weight], None, padding, False), dtype, *convolved(x, weight, padding))
    (weight_grad,) = ops.depthwise_weight_direct([x], [grad], padding)
    assert_exact(weight_grad, dtype, *weight_gradient(x, grad, (5, 3), padding))


@both_formats
@pytest.mark.parametrize("shape", [(0, 3, 7, 7), (2, 0, 7, 7), (0, 20, 14, 1)])
def test_empty_batches(shape, layout):
    x, weight = torch.ones(shape).contiguous(memory_format=layout), torch.ones(shape[1], 1, 3, 3)
    padding = (1, 1, 1, 1)
    assert ops.depthwise_sum_direct([x], [weight], None, padding, False).shape == shape
    assert ops.depthwise_each_direct(x, [weight], padding, False)[0].shape == shape
    poison(weight.shape, torch.float32)
    (weight_grad,) = ops.depthwise_weight_direct([x], [x], padding)
    assert weight_grad.shape == weight.shape
    assert not weight_grad.any()


@both_formats
@every_dtype
def test_threads_do_not_change_a_bit(dtype, layout):
    (x,), weight, padding = cross(1, dtype, layout, channels=50)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            y = ops.depthwise_sum_direct([x], weight, None, flat(padding), False)
            results.append([y, *ops.depthwise_weight_direct([x], [y], flat(padding))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sums_of_16_bit_numbers_are_wide():
    """More ones than float16 or bfloat16 count by ones, and a bias that a rounded sum would lose."""
    for dtype, count in ((torch.bfloat16, 256), (torch.float16, 2048)):
        x, weight = torch.ones(16, 16, 16, 16, dtype=dtype), torch.ones(16, 1, 31, 31, dtype=dtype)
        bias = torch.tensor([1 - count] + [0] * 15, dtype=dtype)
        y = ops.depthwise_sum_direct([x] * (count // 256), [weight] * (count // 256), bias, [15] * (count // 64), False)
        assert (y[:, 0] == 1).all()
        assert (y[:, 1:] == count).all()
        (weight_grad,) = ops.depthwise_weight_direct([x], [x], [15] * 4)
        assert weight_grad[0, 0, 15, 15] == 16 * 256


@both_formats
@pytest.mark.parametrize("pixel", [(5, 14), (0, 0), (7, 6)])
def test_infinities_stay_where_they_are(pixel, layout):
    """An infinite pixel reaches what a tap connects it with, and nothing else turns into NaN."""
    x = sample((1, 17, 13, 15), torch.float32, layout)
    x[0, 3, pixel[0], pixel[1]] = float("inf")
    y = ops.depthwise_sum_direct([x], [torch.ones(17, 1, 3, 3)], None, [1] * 4, False)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 3, max(0, pixel[0] - 1) : pixel[0] + 2, max(0, pixel[1] - 1) : pixel[1] + 2] = True
    assert torch.equal(y.isinf(), reached)
    assert not y.isnan().any()
