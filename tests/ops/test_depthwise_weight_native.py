"""The CPU kernel of the weight gradient of depthwise convolutions: sizes, kernels, layouts, dtypes and threads."""

import pytest
import torch
import torch.nn.functional as F

import shiftconv.ops  # noqa: F401  (defines the raw operators)

from .cases import laid_out, native_or_skip, poison

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
last = torch.channels_last
both_formats = pytest.mark.parametrize("layout", [torch.contiguous_format, last], ids=["contiguous", "channels_last"])
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Maps wider than a vector and narrower, of one row or column, of bands of rows; kernels that are cut into one rectangle
# or many, of one row or column, and that no map can fill. Channels fill blocks of sixteen, or not; where they are few
# or the map is large, lanes are columns, else channels.
CASES = [
    ((2, 3, 20, 33), (7, 7), (3, 3, 3, 3)),
    ((3, 19, 28, 28), (5, 27), (2, 2, 13, 13)),
    ((3, 17, 30, 18), (27, 5), (13, 13, 2, 2)),
    ((1, 16, 17, 17), (13, 13), (6, 6, 6, 6)),
    ((2, 2, 18, 40), (51, 3), (25, 25, 1, 1)),
    ((2, 2, 18, 40), (3, 99), (1, 1, 40, 58)),
    ((2, 5, 9, 31), (4, 6), (0, 3, 5, 1)),
    ((2, 5, 25, 24), (1, 1), (0, 0, 0, 0)),
    ((5, 40, 1, 50), (3, 9), (1, 1, 0, 3)),
    ((5, 33, 50, 1), (8, 2), (7, 7, 1, 0)),
    ((1, 1, 90, 300), (11, 3), (5, 5, 0, 0)),
    ((1, 2, 20, 20), (2, 41), (30, 0, 10, 30)),
    ((4, 35, 16, 15), (5, 5), (2, 2, 2, 2)),
    ((2, 3, 17, 20), (3, 4), (9, 8, 0, 12)),
    ((3, 35, 130, 130), (5, 4), (2, 2, 2, 1)),
    ((2, 50, 40, 420), (19, 3), (9, 9, 1, 1)),
]


@pytest.fixture(autouse=True, scope="module")
def _native():
    native_or_skip("depthwise_weight")


def gradients(x, grad, padding):
    return torch.ops.shiftconv.depthwise_weight_direct.default(x, grad, padding)


def oracle(x, grad, padding):
    """The gradient and the sums of magnitudes, tap by tap in float64."""
    top, bottom, left, right = padding
    x, grad = F.pad(x.double(), (left, right, top, bottom)), grad.double()
    oh, ow = grad.shape[2:]
    kh, kw = x.shape[2] - oh + 1, x.shape[3] - ow + 1
    truth, scale = grad.new_empty(2, x.shape[1], 1, kh, kw)
    for u in range(kh):
        for v in range(kw):
            products = grad * x[:, :, u : u + oh, v : v + ow]
            truth[:, 0, u, v] = products.sum((0, 2, 3))
            scale[:, 0, u, v] = products.abs().sum((0, 2, 3))
    return truth, scale


def sample(shape, dtype, layout=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)


def sizes(shape, kernel, padding):
    n, c, h, w = shape
    (kh, kw), (top, bottom, left, right) = kernel, padding
    return n, c, h + top + bottom - kh + 1, w + left + right - kw + 1


def assert_exact(actual, x, grad, padding):
    truth, scale = oracle(x, grad, padding)
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    error = (actual.double() - truth).abs()
    # the sum in the wide type, relative to all magnitudes, and one rounding of the result
    bound = TOLERANCE[x.dtype] * truth.abs() + min(TOLERANCE[x.dtype], 2e-6) * scale
    assert (error <= bound).all(), f"{(error / scale.clamp_min(1e-30)).max():.2e}"


@both_formats
@every_dtype
@pytest.mark.parametrize(("shape", "kernel", "padding"), CASES)
def test_equals_the_oracle(shape, kernel, padding, dtype, layout):
    x, grad = sample(shape, dtype, layout), sample(sizes(shape, kernel, padding), dtype, layout, 1)
    poison((shape[1], 1, *kernel), dtype)
    (weight,) = gradients([x], [grad], padding)
    assert_exact(weight, x, grad, padding)


