"""The operators leave the package: as themselves, in aten operators, in ONNX, on quantised tensors.

The formulas are compared with the raw operators, which other tests compare with oracles.
"""

import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from shiftconv import ops
from shiftconv.ops.decompositions import decompositions
from shiftconv.ops.sampling import MODES, PaddingMode, geometry

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # torch 2.11 says all this to itself
    "ignore:The given buffer is not writable:UserWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
)

RAW = torch.ops.shiftconv
SHAPES = [(2, 4, 7), (2, 5, 6, 9), (1, 4, 3, 5, 4), (2, 3, 1, 4)]

every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def normal(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(operator, *args):
    return decompositions()[operator.default](*args)


def windows(x):
    """A plain output, and one that is cut, extended and strided."""
    return (), geometry(x, [(-2, 1) if size > 1 else (-2, -1) for size in x.shape[2:]], 2)


@every_shape
@every_mode
def test_formulas_of_integer_shifts_are_exact(shape, padding_mode):
    mode = MODES[padding_mode]
    for reach, (i, dtype) in itertools.product(
        (2, 40), enumerate((torch.float64, torch.bfloat16, torch.uint8, torch.int8, torch.bool))
    ):
        x = (normal(shape, i) * 50).to(dtype)
        offset = torch.randint(-reach, reach + 1, (shape[1], len(shape) - 2))
        for window in windows(x):
            y = RAW.shift(x, offset, mode, False, window)
            assert torch.equal(formula(RAW.shift, x, offset, mode, False, window), y)
            if dtype is torch.float64:
                grad = normal(y.shape, 9)
                expected = RAW.shift(grad, offset, mode, True, window)
                torch.testing.assert_close(formula(RAW.shift, grad, offset, mode, True, window), expected)
        in_place, y = x.clone(), x.clone()
        formula(RAW.shift_, in_place, offset[:-1], mode)
        RAW.shift_(y, offset[:-1], mode)
        assert torch.equal(in_place, y)


@every_shape
@every_mode
def test_formulas_of_learned_shifts_and_their_gradients(shape, padding_mode):
    mode, x, offset = MODES[padding_mode], normal(shape), normal((shape[1], len(shape) - 2), 1) * 3
    offset[0] = -1.0
    for window, rounded in itertools.product(windows(x), (False, True)):
        y = RAW.active_shift(x, offset, mode, rounded, 0, False, window)
        grad = normal(y.shape, 2)
        for derivative, transpose in itertools.product(range(2 ** offset.shape[1]), (False, True)):
            args = (grad if transpose else x, offset, mode, rounded, derivative, transpose, window)
            torch.testing.assert_close(formula(RAW.active_shift, *args), RAW.active_shift(*args))
        args = (grad, x, offset, mode, rounded, window)
        came, expected = formula(RAW.active_shift_backward, *args), RAW.active_shift_backward(*args)
        torch.testing.assert_close(tuple(came), tuple(expected))


def test_formulas_keep_dtypes_and_memory_formats():
    offset = normal((6, 2), 1) * 2
    for dtype, layout in itertools.product(
        (torch.float16, torch.float32), (torch.contiguous_format, torch.channels_last)
    ):
        x = normal((2, 6, 5, 4)).to(dtype).contiguous(memory_format=layout)
        for window in windows(x):
            y = formula(RAW.active_shift, x, offset.float(), 3, False, 0, False, window)
            expected = RAW.active_shift(x, offset.float(), 3, False, 0, False, window)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()
    empty = torch.empty(0, 6, 5, 4)
    assert formula(RAW.shift, empty, offset.long(), 0, False).shape == empty.shape
    assert formula(RAW.shift, torch.empty(2, 6, 0, 4), offset.long(), 0, False).shape == (2, 6, 0, 4)


class Everything(nn.Module):
    """Every operator on one map: those by whole pixels first, ``exact`` of them."""

    def __init__(self, channels, axes):
        super().__init__()
        self.register_buffer("whole", torch.randint(-9, 10, (channels, axes)))
        self.real = nn.Parameter(normal((channels, axes), 1, torch.float32) * 2)
        self.weight = nn.Parameter(normal((3, channels), 2, torch.float32))
        self.bias = nn.Parameter(normal((3,), 3, torch.float32))
        self.window = ([(1, -2)] * axes, 2)

    exact = 7

    def forward(self, x):
        modes = get_args(PaddingMode)
        ints = (x * 20).to(torch.uint8 if x.ndim == 3 else torch.int32)
        ys = [ops.shift(ints, self.whole, mode, *self.window) for mode in modes]
        ys += [ops.shift(x, self.whole), ops.sparse_shift(x, self.real, "reflect", *self.window)]
        ys += [ops.active_shift(x, self.real, mode, *(self.window if i % 2 else ())) for i, mode in enumerate(modes)]
        linear = ops.shift_linear(x, self.whole, self.weight, self.bias, "zeros", 2, "relu")
        return *ys, linear, ops.shift_linear(x, self.whole, self.weight, None, "circular", 2, residual=linear * 2)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: f"{len(s) - 2}d")
