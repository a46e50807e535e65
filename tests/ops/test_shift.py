"""Shift against oracles that share no code with it: numpy.pad, a one-hot convolution, its transpose, the originals."""

import itertools
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftconv.ops import native
from shiftconv.ops.shift import MODES, PaddingMode, reference, shift

NUMPY_NAME = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}  # the other two agree
SHAPES = [(2, 3, 7), (2, 5, 6, 9), (1, 4, 3, 5, 4)]  # 1-D, 2-D, 3-D; odd, even and small sides
# What the C++ kernel tells apart: tiny planes, planes of one and more vectors, channels beyond a vector, large planes.
KERNEL_SHAPES = [(2, 3, 70), (3, 20, 7, 7), (1, 70, 9, 3), (2, 4, 17, 1), (2, 66, 2, 3, 5), (1, 3, 66, 65)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def native_kernel(x, offset, mode, transpose):
    """The raw operator, which carries the C++ kernel once that is loaded."""
    try:
        native.compiler()
    except native.NativeError as error:
        pytest.skip(str(error))
    native.load("shift")
    return torch.ops.shiftconv.shift(x, offset, mode, transpose)


def sample(shape, reach, dtype=torch.float64):
    """Random input, and offsets up to ``reach`` pixels either way; ``reach`` may exceed the image."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 50).to(dtype)
    offset = torch.randint(-reach, reach + 1, (shape[1], len(shape) - 2), generator=generator)
    return x, offset


def oracle(x, offset, padding_mode):
    """Pad with NumPy as far as the offset of a channel reaches, then cut its window."""
    y = torch.empty_like(x)
    for c, o in enumerate(offset.tolist()):
        widths = [(0, 0), *((abs(d), abs(d)) for d in o)]
        padded = np.pad(x[:, c].numpy(), widths, NUMPY_NAME.get(padding_mode, padding_mode))
        window = tuple(slice(abs(d) - d, abs(d) - d + s) for d, s in zip(o, x.shape[2:], strict=True))
        y[:, c] = torch.from_numpy(padded[(slice(None), *window)])
    return y


def dense_transpose(g, offset, padding_mode):
    """S' g with the matrix of each axis, written out by letting NumPy pad the numbers of the pixels."""
    y = torch.empty_like(g)
    for c, o in enumerate(offset.tolist()):
        plane = g[:, c]
        for axis, (n, d) in enumerate(zip(g.shape[2:], o, strict=True)):
            padded = np.pad(np.arange(1, n + 1), abs(d), NUMPY_NAME.get(padding_mode, padding_mode))
            source = torch.from_numpy(padded[abs(d) - d :][:n])  # 0 is outside
            matrix = (source[:, None] == torch.arange(1, n + 1)).to(g.dtype)
            plane = torch.tensordot(plane, matrix, ([1 + axis], [0])).movedim(-1, 1 + axis)
        y[:, c] = plane
    return y


@every_shape
@every_mode
@pytest.mark.parametrize("reach", [0, 2, 40])
def test_equals_padding_then_cropping(shape, padding_mode, reach):
    x, offset = sample(shape, reach)
    expected = oracle(x, offset, padding_mode)
    assert torch.equal(shift(x, offset, padding_mode), expected)
    assert torch.equal(reference(x, offset, MODES[padding_mode], False), expected)


@every_mode
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *KERNEL_SHAPES], ids=lambda s: "x".join(map(str, s)))
def test_native_equals_oracle(shape, padding_mode, transpose):
    """Both memory formats; outputs over memory that held something else."""
    for reach, dtype in ((0, torch.float32), (1, torch.float32), (3, torch.float64), (80, torch.float32)):
        x, offset = sample(shape, reach, dtype)
        expected = (dense_transpose if transpose else oracle)(x, offset, padding_mode)
        for x_ in (x, x.contiguous(memory_format=LAST.get(x.ndim, torch.contiguous_format))):
            poison = torch.full_like(x_, float("nan"))
            del poison
            y = native_kernel(x_, offset, MODES[padding_mode], transpose)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-3)
            assert y.stride() == x_.stride()


