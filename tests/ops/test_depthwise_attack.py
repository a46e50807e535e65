"""Depthwise convolutions where code breaks: memory's end, scratch of earlier calls, odd transforms, far offsets."""

import ctypes
import io
import mmap
import random
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.utils.checkpoint import checkpoint

from shiftconv import nn as snn
from shiftconv import ops
from shiftconv.nn.arrangement import VARIANTS

from .cases import native_or_skip

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
CHANNELS = (1, 2, 5, 8, 15, 16, 17, 33)
PAGE = mmap.PAGESIZE
D = torch.ops.shiftconv
COMPOSE: Any = ops.compose
CROSS: Any = ops.cross_conv
JACREV: Any = func.jacrev


def conv(x, weight, bias=None, stride: Any = 1, dilation: Any = 1):
    return ops.depthwise_conv(x, weight, bias, ((2, 2), (1, 2)), stride, dilation)


def by_torch(x, weight, bias=None, stride: Any = 1, dilation: Any = 1):
    return F.conv2d(F.pad(x, (1, 2, 2, 2)), weight, bias, stride, 0, dilation, x.shape[1])


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Guards:
    """Copies of tensors that end, or begin, where the process may not read."""

    def __init__(self):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._held: list[tuple[mmap.mmap, int, int]] = []

    def copy(self, t, at_end=True):
        size = t.numel() * t.element_size()
        if size == 0:
            return t
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (0, pages + 1):
            assert self._libc.mprotect(start + page * PAGE, PAGE, 0) == 0
            self._held.append((memory, start + page * PAGE, PAGE))
        offset = PAGE + (pages * PAGE - size if at_end else 0)
        flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
        return flat.as_strided(t.shape, t.stride()).copy_(t)

    def release(self):
        for _, start, size in self._held:
            self._libc.mprotect(start, size, mmap.PROT_READ | mmap.PROT_WRITE)
        self._held.clear()


@pytest.fixture
def guards():
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are guarded by Linux's mprotect")
    native_or_skip("depthwise")
    native_or_skip("depthwise_weight")
    made = Guards()
    yield made
    made.release()


def clipped(x, padding):
    """``x`` in float64 with zeros around it, or less of it where the padding is negative."""
    (top, bottom, left, right), less = ([max(sign * pad, 0) for pad in padding] for sign in (1, -1))
    grown = F.pad(x.double(), (left, right, top, bottom))
    return grown[:, :, less[0] : grown.shape[2] - less[1], less[2] : grown.shape[3] - less[3]]


def one(x, weight, padding, transpose):
    weight = weight.double()
    if transpose:
        kh, kw = weight.shape[2:]
        weight = weight.flip(2, 3)
        padding = [taps - 1 - pad for taps, pad in zip((kh, kh, kw, kw), padding, strict=True)]
    return F.conv2d(clipped(x, padding), weight, groups=x.shape[1])


def gradient(x, grad, padding):
    rows = clipped(x, padding).transpose(0, 1)
    filters = grad.double().transpose(0, 1)
    maps = rows.reshape(1, -1, *rows.shape[2:])
    return F.conv2d(maps, filters.contiguous(), groups=x.shape[1]).transpose(0, 1)


