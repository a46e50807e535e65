"""The Triton kernel of shift_linear against the reference: interpreted, compiled, and on a GPU where there is one."""

import importlib
import itertools
from typing import get_args

import pytest
import torch

from shiftconv.ops.sampling import MODES, PaddingMode
from shiftconv.ops.shift_linear import reference

triton = pytest.importorskip("triton")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [
    ((2, 3, 9), 5, (2,)),
    ((1, 20, 4, 3), 17, (1, 1)),
    ((2, 40, 5, 7), 70, (2, 3)),
    ((1, 4, 2, 3, 2), 2, (1, 2, 1)),
]


def module():
    return importlib.import_module("shiftconv.ops.triton.shift_linear")


def problem(x, outputs, stride, extras=True):
    """Offsets to beyond the image, weights, bias and residual for ``x``."""
    generator = torch.Generator().manual_seed(1)
    offset = torch.randint(-4, 5, (x.shape[1], x.ndim - 2), generator=generator)
    sizes = (x.shape[0], outputs, *(-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True)))
    floats = [torch.randn(shape, generator=generator).to(x.dtype) for shape in ((x.shape[1], outputs), outputs, sizes)]
    return x, offset, floats[0].t(), floats[1] if extras else None, floats[2] if extras else None


def close(y, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(y.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert y.stride() == expected.stride()


@pytest.mark.interpreted
@pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
@pytest.mark.parametrize(("shape", "outputs", "stride"), SHAPES, ids=str)
def test_equals_reference(shape, outputs, stride, padding_mode, both_formats):
    for x, relu in itertools.product(both_formats(shape), (False, True)):
        arguments = problem(x, outputs, stride, relu)
        y = module().shift_linear(*arguments, MODES[padding_mode], stride, relu)
        close(y, reference(*arguments, MODES[padding_mode], stride, relu))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype, both_formats):
    for x in both_formats((2, 33, 4, 3), dtype):
        arguments = problem(x, 6, (1, 1))
        close(module().shift_linear(*arguments, 0, (1, 1), True), reference(*arguments, 0, (1, 1), True))


@pytest.mark.interpreted
def test_any_strides_long_indices_and_no_elements(both_formats, monkeypatch):
    monkeypatch.setattr(module(), "_INT32", 0)
    x = both_formats((2, 8, 5, 6))[0][:, ::2, 1:]
    arguments = problem(x, 3, (1, 2))
    close(module().shift_linear(*arguments, 3, (1, 2), False), reference(*arguments, 3, (1, 2), False))
    for empty in (torch.empty(0, 2, 3), torch.empty(1, 0, 3)):
        arguments = problem(empty, 2, (1,))
        assert torch.equal(module().shift_linear(*arguments, 0, (1,), True), reference(*arguments, 0, (1,), True))


@pytest.mark.interpreted
def test_nan_passes_relu():
    x = torch.tensor([[[float("nan"), -1.0, 2.0]]])
    y = module().shift_linear(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None, None, 0, (1,), True)
    torch.testing.assert_close(y, torch.tensor([[[float("nan"), 0.0, 2.0]]]), equal_nan=True)


def compiled(machine_code, x, outputs, capability, precise, residual):
    """What a call on a GPU of that capability would run."""
    channels, last = x.shape[1], not x.is_contiguous()
    weight = torch.empty(outputs, channels, dtype=x.dtype, device="meta")
    axes = [(1, 0, 1, 1), *((size, 0, size, 1) for size in x.shape[2:])]
    flags = dict(AXES=2, MODE=0, WINDOW=False, LAST=last, LONG=False, BIAS=True, RELU=True, RESIDUAL=residual)
    flags |= dict(PRECISION="ieee" if precise else "tf32", UPCAST=False, **module().tiles(outputs, channels, precise))
    tensors = (x, torch.empty(0, dtype=torch.int64), weight, weight, x, x)
    arguments = (*tensors, x.shape[0], channels, outputs, *weight.stride(), *axes)
    return machine_code(module().shift_linear_kernel, arguments, flags, capability)


@pytest.mark.compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_compiles_to_tensor_cores(capability, last, machine_code):
    """For GPUs that need not be there: no spills, tensor cores, weights in vectors that skip the registers.

    The map is gathered number by number: every channel has an alignment of its own.
    """
    for shape, outputs in (((64, 96, 56, 56), 96), ((64, 384, 14, 14), 384)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        code = compiled(machine_code, x, outputs, capability, False, True)
        assert code.spills == 0
        assert code.count({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]) > 0
        assert code.count(r"LDGSTS\.128") > 0
        if last:
            assert code.count(r"STG\.128") > 0
            assert code.count(r"STG(\.U16)?") == 0
        else:
            assert code.orders == {"[1, 0]"}  # a warp's threads lie along the pixels


@pytest.mark.compiled
@pytest.mark.parametrize("precise", [False, True], ids=["tf32", "ieee"])
def test_float32_compiles_without_spills(precise, machine_code):
    x = torch.empty(64, 96, 56, 56, device="meta")
    x = x if precise else x.contiguous(memory_format=torch.channels_last)
    assert compiled(machine_code, x, 96, 90, precise, True).spills == 0


@pytest.mark.on_gpu
@pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
@pytest.mark.parametrize(("shape", "outputs", "stride"), [*SHAPES, ((3, 200, 14, 14), 300, (1, 1))], ids=str)
def test_cuda_equals_reference(shape, outputs, stride, padding_mode, both_formats):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for x, relu in itertools.product(both_formats(shape, dtype), (False, True)):
            arguments = problem(x, outputs, stride, relu)
            moved = [t if t is None else t.cuda() for t in arguments]
            y = torch.ops.shiftconv.shift_linear(*moved, MODES[padding_mode], stride, relu)
            close(y, reference(*arguments, MODES[padding_mode], stride, relu))