@every_mode
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.complex64, torch.complex128),
    ],
    ids=str,
)
def test_moves_every_dtype(padding_mode, dtype):
    x, offset = sample((2, 70, 6, 9), 2, dtype)
    expected = oracle(x.to(torch.complex128 if x.is_complex() else torch.float64), offset, padding_mode).to(dtype)
    for kernel, format_ in itertools.product(
        (reference, native_kernel), (torch.contiguous_format, torch.channels_last)
    ):
        y = kernel(x.contiguous(memory_format=format_), offset, MODES[padding_mode], False)
        assert y.dtype == dtype
        assert torch.equal(y.contiguous().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128], ids=str
)
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sums_every_dtype(dtype, format_):
    """A whole image of ones folds into one pixel: 16-bit sums would stop at 256 or 2048."""
    x, offset = torch.ones(1, 40, 50, 60, dtype=dtype), torch.full((40, 2), 99)
    for kernel in (reference, native_kernel):
        y = kernel(x.contiguous(memory_format=format_), offset, MODES["replicate"], True)
        assert (y[..., 0, 0] == torch.tensor(3000).to(dtype)).all()
        assert y.count_nonzero() == 40


def test_integers_are_no_gradients():
    with pytest.raises(RuntimeError, match="a gradient is floating point or complex"):
        native_kernel(
            torch.ones(1, 2, 3, dtype=torch.int32), torch.ones(2, 1, dtype=torch.long), MODES["replicate"], True
        )


def test_equals_depthwise_convolution_with_one_hot_kernel():
    x, offset = sample((2, 5, 6, 9), reach=2)
    kernel = torch.zeros(5, 1, 5, 5, dtype=x.dtype)
    kernel[range(5), 0, 2 - offset[:, 0], 2 - offset[:, 1]] = 1
    torch.testing.assert_close(shift(x, offset), F.conv2d(x, kernel, padding=2, groups=5))


@every_shape
@every_mode
@pytest.mark.parametrize("reach", [3, 40])
def test_gradient_is_the_transpose(shape, padding_mode, reach):
    x, offset = sample(shape, reach)
    x.requires_grad_()
    y = shift(x, offset, padding_mode)
    grad = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close((y * grad).sum(), (x * grad_x).sum())  # <Sx, g> = <x, S'g>; S is linear, so this is all


@every_mode
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3, 3, 2), (1, 2, 2, 1, 3)], ids=str)
def test_gradients_of_any_order(shape, padding_mode):
    x, offset = sample(shape, reach=2)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: shift(x, offset, padding_mode), x)
    assert torch.autograd.gradgradcheck(lambda x: shift(x, offset, padding_mode).square(), x)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    channels=st.integers(1, 20),
    batch=st.integers(1, 3),
    padding_mode=st.sampled_from(get_args(PaddingMode)),
    data=st.data(),
)
def test_any_shape_any_offset(sizes, channels, batch, padding_mode, data):
    column = st.one_of(st.integers(-3, 3), st.integers(-30, 30))
    offset = torch.tensor([[data.draw(column) for _ in sizes] for _ in range(channels)])
    x, _ = sample((batch, channels, *sizes), 0)
    assert torch.equal(shift(x, offset, padding_mode), oracle(x, offset, padding_mode))
    adjoint = torch.ops.shiftconv.shift(x, offset, MODES[padding_mode], True)
    torch.testing.assert_close(adjoint, dense_transpose(x, offset, padding_mode))


@every_mode
def test_offsets_at_the_ends_of_int64(padding_mode):
    x, _ = sample((1, 2, 5, 6), 0)
    ends = torch.tensor([[2**63 - 1, -(2**63)], [-(2**63), 2**63 - 1]])
    period = {"circular": (5, 6), "reflect": (8, 10), "symmetric": (10, 12)}.get(padding_mode)
    small = [[(o % period[i]) if period else max(-9, min(9, o)) for i, o in enumerate(row)] for row in ends.tolist()]
    expected = oracle(x, torch.tensor(small), padding_mode)
    for kernel in (reference, native_kernel):
        assert torch.equal(kernel(x, ends, MODES[padding_mode], False), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_offsets_of_every_integer_dtype(dtype):
    x, offset = sample((2, 5, 6, 9), 3)
    offset = offset.abs()
    assert torch.equal(shift(x, offset.to(dtype)), shift(x, offset))


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("channels of another tensor", lambda x: x[:, ::2]),
        ("cut", lambda x: x[:, :, 1:, 1:]),
        ("cut, channels last", lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:, 1:]),
        ("expanded", lambda x: x[:1, :1].expand(2, 5, -1, -1)),
        ("transposed", lambda x: x.mT),
        ("flipped offset into storage", lambda x: x.flatten()[7:-17].view(2, 2, 3, -1)[..., :5]),
    ],
)
def test_takes_any_strides(name, view):
    x = view(sample((2, 6, 6, 9), 0)[0])
    offset = sample(x.shape, 2)[1]
    y = shift(x, offset, "reflect")
    assert torch.equal(y, oracle(x.contiguous(), offset, "reflect"))
    expected = torch.channels_last if name.endswith("last") else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)
    assert torch.equal(shift(x, offset.T.contiguous().T), shift(x, offset))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 0, 0, 0)], ids=str)
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = shift(x, torch.ones(shape[1], len(shape) - 2, dtype=torch.long), "circular")
    y.sum().backward()
    assert y.shape == shape == x.grad.shape


@pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
def test_size_one_axes_read_their_only_pixel(padding_mode):
    y = shift(torch.ones(1, 1, 1, 1), torch.ones(1, 2, dtype=torch.long), padding_mode)
    assert y.item() == (padding_mode != "zeros")


def test_never_returns_a_view():
    x, offset = sample((1, 2, 3), 0)
    assert shift(x, offset).data_ptr() != x.data_ptr()


@every_mode
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradient_has_the_memory_format_of_its_input(padding_mode, format_):
    """The gradient of sum() is expanded from one number, that of a slice is strided."""
    x, offset = sample((2, 5, 6, 9), 2)
    x = x.contiguous(memory_format=format_).requires_grad_()
    for step in (1, 2):
        y = shift(x, offset, padding_mode)
        (grad,) = torch.autograd.grad(y[..., ::step].sum(), x)
        assert y.is_contiguous(memory_format=format_)
        assert grad.is_contiguous(memory_format=format_)
        weight = torch.zeros_like(y)
        weight[..., ::step] = 1
        torch.testing.assert_close(grad, dense_transpose(weight, offset, padding_mode))


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_registration_is_sound(format_):
    x, offset = sample((2, 5, 6, 9), 2, torch.float32)
    x = x.contiguous(memory_format=format_)
    tests = ("test_schema", "test_faketensor")  # autograd is recorded by shift(), not by the raw operator
    for mode, transpose in itertools.product(MODES.values(), (False, True)):
        torch.library.opcheck(torch.ops.shiftconv.shift.default, (x, offset, mode, transpose), test_utils=tests)
        torch.library.opcheck(
            torch.ops.shiftconv.shift.default, (x[:, :, 1:], offset, mode, transpose), test_utils=tests
        )


@pytest.mark.slow
def test_compiles_in_one_graph():
    x, offset = sample((2, 5, 6, 9), 2, torch.float32)
    f = torch.compile(lambda x: (shift(x, offset, "reflect") * 2).sin().sum(), fullgraph=True, backend="aot_eager")
    for x_ in (x, x.contiguous(memory_format=torch.channels_last)):
        a, b = (x_.clone().requires_grad_() for _ in range(2))
        f(a).backward()
        (shift(b, offset, "reflect") * 2).sin().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


class Shifted(torch.nn.Module):
    def forward(self, x, offset):
        return shift(x, offset, "symmetric") + 1


def test_exports_with_a_free_batch():
    x, offset = sample((2, 5, 6, 9), 2, torch.float32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Shifted(), (x, offset), dynamic_shapes=({0: batch}, None))
    assert torch.ops.shiftconv.shift.default in {node.target for node in program.graph.nodes}
    x = torch.randn(7, 5, 6, 9)
    torch.testing.assert_close(program.module()(x, offset), shift(x, offset, "symmetric") + 1)


@every_mode
def test_function_transforms(padding_mode):
    x, offset = sample((3, 2, 5, 4), 2)
    energy = lambda x: shift(x, offset, padding_mode).pow(3).sum()  # noqa: E731
    grad = torch.func.grad(energy)(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(energy(x), x)[0])
    x = x.detach()
    each = torch.func.vmap(torch.func.grad(lambda x: energy(x[None])))(x)  # per sample
    torch.testing.assert_close(each, grad)
    torch.testing.assert_close(torch.func.jacrev(energy)(x), grad)