def test_program_in_aten_operators(shape):
    """Also for other numbers of images, and saved and loaded."""
    model, x = Everything(shape[1], len(shape) - 2).eval(), normal((3, *shape[1:]), 4, torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
        torch.testing.assert_close(program.module()(x), model(x))
        program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})
        for node in program.graph.nodes:
            assert "shiftconv" not in str(node.target)
        batch = normal((5, *shape[1:]), 5, torch.float32)
        for y, expected in zip(program.module()(batch), model(batch), strict=True):
            torch.testing.assert_close(y, expected)


def test_shift_in_place_leaves_the_package():
    class InPlace(nn.Module):
        def forward(self, x, offset):
            return ops.shift_(x * 2, offset, "reflect")

    x, offset = normal((2, 4, 6, 5)), torch.randint(-3, 4, (3, 2))
    program = torch.export.export(InPlace(), (x, offset)).run_decompositions(decompositions())
    assert not any("shiftconv" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x, offset), InPlace()(x, offset))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: f"{len(s) - 2}d")
def test_onnx_of_the_formulas(shape):
    """Standard operators of a size that does not grow with the batch; whole-pixel shifts exact in onnxruntime."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = Everything(shape[1], len(shape) - 2).eval(), normal((3, *shape[1:]), 4, torch.float32)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
        program = program.run_decompositions(decompositions())
        onnx = torch.onnx.export(program, dynamo=True, verbose=False)
        proto = onnx.model_proto
        assert {domain.domain for domain in proto.opset_import} == {""}
        content = proto.SerializeToString()
        assert len(content) < 300_000
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        batch = normal((5, *shape[1:]), 5, torch.float32)
        came = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        for i, (y, expected) in enumerate(zip(came, model(batch), strict=True)):
            y = torch.from_numpy(y)
            if i < model.exact:
                assert torch.equal(y, expected)
            else:
                torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantiz:DeprecationWarning")
def test_equals_the_quantised_operator_of_the_originals():
    """ActiveSparseShifts on quantised tensors, run: half to even, and the zero point where zeros are read."""
    with np.load(Path(__file__).with_name("golden") / "quantized.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    cases = sorted({key.split("/")[0] for key in arrays})
    assert len(cases) == 45
    for case in cases:
        padding_mode = case.rpartition("-")[2]
        ints, offset, out, zero_point = (arrays[f"{case}/{name}"] for name in ("x", "offset", "out", "zero_point"))
        x = torch._make_per_tensor_quantized_tensor(ints, 0.03, int(zero_point))
        for y in (ops.sparse_shift(x, offset, padding_mode), ops.shift(x, offset.round().long(), padding_mode)):
            assert torch.equal(y.int_repr(), out), case
            assert (y.q_scale(), y.q_zero_point(), y.dtype) == (0.03, int(zero_point), x.dtype)


def test_quantised_where_the_originals_fail():
    """Offsets that are all alike, that are far apart, and that are beyond a byte."""
    ints = torch.arange(60, dtype=torch.uint8).view(1, 3, 20)
    x = torch._make_per_tensor_quantized_tensor(ints, 0.5, 7)
    for column in ([0, 0, 0], [-200, 0, 200], [300, 2, -3]):
        offset = torch.tensor(column, dtype=torch.float32)[:, None]
        y = ops.sparse_shift(x, offset, "circular").int_repr()
        assert torch.equal(y, torch.stack([ints[0, c].roll(o) for c, o in enumerate(column)])[None])


@pytest.mark.parametrize("transpose", [False, True])
def test_formulas_of_depthwise_convolutions(transpose):
    x, other, bias = normal((2, 3, 9, 6)), normal((2, 3, 9, 6), 1), normal((3,), 2)
    weight = [normal((3, 1, *size), 3) for size in ((7, 3), (3, 25), (2, 2))]
    padding = [5, 1, 1, 1, 1, 1, 13, 11, 0, 1, 1, 0]
    for arguments in (
        ([x], weight, bias, padding, transpose),
        ([x, other, x], weight, None, padding, transpose),
        ([x], weight[:1], bias, padding[:4], transpose),
    ):
        torch.testing.assert_close(formula(RAW.depthwise_sum, *arguments), RAW.depthwise_sum(*arguments))
    expected = RAW.depthwise_each(x, weight, padding, transpose)
    torch.testing.assert_close(formula(RAW.depthwise_each, x, weight, padding, transpose), expected)
    if not transpose:
        gradients = RAW.depthwise_weight([x], expected, padding)
        torch.testing.assert_close(formula(RAW.depthwise_weight, [x], expected, padding), gradients)


def test_depthwise_convolutions_leave_the_package():
    """With a dynamic height: unreachable taps stay, as no size says which they are."""

    class Net(nn.Module):
        def forward(self, x, tall, wide):
            return ops.cross_conv(x, tall, wide), ops.depthwise_conv(x, tall, padding="same")

    inputs = normal((2, 3, 9, 8)), normal((3, 1, 21, 3)), normal((3, 1, 3, 21))
    shapes = ({2: Dim("height", min=2, max=64)}, None, None)
    program = torch.export.export(Net(), inputs, dynamic_shapes=shapes)
    program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})
    assert not [node for node in program.graph.nodes if "shiftconv" in str(node.target)]
    other = (normal((2, 3, 31, 8)), *inputs[1:])
    torch.testing.assert_close(program.module()(*other), Net()(*other))
