"""The shifted 1x1 convolution against an oracle in NumPy that shares no code with it, and through torch's machinery."""

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftconv import ops
from shiftconv.ops import native
from shiftconv.ops.sampling import MODES, PaddingMode
from shiftconv.ops.shift_linear import input_reference, reference, shift_linear, weight_reference

NUMPY_NAME = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}  # the other two agree
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}

# Shape of x and number of outputs: what the kernel tells apart is the number of pixels in an image (tiles of 48, strips
# of 16 that may span two images), blocks of 8 outputs, odd channels (bfloat16 takes pairs), and the rank.
CASES = [
    ((2, 5, 6, 9), 4),
    ((3, 16, 7, 7), 20),
    ((2, 7, 33, 31), 16),
    ((4, 9, 8, 8), 8),
    ((1, 33, 14, 14), 33),
    ((2, 6, 3, 5, 7), 9),
    ((2, 4, 40), 3),
    ((3, 4, 2, 2), 5),
    ((2, 130, 9, 11), 70),
    ((3, 17, 1, 1), 9),
]

every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
every_case = pytest.mark.parametrize(("shape", "outputs"), CASES, ids=str)


@pytest.fixture
def kernels():
    """The C++ kernels, registered with the dispatcher."""
    try:
        native.compiler()
    except native.NativeError as error:
        pytest.skip(str(error))
    native.load("shift_linear")
    native.load("shift_linear_backward")
    return torch.ops.shiftconv