def test_maps_over_inputs_and_offsets():
    x, _ = sample((4, 2, 3, 5, 6), 0)
    offsets = torch.randint(-3, 4, (4, 3, 2), generator=torch.Generator().manual_seed(1))
    each = torch.stack([shift(a, o) for a, o in zip(x, offsets, strict=True)])
    assert torch.equal(torch.vmap(shift)(x, offsets), each)
    assert torch.equal(torch.vmap(shift, (2, 0), 1)(x.movedim(0, 2), offsets), each.movedim(0, 1))
    assert torch.equal(torch.vmap(shift, (0, None))(x, offsets[0]), torch.stack([shift(a, offsets[0]) for a in x]))
    assert torch.equal(torch.vmap(shift, (None, 0))(x[0], offsets), torch.stack([shift(x[0], o) for o in offsets]))


def test_autocast_leaves_the_dtype():
    x, offset = sample((2, 5, 6, 9), 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert shift(x, offset).dtype == torch.float32
        assert shift(x.bfloat16(), offset).dtype == torch.bfloat16


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_threads_do_not_change_results(format_):
    x, offset = sample((4, 80, 24, 24), 30, torch.float32)
    x = x.contiguous(memory_format=format_)
    before = torch.get_num_threads()
    try:
        for mode, transpose in itertools.product(MODES.values(), (False, True)):
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(native_kernel(x, offset, mode, transpose))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_indexes_past_two_to_the_31():
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if free is None or int(free[1]) < 7 << 20:
        pytest.skip("needs 7 GiB of free memory")
    x = torch.zeros(1, 3, 29_000, 25_000, dtype=torch.uint8)
    x[0, 2, -2, -2] = 7
    y = native_kernel(x, torch.tensor([[0, 0], [0, 0], [1, -1]]), MODES["zeros"], False)
    assert y[0, 2, -1, -3] == 7
    assert y[0, 2, -2:, -3:].sum() == 7


GOLDEN = Path(__file__).with_name("golden") / "shift.npz"


def test_equals_the_originals():
    """The CUDA kernel of shiftnet_cuda_v2, and ActiveSparseShifts where its gradient is right; run, not re-stated."""
    with np.load(GOLDEN) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    cases = sorted({key.split("/")[0] for key in arrays})
    assert len(cases) > 30
    for case in cases:
        padding_mode = case.rpartition("-")[2]
        x, offset, out = (arrays[f"{case}/{name}"] for name in ("x", "offset", "out"))
        assert torch.equal(shift(x, offset, padding_mode), out), case
        if f"{case}/grad_x" in arrays:
            x.requires_grad_()
            (grad,) = torch.autograd.grad(shift(x, offset, padding_mode), x, arrays[f"{case}/grad_out"])
            torch.testing.assert_close(grad, arrays[f"{case}/grad_x"])


LONGS = torch.zeros(5, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "offset", "padding_mode", "error", "message"),
    [
        ((2, 5, 6, 9), torch.zeros(5, 2), "zeros", TypeError, "integer offsets, got torch.float32"),
        ((2, 5, 6, 9), LONGS.bool(), "zeros", TypeError, "integer offsets, got torch.bool"),
        ((2, 5, 6, 9), LONGS.T, "zeros", ValueError, r"\[C, D\] = \[5, 2\] for x \[2, 5, 6, 9\], got \[2, 5\]"),
        ((2, 5, 6, 9), LONGS, "border", ValueError, "unknown padding_mode 'border'.*replicate"),
        ((2, 5, 6, 9), LONGS, "reflec", ValueError, "did you mean 'reflect'"),
        ((2, 5), LONGS, "zeros", ValueError, r"one to three spatial axes, got 2-D x \[2, 5\]"),
        ((2, 5, 1, 1, 1, 1), LONGS, "zeros", ValueError, "one to three spatial axes, got 6-D"),
        ((2, 5, 6, 9), LONGS.to("meta"), "zeros", ValueError, "on the device of x, cpu, got meta"),
        ((2, 5, 6, 9), [[0, 0]] * 5, "zeros", TypeError, "two tensors.*got Tensor and list"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(x, offset, padding_mode, error, message):
    with pytest.raises(error, match=message):
        shift(torch.zeros(x), offset, padding_mode)
