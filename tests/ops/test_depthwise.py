"""Depthwise convolution and the cross operator against an oracle in NumPy, against torch, and through its machinery."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from shiftconv import ops
from shiftconv.ops import depthwise_paths
from shiftconv.ops.branches import apply_each, apply_sum, apply_weight

from .cases import native_or_skip

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# Shape of x, kernel, padding: what paths tell apart is the side of the map (lanes of 16 or channels), wide and tall
# kernels, kernels that reach beyond the map, and sizes around a vector.
CASES = [
    ((2, 3, 9, 11), (3, 3), ((1, 1), (1, 1))),
    ((1, 5, 33, 31), (13, 3), ((6, 6), (0, 2))),
    ((2, 2, 20, 63), (3, 51), ((1, 1), (25, 25))),
    ((1, 17, 14, 14), (47, 5), ((23, 23), (2, 2))),
    ((2, 33, 7, 7), (5, 13), ((2, 2), (7, 5))),
    ((1, 2, 1, 1), (7, 9), ((3, 3), (4, 4))),
    ((3, 1, 5, 18), (4, 2), ((0, 3), (2, 0))),
    ((1, 4, 28, 28), (49, 49), ((24, 24), (24, 24))),
    ((1, 2, 3, 500), (1, 63), ((0, 0), (31, 31))),
    ((2, 3, 6, 6), (6, 6), ((0, 0), (0, 0))),
]
FORMATS = [torch.contiguous_format, torch.channels_last]

every_case = pytest.mark.parametrize(("shape", "kernel", "padding"), CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def oracle(x, weight, bias, padding):
    """One tap after the other, in NumPy, float64."""
    (top, bottom), (left, right) = padding
    x, weight = x.double().numpy(), weight.double().numpy()
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    kh, kw = weight.shape[2:]
    oh, ow = padded.shape[2] - kh + 1, padded.shape[3] - kw + 1
    y = np.zeros((*x.shape[:2], oh, ow))
    for u, v in itertools.product(range(kh), range(kw)):
        y += weight[:, :, u, v, None] * padded[:, :, u : u + oh, v : v + ow]
    return torch.from_numpy(y if bias is None else y + bias.double().numpy()[:, None, None])


def sample(shape, *kernels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    weights = [random(shape[1], 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5 for kernel in kernels]
    return random(*shape), *weights, random(shape[1])


def close(actual, truth, dtype):
    torch.testing.assert_close(actual.double(), truth.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@every_dtype
@every_case
def test_equals_the_oracle_in_both_formats(shape, kernel, padding, dtype):
    x, weight, bias = sample(shape, kernel, dtype=dtype)
    truth = oracle(x, weight, bias, padding)
    for memory_format in FORMATS:
        y = ops.depthwise_conv(x.contiguous(memory_format=memory_format), weight, bias, padding)
        assert y.dtype is dtype
        assert y.is_contiguous(memory_format=memory_format)
        close(y, truth, dtype)


@every_case
def test_gradients_equal_torch(shape, kernel, padding):
    x, weight, bias = (t.requires_grad_() for t in sample(shape, kernel))
    (top, bottom), (left, right) = padding
    truth = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, groups=shape[1])
    grad = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, (x, weight, bias), grad)
    for memory_format in FORMATS:
        z = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        y = ops.depthwise_conv(z, weight, bias, padding)
        grads = torch.autograd.grad(y, (z, weight, bias), grad)
        for actual, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
        assert grads[0].is_contiguous(memory_format=memory_format)


sizes = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(sizes, sizes), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.lists(st.integers(0, 4), min_size=4, max_size=4),
)  # fmt: skip
def test_stride_dilation_and_padding_as_torch_has_them(shape, kernel, stride, dilation, pads):
    x, weight, bias = (t.requires_grad_() for t in sample(shape, kernel))
    top, bottom, left, right = pads
    arguments = (x, weight, bias, ((top, bottom), (left, right)), stride, dilation)
    try:
        padded = F.pad(x, (left, right, top, bottom))
        truth = F.conv2d(padded, weight, bias, stride, 0, dilation, shape[1])
    except RuntimeError:
        with pytest.raises(ValueError, match="larger than x"):
            ops.depthwise_conv(*arguments)
        return
    y = ops.depthwise_conv(*arguments)
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(truth)
    for a, b in zip(*(torch.autograd.grad(t, (x, weight, bias), grad) for t in (y, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 2, (1, 2), [[1, 0], [2, 3]], "same", "valid"], ids=str)
def test_every_way_to_give_the_padding(padding):
    x, weight, bias = sample((2, 3, 8, 9), (4, 5))
    y = ops.depthwise_conv(x, weight, bias, padding, dilation=(1, 1))
    if isinstance(padding, list):
        truth = F.conv2d(F.pad(x, (2, 3, 1, 0)), weight, bias, groups=3)
    else:
        truth = F.conv2d(F.pad(x, (2, 2, 1, 2)) if padding == "same" else x, weight, bias, 1,
                         0 if padding == "same" else padding, groups=3)  # fmt: skip
    torch.testing.assert_close(y, truth)


def test_one_image_without_a_batch_and_other_strides():
    x, weight, bias = sample((2, 3, 8, 9), (3, 5))
    truth = ops.depthwise_conv(x, weight, bias, (1, 2))
    torch.testing.assert_close(ops.depthwise_conv(x[1], weight, bias, (1, 2)), truth[1])
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    torch.testing.assert_close(ops.depthwise_conv(turned, weight, bias, (1, 2)), truth)
    wide = torch.cat([x, x], 3)[..., ::2]
    torch.testing.assert_close(
        ops.depthwise_conv(wide, weight.expand(3, 1, 3, 5), bias, (1, 2)),
        ops.depthwise_conv(wide.contiguous(), weight, bias, (1, 2)),
    )


CROSS = [
    ((2, 3, 20, 17), [(13, 3), (3, 13), (3, 3)], None),
    ((1, 18, 14, 14), [(47, 5), (5, 47), (5, 5)], None),
    ((2, 2, 7, 7), [(15, 3), (3, 15), (3, 3)], [((6, 8), (1, 1)), ((1, 1), (6, 8)), ((1, 1), (1, 1))]),
    ((1, 2, 30, 29), [(51, 3), (3, 51)], None),
    ((1, 3, 9, 8), [(7, 7), (3, 3)], [((3, 1), (3, 1)), ((0, 0), (0, 0))]),
    ((2, 3, 12, 12), [(6, 4), (4, 6), (2, 2)], None),
]


@pytest.mark.parametrize(("shape", "kernels", "padding"), CROSS, ids=str)
@every_dtype
def test_cross_conv_is_the_sum_of_its_branches(shape, kernels, padding, dtype):
    x, *weights, bias = sample(shape, *kernels, dtype=dtype)
    sides = padding or [tuple((k // 2, k - 1 - k // 2) for k in kernel) for kernel in kernels]
    truth = [oracle(x, weight, None, side) for weight, side in zip(weights, sides, strict=True)]
    total = sum(truth) + bias.double()[:, None, None]
    small = weights[2] if len(weights) > 2 else None
    for memory_format in FORMATS:
        z = x.contiguous(memory_format=memory_format)
        y = ops.cross_conv(z, *weights[:2], small, bias, padding)
        assert y.is_contiguous(memory_format=memory_format)
        close(y, total, dtype)
        maps = ops.cross_conv(z, *weights[:2], small, padding=padding, summed=False)
        assert len(maps) == len(weights)
        for actual, wanted in zip(maps, truth, strict=True):
            close(actual, wanted, dtype)


def test_16_bit_types_are_rounded_once():
    """The sum over branches and bias is as good as float32 rounded, where rounded branches would differ."""
    x, *weights, bias = sample((1, 4, 24, 24), (25, 5), (5, 25), (5, 5), dtype=torch.bfloat16)
    y = ops.cross_conv(x, *weights, bias)
    wide = ops.cross_conv(x.float(), *(w.float() for w in weights), bias.float())
    assert (y == wide.bfloat16()).float().mean() > 0.98  # of rounded maps the sum agrees in half


@pytest.mark.parametrize("transpose", [False, True])
def test_every_derivative_of_the_raw_operators(transpose):
    x, *weights, bias = (t.requires_grad_() for t in sample((2, 2, 5, 4), (5, 3), (3, 5), (2, 1)))
    pads = [3, 1, 1, 1, 1, 1, 2, 2, 0, 1, 0, 0]
    maps = [x, *(torch.randn_like(x).requires_grad_() for _ in range(2))]

    def check(function, *tensors):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)

    check(lambda x, b, *w: apply_sum([x], w, b, pads, transpose), x, bias, *weights)
    check(lambda *t: apply_sum(t[:3], t[3:], None, pads, transpose), *maps, *weights)
    check(lambda x, *w: apply_each(x, w, pads, transpose), x, *weights)
    grads = [torch.randn_like(y).requires_grad_() for y in apply_each(x, weights, pads)]
    check(lambda *t: apply_weight(t[:1], t[1:], pads), x, *grads)
    check(lambda *t: apply_weight(t[:3], t[3:], pads), *maps, *grads)
    check(lambda *t: apply_weight(t[:3], t[3:], pads), *maps, grads[0])


def test_the_adjoint_is_the_adjoint():
    x, *weights, _ = sample((2, 3, 9, 8), (7, 3), (4, 4))
    pads = [5, 1, 0, 1, 2, 1, 1, 1]
    y = apply_sum([x], weights, None, pads)
    grad = torch.randn_like(y)
    back = apply_sum([grad], weights, None, pads, True)
    assert back.shape == x.shape
    torch.testing.assert_close((y * grad).sum(), (x * back).sum())


def test_opcheck():
    x, *weights, bias = sample((2, 3, 9, 8), (7, 3), (3, 7), dtype=torch.float32)
    pads = [3, 3, 1, 1, 1, 1, 3, 3]
    opcheck(torch.ops.shiftconv.depthwise_sum.default, ([x], weights, bias, pads, False))
    opcheck(torch.ops.shiftconv.depthwise_sum.default, ([x, x], weights, None, pads, True))
    opcheck(torch.ops.shiftconv.depthwise_each.default, (x, weights, pads, False))
    opcheck(torch.ops.shiftconv.depthwise_weight.default, ([x], [x, x], pads))


def test_compiles_whole_and_exports():
    x, *weights, bias = sample((2, 3, 9, 8), (7, 3), (3, 7), (3, 3), dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, *weights, bias)]

    def loss(x, tall, wide, small, bias):
        y = ops.cross_conv(x, tall, wide, small, bias)
        maps = ops.cross_conv(x, tall, wide, small, summed=False)
        return (ops.depthwise_conv(y, small, bias, 1, 2, 2) ** 2).sum() + sum(m.sin().sum() for m in maps)

    plain, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", weights[0].detach())

        def forward(self, x):
            return ops.depthwise_conv(x, self.kernel, None, ((3, 3), (1, 1)))

    batch = torch.export.Dim("batch", min=2, max=64)
    side = torch.export.Dim("side", min=4, max=512)
    program = torch.export.export(Net(), (x.detach(),), dynamic_shapes=({0: batch, 2: side},))
    other = torch.randn(3, 3, 21, 8)
    torch.testing.assert_close(program.module()(other), Net()(other))


def test_functional_transforms():
    x, *weights, bias = sample((4, 3, 9, 8), (7, 3), (3, 7))

    def loss(weights, x):
        return ops.cross_conv(x[None], *weights, bias=bias).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(4):
        for actual, wanted in zip(torch.func.grad(loss)(weights, x[i]), each, strict=True):
            torch.testing.assert_close(actual, wanted[i])
    stacked = [torch.stack([w, -w, 2 * w]) for w in weights]
    many = torch.func.vmap(lambda *w: ops.cross_conv(x, *w, summed=False))(*stacked)
    for actual, weight in zip(many, weights, strict=True):
        pads = tuple((k // 2, k // 2) for k in weight.shape[2:])
        torch.testing.assert_close(actual[2], ops.depthwise_conv(x, 2 * weight, padding=pads))
    images = torch.stack([x, 3 * x], 1)
    mapped = torch.func.vmap(lambda x: ops.cross_conv(x, *weights, bias=bias), in_dims=1)(images)
    torch.testing.assert_close(mapped[1], ops.cross_conv(3 * x, *weights, bias=bias))
    hessian = torch.func.jacrev(torch.func.grad(lambda w: loss([w, weights[1]], x[0])))(weights[0])
    assert hessian.shape == (*weights[0].shape, *weights[0].shape)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fft_equals_the_convolution(transpose, dtype):
    x, *weights, bias = sample((2, 3, 19, 23), (13, 9), (6, 15), dtype=dtype)
    for kernels, pads in ((weights, [8, 4, 4, 4, 3, 2, 7, 7]), (weights[:1], [0, 0, 0, 0])):
        arguments = ([x], kernels, bias, pads, transpose)
        close(depthwise_paths.sum_by_fft(*arguments), depthwise_paths.sum_by_torch(*arguments), dtype)
    (y,) = (depthwise_paths.sum_by_fft([x] * 2, weights, None, [8, 4, 4, 4, 3, 2, 7, 7], transpose),)
    close(y, depthwise_paths.sum_by_torch([x], weights, None, [8, 4, 4, 4, 3, 2, 7, 7], transpose), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fft_equals_the_gradient(dtype):
    x, *weights, _ = sample((2, 3, 19, 23), (13, 9), (6, 15), dtype=dtype)
    pads = [8, 4, 4, 4, 3, 2, 7, 7]
    grads = [torch.randn_like(y) for y in apply_each(x, weights, pads)]
    for maps in ([x], [x, 2 * x]):
        actual = depthwise_paths.weight_by_fft(maps, grads, pads)
        for kernel, truth in zip(actual, depthwise_paths.weight_by_torch(maps, grads, pads), strict=True):
            close(kernel / 20, truth / 20, dtype)


def test_a_large_dense_kernel_on_a_large_map_goes_through_spectra():
    x, weight, bias = sample((1, 2, 130, 140), (63, 63), dtype=torch.float32)
    call = depthwise_paths.Call("cpu", torch.float32, 1, 130, 140, False, [(63, 63)])
    assert depthwise_paths.choose(call).name == "fft"
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=31, groups=2)
    close(ops.depthwise_conv(x, weight, bias, 31), truth, torch.float32)


@pytest.mark.parametrize(
    ("last", "kernel", "gradient"),
    [
        (True, (3, 3), False),
        (False, (3, 3), False),
        (True, (3, 3), True),
        (True, (51, 5), False),
        (False, (51, 51), True),
    ],
)
def test_every_path_gives_the_same(last, kernel, gradient, monkeypatch):
    monkeypatch.delenv("SHIFTCONV_BACKEND", raising=False)
    call = depthwise_paths.Call("cpu", torch.float32, 4, 28, 28, last, [kernel], gradient)
    assert depthwise_paths.choose(call).name == ("torch" if last and kernel == (3, 3) else "direct")
    x, weight, bias = sample((4, 3, 28, 28), kernel, dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    pads = (kernel[0] // 2, kernel[1] // 2)

    def results():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = ops.depthwise_conv(*leaves, pads)
        return [y, *torch.autograd.grad(y, leaves, x)]

    own = results()
    native_or_skip("depthwise", "depthwise_weight")
    for backend in ("reference", "native"):
        monkeypatch.setenv("SHIFTCONV_BACKEND", backend)
        for actual, wanted in zip(results(), own, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3)


def test_autocast_casts_as_for_a_convolution():
    x, weight, bias = sample((1, 2, 9, 9), (5, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.depthwise_conv(x, weight, bias, 2).dtype is torch.bfloat16
        assert ops.depthwise_conv(x.double(), weight.double(), bias.double(), 2).dtype is torch.float64


def test_empty_batches():
    x, *weights, bias = (t.requires_grad_() for t in sample((0, 3, 9, 8), (7, 3), (3, 7)))
    y = ops.cross_conv(x, *weights, bias=bias)
    assert y.shape == (0, 3, 9, 8)
    for grad in torch.autograd.grad(y.sum(), (x, *weights, bias)):
        assert not grad.any()
    assert ops.depthwise_conv(x, weights[0], bias, (3, 1), 2).shape == (0, 3, 5, 4)


IMAGE, KERNEL = torch.zeros(1, 3, 5, 5), torch.zeros(3, 1, 3, 3)
BAD = [
    ((IMAGE, KERNEL[:2]), ValueError, r"weight must be \[C, 1, kh, kw\] with C = 3 channels of x, got \[2, 1, 3, 3\]"),
    ((IMAGE, KERNEL.view(1, 3, 3, 3)), ValueError, "weight must be"),
    ((IMAGE, torch.zeros(3, 1, 0, 3)), ValueError, "weight must be"),
    ((IMAGE, torch.zeros(3, 1, 3)), ValueError, "weight must be"),
    ((IMAGE, KERNEL.double()), TypeError, r"weight must have the dtype of x, torch\.float32, got torch\.float64"),
    ((IMAGE.int(), KERNEL.int()), TypeError, "x of a floating dtype, got torch.int32"),
    ((IMAGE, KERNEL.to("meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
    ((IMAGE, KERNEL, torch.zeros(2)), ValueError, r"bias must be \[C\] with C = 3"),
    ((IMAGE, KERNEL, torch.zeros(3).half()), TypeError, "bias must have the dtype"),
    ((IMAGE, "kernel"), TypeError, "takes tensors, got x: Tensor, weight: str"),
    ((torch.zeros(3, 5), KERNEL), ValueError, r"x \[N, C, H, W\]"),
    ((torch.zeros(1, 3, 0, 5), KERNEL), ValueError, "of at least 1"),
    ((IMAGE.to_sparse(), KERNEL), TypeError, "dense tensors"),
    ((IMAGE, torch.zeros(3, 1, 8, 3), None, 1), ValueError, r"weight \[3, 1, 8, 3\] is larger than x \[1, 3, 5, 5\]"),
    ((IMAGE, KERNEL, None, 0, 1, 3), ValueError, r"with dilation \(3, 3\) is larger"),
    ((IMAGE, KERNEL, None, -1), ValueError, "must not be negative"),
    ((IMAGE, KERNEL, None, (1, 2, 3)), ValueError, "padding must be a number, one per axis"),
    ((IMAGE, KERNEL, None, 1.5), TypeError, "whole numbers"),
    ((IMAGE, KERNEL, None, "sane"), ValueError, "did you mean 'same'"),
    ((IMAGE, KERNEL, None, "same", 2), ValueError, "goes with a stride of 1"),
    ((IMAGE, KERNEL, None, 1, 0), ValueError, "stride must be at least 1"),
    ((IMAGE, KERNEL, None, 1, (1, 1, 1)), ValueError, "stride must be one number"),
    ((IMAGE, KERNEL, None, 1, 1, True), TypeError, "dilation must be of whole numbers"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_input_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.depthwise_conv(*arguments)


def test_bad_input_of_the_cross_operator_is_named():
    tall, wide = torch.zeros(3, 1, 5, 3), torch.zeros(3, 1, 3, 5)
    with pytest.raises(ValueError, match="bias goes with the sum"):
        ops.cross_conv(IMAGE, tall, wide, bias=torch.zeros(3), summed=False)
    with pytest.raises(ValueError, match="results of one size"):
        ops.cross_conv(IMAGE, tall, wide, padding=[((2, 2), (1, 1)), ((1, 1), (2, 1))])
    with pytest.raises(ValueError, match="one pair of pairs for each of 2 kernels, got"):
        ops.cross_conv(IMAGE, tall, wide, padding=[((2, 2), (1, 1))])
    with pytest.raises(TypeError, match="wide must have the dtype"):
        ops.cross_conv(IMAGE, tall, wide.half())
    with pytest.raises(ValueError, match=r"small must be \[C, 1, kh, kw\]"):
        ops.cross_conv(IMAGE, tall, wide, tall[:1])