def pads_between(rng, size, out, taps, transpose):
    """Padding of any sign along one axis that takes ``size`` pixels to ``out``."""
    total = size + taps - 1 - out if transpose else out + taps - 1 - size
    before = rng.choice([total // 2, rng.randint(-6, taps + 6)])
    return [before, total - before]


def draw(seed):
    """One problem of the raw operators: dtype, sizes, kernels, padding."""
    rng = random.Random(seed)
    dtype, branches = rng.choice(list(TOLERANCE)), rng.choice([1, 1, 2, 3, 4])
    shape = rng.choice([1, 1, 2, 3]), rng.choice(CHANNELS), rng.randint(1, 40), rng.randint(1, 40)
    out = [max(1, side + rng.choice([0, 0, -5, 4])) for side in shape[2:]]
    transpose = rng.random() < 0.4
    kernels = [tuple(rng.choice([1, 2, 3, 5, 7, rng.randint(1, 63)]) for _ in range(2)) for _ in range(branches)]
    padding = [
        pad
        for kernel in kernels
        for axis in (0, 1)
        for pad in pads_between(rng, shape[2 + axis], out[axis], kernel[axis], transpose)
    ]
    return rng, dtype, shape, out, kernels, padding, transpose


def agree(actual, truth, scale, dtype):
    assert actual.shape == truth.shape
    slack = (1e-14 if dtype is torch.float64 else 2e-6) * scale + (1e-7 if dtype is torch.float16 else 0)
    assert ((actual.double() - truth).abs() <= TOLERANCE[dtype] * truth.abs() + slack + 1e-12).all()


@pytest.mark.parametrize("block", range(4))
def test_nothing_beyond_a_map_is_read_and_no_scratch_is_left_over(guards, block):
    """Inputs lie at the end of readable memory; the call before has filled every scratch with NaN."""
    for seed in range(40 * block, 40 * block + 40):
        rng, dtype, shape, out, kernels, padding, transpose = draw(seed)
        layout = rng.choice([torch.contiguous_format, torch.channels_last])

        def place(t, layout=layout, rng=rng):
            return guards.copy(t.contiguous(memory_format=layout), rng.random() < 0.8)

        x = place(sample(*shape, seed=seed, dtype=dtype))
        nan = torch.full_like(x, torch.nan)
        pads = [padding[i : i + 4] for i in range(0, len(padding), 4)]
        if seed % 2:
            weight = [guards.copy(sample(shape[1], 1, *k, seed=seed, dtype=dtype)) for k in kernels]
            if seed % 4 == 1:
                weight[0][:, :, rng.randrange(kernels[0][0])] = 0
            D.depthwise_sum_direct([nan], weight, None, padding, transpose)
            y = D.depthwise_sum_direct([x], weight, None, padding, transpose)
            truth = sum(one(x, w, p, transpose) for w, p in zip(weight, pads, strict=True))
            scale = sum(one(x.abs(), w.abs(), p, transpose) for w, p in zip(weight, pads, strict=True))
            agree(y, truth, scale, dtype)
        else:
            padding = [p for k in kernels for a in (0, 1) for p in pads_between(rng, shape[2 + a], out[a], k[a], False)]
            pads = [padding[i : i + 4] for i in range(0, len(padding), 4)]
            grad = [place(sample(*shape[:2], *out, seed=seed + 1, dtype=dtype)) for _ in kernels]
            D.depthwise_weight_direct([nan], [torch.full_like(g, torch.nan) for g in grad], padding)
            results = D.depthwise_weight_direct([x], grad, padding)
            for result, g, p in zip(results, grad, pads, strict=True):
                agree(result, gradient(x, g, p), gradient(x.abs(), g.abs(), p), dtype)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_works_under_a_checkpoint(stride, dilation, layers):
    """A checkpoint that does not re-enter lets a backward ask for its saved tensors once."""
    tensors = [t.requires_grad_() for t in (sample(2, 3, 9, 8), sample(3, 1, 3, 2), sample(3))]

    def run(f, x, weight, bias):
        for _ in range(layers):
            x = f(x, weight, bias, stride, dilation)
        return x

    y = checkpoint(run, conv, *tensors, use_reentrant=False)
    truth = run(by_torch, *tensors)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), tensors), torch.autograd.grad(truth.square().sum(), tensors)
    )


@pytest.mark.parametrize("training", [True, False])
def test_modules_work_under_a_checkpoint(training):
    for module in (snn.LargeKernelConv2d(3, 7, 3), snn.ShiftwiseConv2d(3, 9)):
        x = sample(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
        checkpoint(module.train(training), x, use_reentrant=False).sum().backward()
        assert x.grad is not None


def test_second_derivative_under_a_checkpoint():
    x, weight = sample(1, 2, 5, 5).requires_grad_(), sample(2, 1, 3, 3).requires_grad_()

    def norm(f, x, weight):
        (grad,) = torch.autograd.grad(f(x, weight).pow(3).sum(), weight, create_graph=True)
        return grad.square().sum()

    grads = torch.autograd.grad(checkpoint(norm, conv, x, weight, use_reentrant=False), (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(norm(by_torch, x, weight), (x, weight)))


def test_shapes_without_memory():
    x, weight = (t.to("meta") for t in (sample(2, 3, 9, 8), sample(3, 1, 3, 2)))
    for stride, dilation in ((1, 1), (2, 1), (1, 2)):
        y = conv(x, weight, None, stride, dilation)
        assert y.device.type == "meta"
        assert y.shape == by_torch(x, weight, None, stride, dilation).shape
    for module in (snn.LargeKernelConv2d(3, 7, 3), snn.ShiftwiseConv2d(3, 9)):
        for training in (True, False):
            assert module.double().to("meta").train(training)(x).shape == x.shape


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 5, 4, 4)])
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), ((7, 9), 1), (1, 2), (2, (3, 1))])
def test_stride_and_dilation_keep_the_memory_format(shape, stride, dilation):
    x = sample(*shape).contiguous(memory_format=torch.channels_last)
    weight = sample(shape[1], 1, 3, 2)
    y = conv(x, weight, None, stride, dilation)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, by_torch(x, weight, None, stride, dilation))