def sample(shape, outputs, reach=2, dtype=torch.float64, stride=1):
    """Random x, offset, weight, bias, residual; the weights keep results near 1."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    sizes = [-(-size // step) for size, step in zip(shape[2:], steps(shape, stride), strict=True)]
    weight = random(outputs, shape[1]) / max(shape[1], 1) ** 0.5
    x, weight, bias, residual = (
        t.to(dtype) for t in (random(*shape), weight, random(outputs), random(shape[0], outputs, *sizes))
    )
    return x, torch.randint(-reach, reach + 1, (shape[1], len(shape) - 2), generator=generator), weight, bias, residual


def steps(shape, stride):
    return [stride] * (len(shape) - 2) if isinstance(stride, int) else [*stride]


def oracle(x, offset, weight, bias, padding_mode, stride, relu, residual):
    """Pad with NumPy as far as the offset of a channel reaches, cut its window, mix; all in float64."""
    moved = torch.empty(x.shape, dtype=torch.float64)
    for c, o in enumerate(offset.tolist()):
        widths = [(0, 0), *((abs(d), abs(d)) for d in o)]
        padded = np.pad(x[:, c].double().numpy(), widths, NUMPY_NAME.get(padding_mode, padding_mode))
        window = tuple(slice(abs(d) - d, abs(d) - d + s) for d, s in zip(o, x.shape[2:], strict=True))
        moved[:, c] = torch.from_numpy(padded[(slice(None), *window)])
    kept = moved[(..., *(slice(None, None, step) for step in steps(x.shape, stride)))]
    y = np.einsum("oc,ncp->nop", weight.double().numpy(), kept.flatten(2).numpy())
    y = torch.from_numpy(y).view(x.shape[0], weight.shape[0], *kept.shape[2:])
    if bias is not None:
        y = y + bias.double().view(-1, *[1] * (x.ndim - 2))
    if relu:
        y = y.clamp(min=0)
    return y if residual is None else y + residual.double()


def assert_near(actual, expected, factor=1.0):
    tolerance = factor * TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def formats(x):
    return [x] if x.ndim == 3 else [x, x.contiguous(memory_format=LAST[x.ndim])]


@every_case
@every_mode
@every_dtype
def test_kernel_and_reference_equal_oracle(kernels, shape, outputs, padding_mode, dtype):
    """Both memory formats, with and without all that may be added; outputs over memory that held something else."""
    for reach, stride in ((0, 1), (1, 1), (2, 2), (40, 1), (3, 3)):
        x, offset, weight, bias, residual = sample(shape, outputs, reach, dtype, stride)
        step, mode = steps(shape, stride), MODES[padding_mode]
        for full in (True, False):
            b, r = (bias, residual) if full else (None, None)
            expected = oracle(x, offset, weight, b, padding_mode, stride, full, r)
            for x_ in formats(x):
                poison = torch.full_like(residual, float("nan"))
                del poison
                y = kernels.shift_linear(x_, offset, weight, b, r, mode, step, full)
                truth = reference(x_, offset, weight, b, r, mode, step, full)
                assert_near(y, expected)
                assert_near(truth, expected)
                assert y.stride() == truth.stride()
                assert y.dtype == dtype


@every_case
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_kernels_equal_reference(kernels, shape, outputs, padding_mode, dtype):
    for reach, stride in ((0, 1), (1, 1), (2, 2), (40, 1), (3, 3)):
        x, offset, weight, _, grad = sample(shape, outputs, reach, dtype, stride)
        step, mode = steps(shape, stride), MODES[padding_mode]
        wide = [t.double() for t in (grad, x)]
        expected = weight_reference(*wide, offset, mode, step)
        scale = max(1, grad[:, 0].numel()) ** 0.5
        for actual, truth in zip(kernels.shift_linear_weight(grad, x, offset, mode, step), expected, strict=True):
            assert_near(actual / scale, truth / scale)
        if stride == 1 and padding_mode == "zeros":
            poison = torch.full_like(x, float("nan"))
            del poison
            actual = kernels.shift_linear_input(grad, offset, weight)
            assert_near(actual, input_reference(wide[0], offset, weight.double()), factor=2)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    padding_mode=st.sampled_from(get_args(PaddingMode)),
    dtype=st.sampled_from(list(TOLERANCE)),
    last=st.booleans(),
    data=st.data(),
)
def test_any_shape_any_offset(sizes, channels, outputs, padding_mode, dtype, last, data):
    stride = [data.draw(st.integers(1, 3)) for _ in sizes]
    column = st.one_of(st.integers(-3, 3), st.integers(-30, 30))
    x, _, weight, bias, residual = sample((2, channels, *sizes), outputs, 0, dtype, stride)
    offset = torch.tensor([[data.draw(column) for _ in sizes] for _ in range(channels)])
    if last and x.ndim > 3:
        x = x.contiguous(memory_format=LAST[x.ndim])
    y = shift_linear(x, offset, weight, bias, padding_mode, stride, "relu", residual)
    assert_near(y, oracle(x, offset, weight, bias, padding_mode, stride, True, residual))


def test_equals_shift_then_convolution():
    x, offset, weight, bias, residual = sample((2, 5, 6, 9), 4)
    y = shift_linear(x, offset, weight, bias, "reflect", 1, "relu", residual)
    convolved = F.conv2d(ops.shift(x, offset, "reflect"), weight[..., None, None], bias)
    torch.testing.assert_close(y, convolved.relu() + residual)


def test_strides_by_axis():
    x, offset, weight, *_ = sample((2, 5, 7, 9), 4)
    y = shift_linear(x, offset, weight, stride=(2, 3))
    torch.testing.assert_close(y, oracle(x, offset, weight, None, "zeros", (2, 3), False, None))
    assert y.shape == (2, 4, 4, 3)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_offsets_at_the_ends_of_int64(kernels, padding_mode, dtype):
    x, _, weight, *_ = sample((1, 2, 5, 6), 3, 0, dtype)
    ends = torch.tensor([[2**63 - 1, -(2**63)], [-(2**63), 2**63 - 1]])
    period = {"circular": (5, 6), "reflect": (8, 10), "symmetric": (10, 12)}.get(padding_mode)
    small = [[(o % period[i]) if period else max(-9, min(9, o)) for i, o in enumerate(row)] for row in ends.tolist()]
    y = kernels.shift_linear(x, ends, weight, None, None, MODES[padding_mode], [1, 1], False)
    assert_near(y, oracle(x, torch.tensor(small), weight, None, padding_mode, 1, False, None))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_offsets_of_every_integer_dtype(dtype):
    x, offset, weight, *_ = sample((2, 5, 6, 9), 4)
    offset = offset.abs()
    assert torch.equal(shift_linear(x, offset.to(dtype), weight), shift_linear(x, offset, weight))


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("channels of another tensor", lambda x: x[:, ::2]),
        ("cut", lambda x: x[:, :, 1:, 1:]),
        ("cut, channels last", lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:, 1:]),
        ("expanded", lambda x: x[:1, :1].expand(2, 5, -1, -1)),
        ("transposed", lambda x: x.mT),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_any_strides(kernels, name, view, dtype):
    x = view(sample((2, 6, 7, 9), 0, dtype=dtype)[0])
    _, offset, weight, bias, residual = sample(x.shape, 5, dtype=dtype)
    expected = oracle(x, offset, weight, bias, "zeros", 1, False, residual)
    for r in (residual, residual.mT.contiguous().mT, residual.contiguous(memory_format=torch.channels_last)):
        y = shift_linear(x, offset.T.contiguous().T, weight.T.contiguous().T, bias, residual=r)
        assert_near(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last if name.endswith("last") else torch.contiguous_format)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 0, 0, 0)], ids=str)
def test_empty(shape):
    x, offset, weight, bias, residual = sample(shape, 4, dtype=torch.float32)
    for t in (x, weight, bias):
        t.requires_grad_()
    y = shift_linear(x, offset, weight, bias, "circular", 1, "relu", residual)
    y.sum().backward()
    assert y.shape == residual.shape
    assert x.grad.shape == shape
    torch.testing.assert_close(y, bias.relu().view(-1, *[1] * (x.ndim - 2)) + residual if shape[1] == 0 else y)


def test_no_outputs():
    x, offset, weight, *_ = sample((2, 3, 5), 0, dtype=torch.float32)
    assert shift_linear(x, offset, weight).shape == (2, 0, 5)


def test_keeps_what_is_not_finite(kernels):
    """A NaN stays one through relu, and touches the pixels that read it, no others."""
    x, _, weight, *_ = sample((2, 3, 6, 8), 9, dtype=torch.float32)
    x[1, 2, 5, 7] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        y = shift_linear(x.to(dtype), torch.ones(3, 2, dtype=torch.long) * -1, weight.to(dtype), activation="relu")
        assert y.isnan().nonzero().tolist() == [[1, o, 4, 6] for o in range(9)]


@every_mode
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3, 3, 2), (1, 2, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_of_any_order(shape, padding_mode, activation):
    for stride in (1, 2):
        x, offset, weight, bias, residual = sample(shape, 2, stride=stride)
        inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]

        def function(x, weight, bias, residual, offset=offset, stride=stride):
            return shift_linear(x, offset, weight, bias, padding_mode, stride, activation, residual)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_gradients_equal_those_of_the_steps(padding_mode, dtype, last):
    """The same with two operators, in float64; gradients lie in memory as their inputs."""
    for stride, activation in ((1, None), (2, "relu"), (1, "relu")):
        x, offset, weight, bias, residual = sample((3, 9, 7, 7), 10, dtype=dtype, stride=stride)
        if last:
            x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
        y = shift_linear(x, offset, weight, bias, padding_mode, stride, activation, residual)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        moved = ops.shift(wide[0], offset, padding_mode)[..., ::stride, ::stride]
        z = F.conv2d(moved, wide[1][..., None, None], wide[2])
        if activation:
            # Close to zero, both must take the same side.
            z = z * (shift_linear(x, offset, weight, bias, padding_mode, stride, activation) > 0)
        grad = torch.randn_like(y)
        expected = torch.autograd.grad(z + wide[3], wide, grad.double())
        for actual, truth in zip(torch.autograd.grad(y, leaves, grad), expected, strict=True):
            assert_near(actual / 10, truth / 10)
        assert torch.autograd.grad(shift_linear(x, offset, weight).sum(), x)[0].stride() == x.stride()


def test_registration_is_sound(kernels):
    tests = ("test_schema", "test_faketensor")  # autograd is recorded by shift_linear(), not by the raw operators
    for shape, stride, relu in (((2, 5, 6, 9), 1, True), ((2, 5, 40), 2, False), ((2, 6, 3, 5, 7), 3, False)):
        x, offset, weight, bias, residual = sample(shape, 4, dtype=torch.float32, stride=stride)
        step = steps(shape, stride)
        for x_, b, r in itertools.product([*formats(x), x.mT.contiguous().mT], (bias, None), (residual, None)):
            arguments = (x_, offset, weight, b, r, 0, step, relu)
            torch.library.opcheck(kernels.shift_linear.default, arguments, test_utils=tests)
        arguments = (residual, x, offset, 0, step)
        torch.library.opcheck(kernels.shift_linear_weight.default, arguments, test_utils=tests)
        if stride == 1:
            torch.library.opcheck(kernels.shift_linear_input.default, (residual, offset, weight), test_utils=tests)


def energy(x, offset, weight, bias, residual):
    return shift_linear(x, offset, weight, bias, "zeros", 1, "relu", residual).pow(2).sum()


@pytest.mark.slow
def test_compiles_in_one_graph():
    x, offset, weight, bias, residual = sample((2, 5, 6, 9), 4, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    arguments = (x, offset, weight, bias, residual)
    expected = torch.autograd.grad(energy(*arguments), leaves)
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*arguments), leaves), expected)


class Block(torch.nn.Module):
    def forward(self, x, offset, weight):
        return shift_linear(x, offset, weight, stride=2, activation="relu") + 1


def test_exports_with_a_free_batch():
    x, offset, weight, *_ = sample((2, 5, 6, 9), 4, dtype=torch.float32)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)}, None, None)
    program = torch.export.export(Block(), (x, offset, weight), dynamic_shapes=shapes)
    assert torch.ops.shiftconv.shift_linear.default in {node.target for node in program.graph.nodes}
    x = torch.randn(7, 5, 6, 9)
    torch.testing.assert_close(program.module()(x, offset, weight), Block()(x, offset, weight))


def test_function_transforms():
    x, offset, weight, bias, residual = sample((3, 2, 5, 4), 4)
    arguments = (x, offset, weight, bias, residual)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    expected = torch.autograd.grad(energy(leaves[0], offset, *leaves[1:]), leaves)
    torch.testing.assert_close(torch.func.grad(energy, (0, 2, 3, 4))(*arguments), expected)
    each = torch.func.vmap(
        torch.func.grad(lambda x, w, r: energy(x[None], offset, w, bias, r[None]), (0, 1)), (0, None, 0)
    )
    per_image = each(x, weight, residual)
    torch.testing.assert_close(per_image[0], expected[0])
    torch.testing.assert_close(per_image[1].sum(0), expected[1])


def test_maps_over_any_argument():
    x, offset, weight, bias, _ = sample((4, 3, 5, 6), 2)
    weights, offsets, batches = torch.stack([weight, -weight]), torch.stack([offset, -offset]), torch.stack([x, x + 1])

    def plain(x, offset, weight):
        return shift_linear(x, offset, weight, bias, "circular", 2, "relu")

    for dims in itertools.product((0, None), repeat=3):
        stacked = [s if d == 0 else s[0] for s, d in zip((batches, offsets, weights), dims, strict=True)]
        if dims == (None, None, None):
            continue
        each = [plain(*(s[i] if d == 0 else s for s, d in zip(stacked, dims, strict=True))) for i in range(2)]
        torch.testing.assert_close(torch.vmap(plain, dims)(*stacked), torch.stack(each))


def test_autocast_casts_as_a_linear_layer():
    x, offset, weight, bias, residual = sample((2, 5, 6, 9), 4, dtype=torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = shift_linear(x, offset, weight, bias, residual=residual)
        assert y.dtype == torch.bfloat16
        assert shift_linear(x.double(), offset, weight.double()).dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert_near(y, oracle(x.detach(), offset, weight, bias, "zeros", 1, False, residual))


def test_threads_do_not_change_results(kernels):
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        x, offset, weight, bias, residual = sample((4, 60, 24, 24), 70, 3, dtype)
        try:
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                y = kernels.shift_linear(x, offset, weight, bias, residual, 0, [1, 1], True)
                results.append([y, *kernels.shift_linear_weight(y, x, offset, 0, [1, 1])])
                results[-1].append(kernels.shift_linear_input(y, offset, weight))
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        finally:
            torch.set_num_threads(before)


X, OFFSET, WEIGHT = torch.zeros(2, 5, 6, 9), torch.zeros(5, 2, dtype=torch.long), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=None), TypeError, "takes tensors: x, offset, weight.*got NoneType, Tensor, Tensor, NoneType, NoneType"),
        (dict(bias=[0.0] * 4), TypeError, "got Tensor, Tensor, Tensor, list"),
        (dict(offset=OFFSET.float()), TypeError, "integer offsets, got torch.float32"),
        (dict(offset=OFFSET.bool()), TypeError, "integer offsets, got torch.bool"),
        (dict(offset=OFFSET.T), ValueError, r"\[C, D\] = \[5, 2\] for x \[2, 5, 6, 9\], got \[2, 5\]"),
        (dict(offset=OFFSET.to("meta")), ValueError, "on the device of x, cpu, got meta"),
        (dict(x=X[0, 0]), ValueError, "one to three spatial axes, got 2-D"),
        (dict(x=X[None, None]), ValueError, "one to three spatial axes, got 6-D"),
        (dict(x=X.long()), TypeError, "x of a floating dtype, got torch.int64"),
        (dict(weight=WEIGHT.T), ValueError, r"weight must be \[O, C\] with C = 5 channels of x, got \[5, 4\]"),
        (dict(weight=WEIGHT[..., None]), ValueError, r"weight must be \[O, C\]"),
        (dict(weight=WEIGHT.double()), TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
        (dict(weight=WEIGHT.to("meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias must be \[4\] for x \[2, 5, 6, 9\], got \[5\]"),
        (dict(bias=torch.zeros(4).half()), TypeError, "bias must have the dtype of x"),
        (dict(residual=torch.zeros(2, 4, 6, 9), stride=2), ValueError, r"residual must be \[2, 4, 3, 5\]"),
        (dict(residual=torch.zeros(2, 4, 6, 1)), ValueError, r"residual must be \[2, 4, 6, 9\]"),
        (dict(padding_mode="reflec"), ValueError, "did you mean 'reflect'"),
        (dict(activation="gelu"), ValueError, "unknown activation 'gelu'.*relu"),
        (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
        (dict(stride=(1, 2, 3)), ValueError, "2 strides"),
        (dict(stride=1.5), TypeError, "stride"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(change, error, message):
    with pytest.raises(error, match=message):
        shift_linear(**{**dict(x=X, offset=OFFSET, weight=WEIGHT), **change})


def test_kernels_refuse_what_does_not_fit(kernels):
    """Whoever calls the raw operators gets an error, and no crash."""
    with pytest.raises(RuntimeError, match="expected offset"):
        kernels.shift_linear(X, OFFSET[:4], WEIGHT, None, None, 0, [1, 1], False)
    with pytest.raises(RuntimeError, match="expected x and weight of one dtype"):
        kernels.shift_linear(X, OFFSET, WEIGHT.double(), None, None, 0, [1, 1], False)
    with pytest.raises(RuntimeError, match="expected a residual"):
        kernels.shift_linear(X, OFFSET, WEIGHT, None, X, 0, [1, 1], False)
    with pytest.raises(RuntimeError, match="expected float"):
        kernels.shift_linear(X.long(), OFFSET, WEIGHT.long(), None, None, 0, [1, 1], False)
    with pytest.raises(RuntimeError, match="expected a gradient of the sizes of the result"):
        kernels.shift_linear_weight(X, X, OFFSET, 0, [2, 1])
    with pytest.raises(RuntimeError, match="expected weight"):
        kernels.shift_linear_input(X, OFFSET, WEIGHT)
