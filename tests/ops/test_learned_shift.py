"""Both learned shifts within torch: registration, compilation, export, transforms, autocast, threads; and bad input."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shiftconv import ops
from shiftconv.ops.active_shift import reference_backward, round_offset

from .cases import LAYOUTS, MODES, every_mode, native_or_skip, normal

raw, raw_backward = torch.ops.shiftconv.active_shift.default, torch.ops.shiftconv.active_shift_backward.default
raw_round = torch.ops.shiftconv.round_offset.default
SHIFTS = [ops.active_shift, ops.sparse_shift]
both = pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.__name__)
WINDOWED = {"crop": ((-1, 0), (1, -2)), "stride": 2}
every_window = pytest.mark.parametrize("window", [{}, WINDOWED], ids=["plain", "windowed"])
GEOMETRY = [5, -1, 3, 2, 6, 1, 4, 2]  # of WINDOWED for [5, 6] pixels


def sample(shape=(2, 3, 5, 6), dtype=torch.float32, layout="contiguous"):
    """Numbers and real offsets."""
    return normal(shape, 0, dtype, layout), (normal((shape[1], len(shape) - 2), 1) * 2).float()


def gradients(f, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(f(*inputs), inputs)


def energy(shift, *arguments, **window):
    return lambda x, offset: (shift(x, offset, *arguments, **window) * 1.5).sin().sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("geometry", [[], GEOMETRY], ids=["plain", "windowed"])
def test_registration_is_sound(layout, geometry):
    x, offset = sample(layout=layout)
    grad = normal((2, 3, 3, 4) if geometry else x.shape, 2, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for rounded in (False, True):
        for rest in ((0, rounded, 0, False), (3, rounded, 0, False), (1, rounded, 1, False)):
            torch.library.opcheck(raw, (x, offset, *rest, geometry), test_utils=tests)
        torch.library.opcheck(raw, (grad, offset, 3, rounded, 0, True, geometry), test_utils=tests)
        torch.library.opcheck(raw_backward, (grad, x, offset, 3, rounded, geometry), test_utils=tests)
    for view in (offset, offset.T.contiguous().T, offset[:, :0], offset[:1].expand(5, 2)):
        torch.library.opcheck(raw_round, (view,), test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 1, 5, 6), (2, 3, 1, 1), (2, 3, 4), (1, 2, 3, 1, 4)], ids=str)
def test_strides_are_those_that_were_foretold(shape, layout):
    """By the fakes; results of a dense x have its strides, and so have gradients, on every way that leads to them."""
    x, offset = sample(shape, layout=layout)
    dense = x.is_contiguous() or (x.ndim > 3 and layout == "channels last")
    for stride in (1, 2):
        with FakeTensorMode() as mode:
            foretold = ops.active_shift(mode.from_tensor(x), mode.from_tensor(offset), stride=stride)
        for shift in SHIFTS:
            y = shift(x, offset, stride=stride)
            assert y.stride() == foretold.stride()
            if dense and stride == 1:
                assert y.stride() == x.stride()
            x_, offset_ = x.detach().requires_grad_(), offset.detach().requires_grad_()
            for create_graph in (False, True):
                y = shift(x_, offset_, stride=stride)
                grad_x, grad_offset = torch.autograd.grad(y.sum(), (x_, offset_), create_graph=create_graph)
                assert grad_offset.is_contiguous()
                if dense:
                    assert grad_x.stride() == x.stride()


@pytest.mark.slow
@both
@every_window
def test_compiles_in_one_graph(shift, window):
    torch._dynamo.reset()  # it counts the cases as recompilations of one function
    f = energy(shift, "reflect", **window)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for layout in ("contiguous", "channels last"):
        inputs = sample(layout=layout)
        for actual, expected in zip(gradients(compiled, *inputs), gradients(f, *inputs), strict=True):
            torch.testing.assert_close(actual, expected)
    any_size = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 5, 6), (4, 3, 7, 9), (1, 3, 12, 11)):
        torch.testing.assert_close(any_size(*sample(shape)), f(*sample(shape)))


class Shifted(torch.nn.Module):
    """With the offset a parameter, as the modules have it."""

    def __init__(self, shift, window):
        super().__init__()
        self.shift, self.window = shift, window
        self.offset = torch.nn.Parameter(sample()[1])

    def forward(self, x):
        return self.shift(x, self.offset, "symmetric", **self.window) + 1


@both
@pytest.mark.parametrize(
    ("window", "free"),
    [({}, (0, 2)), (WINDOWED, (0,)), (WINDOWED, (0, 2))],
    ids=["plain", "windowed", "windowed, any size"],
)
def test_exports_with_free_sizes(shift, window, free):
    module, sizes = (
        Shifted(shift, window),
        {axis: torch.export.Dim(f"s{axis}", min=4 if axis else 2, max=64) for axis in free},
    )
    program = torch.export.export(module, (sample()[0],), dynamic_shapes=(sizes,))
    operator = "shiftconv.shift.default" if shift is ops.sparse_shift else "shiftconv.active_shift.default"
    assert operator in {str(node.target) for node in program.graph.nodes}
    x = normal((7, 3, 9 if 2 in free else 5, 6), 3, torch.float32)
    torch.testing.assert_close(program.module()(x), module(x))


@both
@every_window
@pytest.mark.parametrize("offset_axis", [None, 0, 1, 2, -1])
def test_maps_over_inputs_and_offsets(shift, window, offset_axis):
    x, offset = normal((4, 2, 3, 5, 6)), normal((4, 3, 2), 1) * 2
    f = energy(shift, "reflect", **window)
    slope = torch.func.grad(f, (0, 1))
    for x_axis in (None, 0, 1, 2, 3, 4, -1):
        if (x_axis, offset_axis) == (None, None):
            continue
        inputs = [(x[0] if x_axis is None else x[i], offset[0] if offset_axis is None else offset[i]) for i in range(4)]
        mapped = (
            x[0] if x_axis is None else x.movedim(0, x_axis),
            offset[0] if offset_axis is None else offset.movedim(0, offset_axis),
        )
        each = torch.stack([shift(*pair, "reflect", **window) for pair in inputs])
        y = torch.vmap(lambda x, o: shift(x, o, "reflect", **window), (x_axis, offset_axis))(*mapped)
        assert torch.equal(y, each)
        slopes = torch.vmap(slope, (x_axis, offset_axis))(*mapped)
        expected = [torch.stack(column) for column in zip(*(gradients(f, *pair) for pair in inputs), strict=True)]
        torch.testing.assert_close([*slopes], expected)


@both
@every_mode
def test_function_transforms(shift, padding_mode):
    x, offset = normal((3, 2, 5, 4)), normal((2, 2), 1) * 2
    f = energy(shift, padding_mode)
    expected = gradients(f, x, offset)
    torch.testing.assert_close(torch.func.grad(f, (0, 1))(x, offset), expected)
    torch.testing.assert_close(torch.func.jacrev(f, (0, 1))(x, offset), expected)
    each = torch.vmap(torch.func.grad(lambda x, o: f(x[None], o), (0, 1)), (0, None))(x, offset)  # per sample
    torch.testing.assert_close((each[0], each[1].sum(0)), expected)
    if shift is ops.active_shift:
        hessian = torch.func.jacrev(torch.func.jacrev(f, 1), 1)(x, offset)
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda o: f(x, o), offset))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_dtypes(shift, dtype):
    """Feature maps of 16 bits meet offsets of 32: neither is cast, and the gradients are of their dtypes."""
    x, offset = sample()
    with torch.autocast("cpu", dtype):
        assert shift(x, offset).dtype == torch.float32
        x, offset = x.to(dtype).requires_grad_(), offset.requires_grad_()
        y = shift(x, offset)
        grad_x, grad_offset = torch.autograd.grad(y.sum(), (x, offset))
    assert (y.dtype, grad_x.dtype, grad_offset.dtype) == (dtype, dtype, torch.float32)
    with torch.no_grad():
        assert torch.equal(y, shift(x, offset))


@both
def test_gradients_that_nobody_wants(shift):
    x, offset = sample()
    expected = gradients(lambda x, o: shift(x, o).square().sum(), x, offset)
    for wants_x, wants_offset in ((True, False), (False, True)):
        inputs = x.clone().requires_grad_(wants_x), offset.clone().requires_grad_(wants_offset)
        shift(*inputs).square().sum().backward()
        for tensor, grad, wanted in zip(inputs, expected, (wants_x, wants_offset), strict=True):
            assert (tensor.grad is not None) == wanted
            assert tensor.grad is None or torch.equal(tensor.grad, grad)
    with torch.inference_mode():
        assert not shift(x, offset).requires_grad


@both
def test_notices_that_its_input_was_overwritten(shift):
    x, offset = sample()
    x = x * 1
    y = shift(x, offset.requires_grad_())
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def with_threads(number, f):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        return f()
    finally:
        torch.set_num_threads(before)


def same_bits(f):
    """Over repeated calls, and with one, two and three threads."""
    results = [with_threads(number, f) for number in (1, 1, 2, 2, 3)]
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 200, 300), (3, 70, 24, 24), (2, 3, 65, 67)], ids=str)
def test_threads_do_not_change_results(shape, format_):
    native_or_skip("active_shift", "shift")
    x, offset = sample(shape)
    x = x.contiguous(memory_format=format_)
    grad = normal(shape, 2, torch.float32).contiguous(memory_format=format_)
    small = grad[..., ::2, ::2].contiguous(memory_format=format_)
    window = [n for size in shape[2:] for n in (size, 0, (size + 1) // 2, 2)]
    for mode in MODES.values():
        for rounded in (False, True):
            assert same_bits(lambda m=mode, r=rounded: raw_backward(grad, x, offset, m, r))
        assert same_bits(lambda m=mode: raw_backward(small, x, offset, m, False, window))
        assert same_bits(lambda m=mode: [raw(x, offset, m, False, 0, t) for t in (False, True)])


def test_threads_do_not_change_results_of_differentiable_gradients():
    """The same for what a training loop with a gradient penalty takes, and for the reference."""
    (x, offset), grad = sample((1, 1, 200, 300)), normal((1, 1, 200, 300), 2, torch.float32)
    assert same_bits(lambda: reference_backward(grad, x, offset, 0, False))
    leaves = x.requires_grad_(), offset.requires_grad_()
    assert same_bits(lambda: torch.autograd.grad(ops.active_shift(*leaves), leaves, grad, create_graph=True))


X, W = (2, 3, 5, 6), torch.zeros(3, 2)


@both
@pytest.mark.parametrize(
    ("x", "offset", "options", "error", "message"),
    [
        (X, W.long(), {}, TypeError, "takes real offsets, got torch.int64; whole ones go to shift"),
        (X, W.bool(), {}, TypeError, "takes real offsets, got torch.bool"),
        (X, W.to(torch.complex64), {}, TypeError, "takes real offsets, got torch.complex64"),
        (X, [[0.0, 0.0]] * 3, {}, TypeError, "two tensors.*got Tensor and list"),
        (X, W.T, {}, ValueError, r"\[C, D\] = \[3, 2\] for x \[2, 3, 5, 6\], got \[2, 3\]"),
        (X, W[:2], {}, ValueError, r"\[C, D\] = \[3, 2\] for x \[2, 3, 5, 6\], got \[2, 2\]"),
        (X, W[0], {}, ValueError, r"got \[2\]"),
        ((2, 3), W, {}, ValueError, r"one to three spatial axes, got 2-D x \[2, 3\]"),
        ((2, 3, 1, 1, 1, 1), W, {}, ValueError, "one to three spatial axes, got 6-D"),
        (X, W.to("meta"), {}, ValueError, "on the device of x, cpu, got meta"),
        (X, W, {"padding_mode": "reflec"}, ValueError, "unknown padding_mode 'reflec'; did you mean 'reflect'"),
        (X, W, {"padding_mode": "border"}, ValueError, "unknown padding_mode 'border'.*replicate"),
        (X, W, {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        (X, W, {"stride": (1, -2)}, ValueError, r"stride must be at least 1, got \(1, -2\)"),
        (X, W, {"stride": (1, 2, 3)}, ValueError, r"takes 2 strides.*got \(1, 2, 3\)"),
        (X, W, {"stride": (2.0, 1)}, TypeError, r"whole numbers, got \(2.0, 1\)"),
        (X, W, {"stride": 2.0}, TypeError, "stride.*whole.*got 2.0"),
        (X, W, {"stride": None}, TypeError, "stride.*whole.*got None"),
        (X, W, {"crop": ((1.0, 1), (0, 0))}, TypeError, r"whole numbers, got 1 and \(\(1.0, 1\)"),
        (X, W, {"crop": ((1, 1),)}, ValueError, r"2 pairs of crops, got 1 and \(\(1, 1\),\)"),
        (X, W, {"crop": ((1, 1, 1), (0, 0))}, ValueError, "2 pairs of crops"),
        (X, W, {"crop": 1}, TypeError, "crop.*pairs.*got 1"),
        (X, W, {"crop": (1, 1)}, TypeError, r"crop.*pairs.*got \(1, 1\)"),
        (X, W, {"crop": ((3, 2), (0, 0))}, ValueError, "leaves 0 of 5 pixels"),
        (X, W, {"crop": ((0, 0), (3, 9))}, ValueError, "leaves -6 of 6 pixels"),
        ((2, 3, 0, 6), W, {"crop": ((-1, 0), (0, 0))}, ValueError, "leaves 1 of 0 pixels"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(shift, x, offset, options, error, message):
    with pytest.raises(error, match=message):
        shift(torch.zeros(x), offset, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_only_floats_are_interpolated(dtype):
    with pytest.raises(TypeError, match=f"active_shift interpolates, so it takes floating point x, got {dtype}"):
        ops.active_shift(torch.zeros(X, dtype=dtype), W)


def test_eight_bits_are_not_interpolated():
    with pytest.raises(TypeError, match=r"got torch\.float8_e4m3fn"):
        ops.active_shift(torch.zeros(X).to(torch.float8_e4m3fn), W)


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31), 1e38])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_refuses_offsets_that_lead_nowhere(shift, value, kind):
    """Forward and backward, with and without gradients, with a window, on nested views; the next call is fine again."""
    x, offset = sample()
    bad = offset.to(kind, copy=True)
    bad[1, 1] = value
    message = r"offset must be finite and less than 2\*\*31 pixels either way, got"
    for options in ({}, WINDOWED):
        for x_, bad_ in ((x, bad), (x.clone().requires_grad_(), bad), (x, bad.clone().requires_grad_())):
            with pytest.raises(ValueError, match=message):
                shift(x_, bad_, **options)
        with pytest.raises(ValueError, match=message):
            torch.func.grad(energy(shift, **options))(x, bad)
    leaf = offset.clone().requires_grad_()
    y = shift(x, leaf)
    leaf.data[0, 0] = value  # between forward and backward
    with pytest.raises(ValueError, match=message):
        y.sum().backward()
    if kind != torch.bfloat16:
        with pytest.raises(ValueError, match=message):
            round_offset(bad)
    assert shift(x, offset).isfinite().all()


GUARDED = """
    import ctypes, itertools, mmap, torch
    from shiftconv.ops import native

    def between_guards(x, low):
        # x, contiguous, where reading before it (low) or behind it ends the process
        page, bytes_ = mmap.PAGESIZE, x.numel() * x.itemsize
        room = -(-bytes_ // page) * page
        memory = mmap.mmap(-1, room + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + page + room):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
        at = page if low else page + room - bytes_
        return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=at).view(x.shape).copy_(x)

    for operator in ("shift", "active_shift"):
        native.load(operator)
    ops = torch.ops.shiftconv
    shapes = [(1, 1, 5), (1, 2, 100), (1, 1, 3, 3), (2, 3, 7, 7), (2, 40, 7, 7), (1, 33, 4, 16), (1, 2, 3, 5, 7)]
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for shape, dtype, low, last in itertools.product(shapes, dtypes, (True, False), (True, False)):
        order = [0, *range(2, len(shape)), 1] if last else [*range(len(shape))]
        back = [order.index(i) for i in range(len(shape))]
        x, grad = (between_guards(torch.ones([shape[i] for i in order]).to(dtype), low).permute(back) for _ in range(2))
        for mode, reach in itertools.product(range(5), (0.5, 2.5, 9.0, -0.5, -3.5)):
            offset = torch.linspace(0, reach, shape[1] * (len(shape) - 2)).view(shape[1], -1)
            offset[-1] = reach
            geometry = [n for size in shape[2:] for n in (size, -1, (size + 2) // 2, 2)]
            for transpose in (False, True):
                ops.active_shift(x, offset, mode, False, 0, transpose)
                ops.shift(x, offset.round().long(), mode, transpose)
            ops.active_shift(x, offset, mode, False, 0, False, geometry)
            ops.shift(x, offset.round().long(), mode, False, geometry)
            ops.active_shift_backward(grad, x, offset, mode, False)
    print("survived")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by Linux's means")
def test_reads_nothing_beyond_its_inputs():
    native_or_skip("shift", "active_shift")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(GUARDED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "survived\n", f"exit status {done.returncode}\n{done.stderr[-2000:]}"