def test_batched_gradients():
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` asks for them."""
    tensors = [t.requires_grad_() for t in (sample(2, 3, 9, 8), sample(3, 1, 3, 2))]
    cotangents = sample(4, 2, 3, 11, 10)[..., :10]
    results = [
        torch.autograd.grad(f(*tensors), tensors, cotangents.expand(4, *f(*tensors).shape), is_grads_batched=True)
        for f in (conv, by_torch)
    ]
    torch.testing.assert_close(*results)


def test_mapped_axes_in_odd_places():
    x, weight, bias = sample(2, 3, 9, 8, 4), sample(3, 1, 4, 5, 3), sample(3, 4)
    for stride, dilation in ((1, 1), (2, 1), ((2, 1), 2)):

        def mapped(f, stride=stride, dilation=dilation):
            return func.vmap(lambda x, w, b: f(x, w, b, stride, dilation), (4, 2, 1), 3)(x, weight, bias)

        torch.testing.assert_close(mapped(conv), mapped(by_torch))
    torch.testing.assert_close(
        JACREV(conv, 1)(x[..., 0], weight[:, :, 0]), JACREV(by_torch, 1)(x[..., 0], weight[:, :, 0])
    )


def test_an_exported_stride_takes_even_and_odd_maps():
    class Halve(torch.nn.Module):
        def forward(self, x, weight):
            return conv(x, weight, None, 2), conv(x, weight, None, 1, 2)

    x, weight, any_ = sample(2, 3, 18, 16), sample(3, 1, 3, 2), torch.export.Dim.DYNAMIC
    program = torch.export.export(Halve(), (x, weight), dynamic_shapes=({0: any_, 2: any_, 3: any_}, None))
    x = sample(4, 3, 15, 17)
    truth = by_torch(x, weight, None, 2), by_torch(x, weight, None, 1, 2)
    torch.testing.assert_close(program.module()(x, weight), truth)


def test_lazy_negation():
    x = torch.view_as_complex(sample(2, 3, 9, 8, 2)).conj().imag
    assert x.is_neg()
    weight = sample(3, 1, 3, 2)
    torch.testing.assert_close(conv(x, weight), by_torch(x.resolve_neg(), weight))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x, w: ops.depthwise_conv(x, w.to_sparse()), (TypeError, ValueError)),
        (lambda x, w: ops.depthwise_conv(x, w, padding=2**62), ValueError),
        (lambda x, w: CROSS(x, w, w, padding=1), (TypeError, ValueError)),
        (lambda x, w: COMPOSE(sample(6, 1, 3, 3), None, (0, 1)), ValueError),
        (lambda x, w: COMPOSE(sample(6, 1, 3, 3), None, (-2, 1)), ValueError),
        (lambda x, w: COMPOSE(sample(6, 1, 3, 3), None, ()), ValueError),
        (lambda x, w: COMPOSE(sample(6, 1, 3, 3), [[1]], (3, 1)), TypeError),
        (lambda x, w: snn.ShiftwiseConv2d(3, 7, ghost_ratio=float("nan")), ValueError),
        (lambda x, w: snn.ShiftwiseConv2d(3, 7, ghost_ratio=float("inf")), ValueError),
        (lambda x, w: snn.ShiftwiseConv2d(3, 7)([x]), TypeError),
    ],
    ids=["sparse", "huge", "cross", "grid 0", "grid -2", "no grid", "list", "nan", "inf", "no tensor"],
)
def test_bad_input_is_named(call, error):
    with pytest.raises(error, match=r"expected|must|takes|got|larger") as raised:
        call(sample(2, 3, 9, 8), sample(3, 1, 3, 2))
    assert "not iterable" not in str(raised.value)
    assert "cannot convert" not in str(raised.value)


@pytest.mark.parametrize("variant", ["plain", "blur", "embedding", "weighted", "split"])
def test_a_module_of_another_seed_becomes_the_loaded_one(variant):
    first, second = (
        snn.ShiftwiseConv2d(7, 9, 4, 2, ghost_ratio=0.3, variant=replace(VARIANTS[variant], seed=seed)).eval()
        for seed in (1, 2)
    )
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    x = sample(2, 7, 10, 9, dtype=torch.float32)
    truth = first(x)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(second(x), truth)
    second.reparameterize()
    second.reparameterize()
    torch.testing.assert_close(second(x), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_2_to_the_31_elements(layout):
    """One map of 4.1 GiB at a time: its far corner is read, multiplied and written."""
    channels, side = 3, 27000
    small = sample(1, channels, 8, 40, dtype=torch.bfloat16).contiguous(memory_format=layout)
    grad, weight = sample(1, channels, 8, 40, seed=1, dtype=torch.bfloat16), sample(3, 1, 3, 3, dtype=torch.bfloat16)
    x = torch.empty((1, channels, side, side), dtype=torch.bfloat16, memory_format=layout)
    assert x.numel() > 2**31
    x[..., -9:, -41:] = 0
    x[..., -8:, -40:] = small
    corner = [9 - side, 1, 41 - side, 1]
    y = D.depthwise_sum_direct([x], [weight], None, corner, False)
    truth = D.depthwise_sum_direct([small], [weight], None, [1] * 4, False)
    assert torch.equal(y, truth)
    results = D.depthwise_weight_direct([x], [grad], corner)
    torch.testing.assert_close(results, D.depthwise_weight_direct([small], [grad], [1] * 4))
    del x
    y = D.depthwise_sum_direct([small], [weight], None, [side - 7, 1, side - 39, 1], False)
    assert torch.equal(y[..., -8:, -40:], truth)
    assert not y[..., :-9:97, :].count_nonzero()
