"""shift_linear against NumPy, and what autograd, the compiler and functorch make of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from shiftconv.ops import shift_linear
from shiftconv.ops.sampling import format_of
from shiftconv.ops.shift_linear import reference

from .cases import LAYOUTS, MODES, every_mode, laid_out, often

CLOSE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PAD = {"zeros": "constant", "replicate": "edge", "circular": "wrap", "reflect": "reflect", "symmetric": "symmetric"}
OPERATOR = torch.ops.shiftconv.shift_linear.default


def oracle(x, offset, weight, bias, padding_mode, stride, relu, residual):
    """In float64: np.pad each channel far enough, cut the moved window out, keep every few positions, mix, add."""
    x, moved = x.double().numpy(), []
    for c, row in enumerate(offset.tolist()):
        channel = x[:, c]
        for axis, o in enumerate(row, 1):
            size, reach = channel.shape[axis], abs(o) + 1
            widths = [(reach, reach) if a == axis else (0, 0) for a in range(channel.ndim)]
            wide = np.pad(channel, widths, PAD[padding_mode])
            channel = np.take(wide, np.arange(0, size, stride) + reach - o, axis)
        moved.append(channel)
    y = np.einsum("oc,nc...->no...", weight.double().numpy(), np.stack(moved, 1))
    if bias is not None:
        y = y + bias.double().numpy().reshape(-1, *[1] * (y.ndim - 2))
    y = np.maximum(y, 0) if relu else y
    return y if residual is None else y + residual.double().numpy()


def sample(sizes=(2, 5, 7, 6), outputs=4, dtype=torch.float64, reach=2, residual_of=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    offset = torch.randint(-reach, reach + 1, (sizes[1], len(sizes) - 2), generator=generator)
    stride = residual_of or 1
    residual = normal(sizes[0], outputs, *(-(-s // stride) for s in sizes[2:])) if residual_of else None
    return normal(*sizes), offset, normal(outputs, sizes[1]), normal(outputs), residual


def agree(result: Tensor, truth: np.ndarray, dtype: torch.dtype):
    assert result.dtype is dtype
    scale = max(1.0, float(np.abs(truth).max(initial=0)))
    np.testing.assert_allclose(result.detach().double().numpy(), truth, rtol=0, atol=CLOSE[dtype] * scale)


@often
@given(data=st.data())
def test_equals_numpy(data):
    """Ranks, odd sizes, tails of every tile, dtypes, layouts, paddings, strides, and what is left out or not."""
    draw = data.draw
    ndim = draw(st.integers(1, 3))
    sizes = [draw(st.sampled_from([1, 2, 3, 7, 8, 14] if ndim < 3 else [1, 2, 5])) for _ in range(ndim)]
    shape = (draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 7, 16, 33])), *sizes)
    dtype, stride = draw(st.sampled_from([*CLOSE])), draw(st.sampled_from([1, 1, 2, 3]))
    outputs = draw(st.sampled_from([1, 3, 8, 17, 26]))
    x, offset, weight, bias, residual = sample(shape, outputs, dtype, draw(st.sampled_from([0, 1, 9])), stride)
    x = laid_out(x, draw(st.sampled_from(LAYOUTS)))
    bias, residual = (t if draw(st.booleans()) else None for t in (bias, residual))
    mode, activation = draw(st.sampled_from([*MODES])), draw(st.sampled_from([None, "relu"]))
    y = shift_linear(x, offset, weight, bias, mode, stride, activation, residual)
    agree(y, oracle(x, offset, weight, bias, mode, stride, activation == "relu", residual), dtype)
    if x.numel() and y.numel():
        truth = reference(x, offset, weight, bias, residual, MODES[mode], [stride] * ndim, activation == "relu")
        agree(truth, y.detach().double().numpy(), dtype)
        assert y.is_contiguous(memory_format=format_of(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 96, 28, 28), (2, 48, 32, 32), (5, 200, 7, 7), (1, 300, 57, 33)], ids=str)
def test_shapes_of_networks(sizes, dtype):
    x, offset, weight, bias, _ = sample(sizes, 40, dtype, 1)
    agree(shift_linear(x, offset, weight, bias), oracle(x, offset, weight, bias, "zeros", 1, False, None), dtype)
    agree(
        shift_linear(x, offset, weight, bias, stride=2, activation="relu"),
        oracle(x, offset, weight, bias, "zeros", 2, True, None),
        dtype,
    )


@every_mode
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_exact(padding_mode, stride):
    x, offset, weight, bias, residual = sample((2, 3, 5, 4), 2, residual_of=stride)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias, residual) if t is not None)

    def f(x, weight, bias, residual):
        return shift_linear(x, offset, weight, bias, padding_mode, stride, "relu", residual)

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_first_gradients_of_the_kernels(dtype, stride, layout):
    """What training takes: compared with the derivatives of the same thing in float64."""
    x, offset, weight, bias, residual = sample((3, 19, 9, 11), 13, dtype, residual_of=stride)
    x = laid_out(x, layout)
    found, grads = [], None
    for kind in (dtype, torch.float64):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, weight, bias, residual) if t is not None]
        y = shift_linear(leaves[0], offset, leaves[1], leaves[2], "zeros", stride, "relu", leaves[3])
        grads = torch.ones_like(y) if grads is None else grads.to(kind)
        found.append(torch.autograd.grad(y, leaves, grads))
    for got, want in zip(*found, strict=True):
        assert got.dtype is dtype
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=CLOSE[dtype] * scale)


def test_registration_is_sound():
    for stride in (1, 2):
        for layout in ("contiguous", "channels last"):
            x, offset, weight, bias, residual = sample(dtype=torch.float32, residual_of=stride)
            x = laid_out(x, layout)
            torch.library.opcheck(
                OPERATOR,
                (x, offset, weight, bias, residual, 3, [stride] * 2, True),
                test_utils=("test_schema", "test_faketensor"),
            )
    x, offset, weight, *_ = sample(dtype=torch.float32)
    grad = torch.randn(2, 4, 7, 6)
    for operator, arguments in (
        (torch.ops.shiftconv.shift_linear_input.default, (grad, offset, weight)),
        (torch.ops.shiftconv.shift_linear_weight.default, (grad, x, offset, 0, [1, 1])),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_compiles_in_one_graph():
    x, offset, weight, bias, residual = sample(dtype=torch.float32, residual_of=1)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]

    def f(x, weight, bias, residual):
        return shift_linear(x, offset, weight, bias, "reflect", 1, "relu", residual).square().sum()

    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(f(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (1, None, 0), (0, 0, 0)], ids=str)
def test_maps_over_inputs(dims):
    x, offset, weight, bias, _ = sample()
    many = [torch.stack([t, 2 * t, -t], 0 if d is None else d) for t, d in zip((x, weight, bias), dims, strict=True)]
    inputs = [t.select(0, 0) if d is None else t for t, d in zip(many, dims, strict=True)]

    def f(x, weight, bias):
        return shift_linear(x, offset, weight, bias, activation="relu").square().sum()

    slope = torch.func.grad(f, (0, 1, 2))
    mapped = torch.func.vmap(slope, dims)(*inputs)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)]
        for a, b in zip(mapped, slope(*one), strict=True):
            torch.testing.assert_close(a[i], b)


def test_autocast_is_that_of_a_linear_layer():
    x, offset, weight, bias, residual = sample(dtype=torch.float32, residual_of=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = shift_linear(x, offset, weight, bias, residual=residual)
    assert y.dtype is torch.bfloat16
    agree(y, oracle(x, offset, weight, bias, "zeros", 1, False, residual), torch.bfloat16)


def test_threads_do_not_change_results():
    x, offset, weight, bias, _ = sample((4, 48, 20, 20), 24, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def run():
        y = shift_linear(leaves[0], offset, *leaves[1:], activation="relu")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


X, W = torch.zeros(2, 3, 5, 6), torch.zeros(4, 3)
OFFSET = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, OFFSET.float(), W), {}, TypeError, r"integer offsets, got torch\.float32"),
        ((X, OFFSET, [[0.0]]), {}, TypeError, "takes tensors.*got Tensor, Tensor, list"),
        ((X.long(), OFFSET, W), {}, TypeError, r"floating dtype, got torch\.int64"),
        (
            (X, OFFSET, W.double()),
            {},
            TypeError,
            r"dtype of x, torch\.float32, got torch\.float64",
        ),
        ((X, OFFSET, W[:, :2]), {}, ValueError, r"weight must be \[O, C\] with C = 3 .* got \[4, 2\]"),
        ((X, OFFSET, W, W[0]), {}, ValueError, r"bias must be \[4\] .* got \[3\]"),
        ((X, OFFSET[:2], W), {}, ValueError, r"\[C, D\] = \[3, 2\] .* got \[2, 2\]"),
        ((X[0, 0], OFFSET, W), {}, ValueError, "one to three spatial axes, got 2-D"),
        ((X, OFFSET, W), {"padding_mode": "zero"}, ValueError, "unknown padding_mode 'zero'; did you mean 'zeros'"),
        ((X, OFFSET, W), {"activation": "rel"}, ValueError, "unknown activation 'rel'; did you mean 'relu'"),
        ((X, OFFSET, W), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ((X, OFFSET, W), {"stride": 2, "residual": X}, ValueError, r"residual must be \[2, 4, 3, 3\]"),
        ((X, OFFSET, W.to("meta")), {}, ValueError, "weight must be on the device of x, cpu, got meta"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(arguments, options, error, message):
    with pytest.raises(error, match=message):
        shift_linear(*arguments, **options)