@pytest.mark.parametrize("size", range(1, 36))
def test_kernels_of_every_size(size):
    x = sample((1, 2, 19, 21), torch.float32)
    for kernel in ((size, 3), (2, size), (size, size)):
        padding = (kernel[0] // 2, (kernel[0] - 1) // 2, kernel[1] // 2, (kernel[1] - 1) // 2)
        grad = sample(x.shape, torch.float32, seed=1)
        assert_exact(gradients([x], [grad], padding)[0], x, grad, padding)


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 18])
@pytest.mark.parametrize(("xs", "grads"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_branches_share_maps_or_have_their_own(xs, grads, channels, dtype, layout):
    kernels = [(25, 3), (3, 25), (3, 3)]
    padding = [(12, 12, 1, 1), (1, 1, 13, 11), (1, 1, 1, 1)]
    x = [sample((5, channels, 23, 20), dtype, layout, b) for b in range(xs)]
    grad = [sample((5, channels, 23, 20), dtype, layout, 9 + b) for b in range(grads)]
    weight = gradients(x, grad, [number for pads in padding for number in pads])
    for b in range(3):
        assert weight[b].shape == (channels, 1, *kernels[b])
        assert_exact(weight[b], x[b % xs], grad[b % grads], padding[b])


def test_branches_of_different_sizes():
    x = [sample((2, 3, 20, 20), torch.float32), sample((2, 3, 24, 19), torch.float32)]
    grad = [sample((2, 3, 18, 18), torch.float32), sample((2, 3, 20, 24), torch.float32)]
    padding = [(0, 0, 0, 0), (1, 0, 3, 4)]
    weight = gradients(x, grad, [*padding[0], *padding[1]])
    for b in range(2):
        assert_exact(weight[b], x[b], grad[b], padding[b])


def test_padding_that_crops():
    x, grad = sample((2, 3, 30, 31), torch.float32), sample((2, 3, 22, 20), torch.float32)
    padding = (-3, -1, -2, 0)
    (weight,) = gradients([x], [grad], padding)
    assert weight.shape == (3, 1, 5, 10)
    assert_exact(weight, x[:, :, 3:29, 2:], grad, (0, 0, 0, 0))


@pytest.mark.parametrize(
    "layout", ["sliced", "sliced, channels last", "transposed", "expanded", "within storage", "channels last"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    x, grad = sample((3, 20, 18, 17), dtype), sample((3, 20, 18, 17), dtype, seed=1)
    a, b = laid_out(x, layout), laid_out(grad, layout)
    padding = (3, 3, 2, 2)
    for one, other in ((a, b), (x, b), (a, grad)):
        assert_exact(gradients([one], [other], padding)[0], one, other, padding)


def test_grad_of_a_sum():
    x = sample((2, 3, 18, 18), torch.float32)
    grad = torch.ones(()).expand(x.shape)
    assert_exact(gradients([x], [grad], (2, 2, 2, 2))[0], x, grad, (2, 2, 2, 2))


@both_formats
@pytest.mark.parametrize("shape", [(0, 3, 20, 20), (2, 3, 0, 20), (2, 3, 20, 0), (2, 0, 20, 20)])
def test_empty_maps_give_zeros(shape, layout):
    x = torch.ones(shape).contiguous(memory_format=layout)
    grad = torch.ones((*shape[:2], 20, 20)).contiguous(memory_format=layout)
    padding = (10 if shape[2] == 0 else 2, 12 if shape[2] == 0 else 2, 15, 10)
    poison((shape[1], 1, 5, 26), torch.float32)
    (weight,) = gradients([x], [grad], padding)
    assert weight.shape[:2] == (shape[1], 1)
    assert not weight.any()


def test_taps_out_of_reach_are_zero():
    x, grad = sample((2, 3, 17, 18), torch.float32), sample((2, 3, 17, 18), torch.float32, seed=1)
    (weight,) = gradients([x], [grad], (40, 30, 1, 1))
    assert not weight[:, :, : 40 - 16].any()
    assert not weight[:, :, 40 + 17 :].any()
    assert weight[:, :, 24:57].all()


@both_formats
@every_dtype
@pytest.mark.parametrize("shape", [(5, 50, 30, 20), (3, 50, 129, 128), (5, 5, 30, 33)])
def test_threads_do_not_change_a_bit(shape, dtype, layout):
    x, grad = sample(shape, dtype, layout), sample(shape, dtype, layout, 1)
    padding = (12, 12, 1, 1, 1, 1, 12, 12)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(gradients([x], [grad], padding))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sums_of_16_bit_numbers_are_wide():
    """Two thousand ones are one more than float16 counts by ones."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(3, 2, 32, 32, dtype=dtype)
        (weight,) = gradients([x], [x], (1, 1, 1, 1))
        assert weight[0, 0, 1, 1] == 3 * 32 * 32


@pytest.mark.parametrize(
    ("x", "grad", "padding", "message"),
    [
        ([torch.ones(1, 2, 20, 20)], [torch.ones(1, 2, 30, 20)], [1, 1, 1, 1], "no larger than the padded x"),
        ([torch.ones(1, 2, 20, 20)], [torch.ones(1, 3, 20, 20)], [1, 1, 1, 1], "C = 2"),
        ([torch.ones(1, 2, 20, 20)], [torch.ones(1, 2, 20, 20).double()], [1, 1, 1, 1], "dtype of x"),
        ([torch.ones(1, 2, 20, 20)], [torch.ones(1, 2, 20, 20)], [1, 1, 1], "4 numbers"),
        ([torch.ones(1, 2, 20, 20)] * 2, [torch.ones(1, 2, 20, 20)], [1] * 12, "1 or 3 tensors"),
        ([torch.ones(1, 2, 20, 20, dtype=torch.int32)], [torch.ones(1, 2, 20, 20).int()], [1] * 4, "but dtype"),
    ],
)
def test_calls_that_do_not_fit(x, grad, padding, message):
    with pytest.raises(RuntimeError, match=message):
        gradients(x, grad, padding)
