"""The Triton kernels of learned shifts against the reference: interpreted, compiled, and on a GPU if there is one."""

import importlib
import itertools
import math
from typing import get_args

import pytest
import torch

from shiftconv.ops import active_shift
from shiftconv.ops.active_shift import reference, reference_backward
from shiftconv.ops.sampling import MODES, PLAIN, PaddingMode, axes_of, empty_output, geometry

pytest.importorskip("triton")

every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
either_way = pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WINDOWS = [
    ((1, 2, 5), None, 1),
    ((1, 3, 3, 4), None, 1),
    ((1, 2, 2, 1, 3), None, 1),
    ((1, 2, 7), [(1, -2)], 3),
    ((1, 2, 4, 1), [(-2, 1), (0, -1)], (1, 2)),
]


def kernels():
    return importlib.import_module("shiftconv.ops.triton.active_shift")


def random_offset(shape, dtype=torch.float32):
    """Real ones, among them whole ones and halves, to beyond the image."""
    offset = torch.randn(shape[1], len(shape) - 2, generator=torch.Generator().manual_seed(1), dtype=dtype) * 3
    offset[-1] = torch.tensor([-2.0, 0.5, 1.0])[: len(shape) - 2]
    return offset


def close(y, expected, *factors):
    """Sums of products of these factors may be taken in another order, and their weights rounded elsewhere."""
    tolerance = TOLERANCE[factors[0].dtype]
    scale = math.prod(float(factor.double().abs().max()) for factor in factors)
    if len(factors) > 1:
        scale *= factors[0].numel() / factors[0].shape[1]
    torch.testing.assert_close(y.cpu(), expected, rtol=tolerance, atol=tolerance * scale)
    assert y.stride() == expected.stride()


def check(x, grad, offset, mode, window, transpose):
    """Everything that the two operators do, with one map."""
    came = grad if transpose else x
    for rounded, derivative in ((False, 0), (True, 0), (True, (1 << (x.ndim - 2)) - 1)):
        y = kernels().active_shift(came, offset, mode, rounded, derivative, transpose, window)
        close(y, reference(came, offset, mode, rounded, derivative, transpose, window), came)
    for rounded in (False, True) if transpose else ():
        grad_x, grad_offset = kernels().active_shift_backward(grad, x, offset, mode, rounded, window)
        expected_x, expected_offset = reference_backward(grad, x, offset, mode, rounded, window)
        close(grad_x, expected_x, grad)
        close(grad_offset, expected_offset, grad, x)


@pytest.mark.interpreted
@every_mode
@either_way
@pytest.mark.parametrize(("shape", "crop", "stride"), WINDOWS, ids=str)
def test_equals_reference(shape, crop, stride, padding_mode, transpose, both_formats):
    window = geometry(torch.empty(shape), crop, stride)
    sizes = [axis.length for axis in axes_of(torch.empty(shape), window)]
    pairs = list(zip(both_formats(shape), both_formats((*shape[:2], *sizes)), strict=True))
    for x, grad in pairs[-1:] if len(shape) == 5 else pairs[: 1 if window else 2]:
        check(x, grad, random_offset(shape), MODES[padding_mode], window, transpose)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype, both_formats):
    if dtype is torch.bfloat16:
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        if not hasattr(interpreter.InterpreterBuilder, "get_bf16"):
            pytest.skip("the interpreter of this Triton (3.8) cannot make constants of bfloat16")
    for x, offset_dtype in zip(both_formats((2, 3, 3, 4), dtype), (torch.float32, torch.float64), strict=True):
        check(x, x, random_offset(x.shape, offset_dtype), MODES["zeros"], PLAIN, True)


@pytest.mark.interpreted
def test_any_strides_and_no_elements(both_formats):
    x = both_formats((2, 4, 5, 6))[0][:, ::2, 1:]
    grad = x.new_ones(()).expand(x.shape)
    check(x, grad, random_offset(x.shape).t().contiguous().t(), MODES["reflect"], PLAIN, True)
    empty = torch.empty(0, 2, 3)
    grad_x, grad_offset = kernels().active_shift_backward(empty, empty, torch.ones(2, 1), 0, False)
    assert grad_x.shape == empty.shape and not grad_offset.any()
    assert kernels().active_shift(empty, torch.ones(2, 1), 0, False, 0, False).shape == empty.shape


@pytest.mark.interpreted
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 2.0**31, -(2.0**31)])
def test_what_cannot_be_used_becomes_nan(wrong, both_formats):
    for rounded, padding_mode in ((False, "zeros"), (True, "reflect")):
        x = both_formats((1, 2, 3, 2))[rounded]
        fine = torch.tensor([[0.5, 0.0], [1.5, -1.0]])
        offset = fine.clone()
        offset[0, int(rounded)] = wrong
        mode = MODES[padding_mode]
        y = kernels().active_shift(x, offset, mode, rounded, 0, False)
        grad_x, grad_offset = kernels().active_shift_backward(x, x, offset, mode, rounded)
        assert all(t.isnan().all() for t in (y[:, 0], grad_x[:, 0], grad_offset[0]))
        assert torch.equal(y[:, 1], kernels().active_shift(x, fine, mode, rounded, 0, False)[:, 1])
        fine_x, fine_offset = kernels().active_shift_backward(x, x, fine, mode, rounded)
        assert torch.equal(grad_x[:, 1], fine_x[:, 1])
        assert torch.equal(grad_offset[1], fine_offset[1])


@pytest.mark.interpreted
def test_several_images_a_program_and_long_indices(both_formats, monkeypatch):
    shared = importlib.import_module("shiftconv.ops.triton._work")
    monkeypatch.setattr(shared, "_ENOUGH_PROGRAMS", 2)
    monkeypatch.setattr(shared, "_INT32", 0)
    for x, padding_mode in zip(both_formats((3, 2, 3, 4)), ("zeros", "symmetric"), strict=True):
        check(x, x.flip(0), random_offset(x.shape), MODES[padding_mode], PLAIN, True)


@pytest.mark.interpreted
def test_many_partial_sums():
    """More blocks than the second stage reads at once, and channels than it has columns."""
    x = torch.randn(70, 17, 3, generator=torch.Generator().manual_seed(0))
    arguments = (x, x.flip(0), random_offset(x.shape), MODES["zeros"], False)
    close(kernels().active_shift_backward(*arguments)[1], reference_backward(*arguments)[1], x, x)


def compiled(machine_code, shape, dtype, capability, backward=False, mode="zeros", last=False, rounded=False):
    """What a call on a GPU of that capability would run."""
    kernel = importlib.import_module("shiftconv.ops.triton._gather").gather_kernel
    work = importlib.import_module("shiftconv.ops.triton._work").work
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    real = torch.empty(0)
    taps = 1 if rounded and not backward else 1 << (x.ndim - 2)
    plan = work(x, empty_output(x), PLAIN, MODES[mode], backward, taps)
    flags = dict(plan.flags, ROUNDED=rounded, DERIVATIVE=0, CORRELATE=backward)
    arguments = (x, x, real, x, real if backward else x, *plan.sizes)
    return machine_code(kernel, arguments, flags, capability)


@pytest.mark.compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_compiles_without_spills(capability, last, machine_code):
    """For GPUs that need not be there. The taps' alignment is any, so their loads are of single numbers."""
    shape = (64, 96, 56, 56)
    forward = compiled(machine_code, shape, torch.bfloat16, capability, last=last)
    backward = compiled(machine_code, shape, torch.bfloat16, capability, backward=True, last=last)
    assert forward.spills == backward.spills == 0
    assert forward.orders | backward.orders <= {"[1, 0]"}  # a warp's threads lie along what is contiguous
    assert forward.registers <= 96  # for 20 warps on a multiprocessor
    assert backward.registers <= 128  # for 16


@pytest.mark.compiled
def test_rounded_shifts_move_in_vectors(machine_code):
    code = compiled(machine_code, (64, 96, 56, 56), torch.bfloat16, 90, rounded=True)
    assert code.spills == 0
    assert code.count("STG.128") >= 2
    assert code.count("LDG.128") >= 1


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "mode", "last"), [((8, 64, 16, 28, 28), "zeros", False), ((64, 96, 56, 56), "reflect", True)]
)
def test_other_maps_compile_without_spills(shape, mode, last, machine_code):
    assert compiled(machine_code, shape, torch.float32, 90, True, mode, last).spills == 0
    kernel = kernels().offset_kernel
    arguments = (torch.empty(0), torch.empty(0), torch.empty(0), 500, 96)
    flags = {"AXES": len(shape) - 2, "ROWS": 64, "COLS": 16, "num_warps": 4, "enable_fp_fusion": True}
    assert machine_code(kernel, arguments, flags, 90).spills == 0


@pytest.mark.on_gpu
@every_mode
@pytest.mark.parametrize("shape", [(2, 3, 70), (3, 20, 7, 7), (1, 70, 9, 3), (2, 66, 5, 6, 7), (1, 3, 66, 64)], ids=str)
def test_cuda_equals_reference(shape, padding_mode, both_formats):
    mode, ops = MODES[padding_mode], torch.ops.shiftconv
    for dtype, stride, rounded in itertools.product((torch.float32, torch.bfloat16), (1, 2), (False, True)):
        offset = random_offset(shape)
        for x in both_formats(shape, dtype):
            window = geometry(x, None, stride)
            expected = reference(x, offset, mode, rounded, 0, False, window)
            close(ops.active_shift(x.cuda(), offset.cuda(), mode, rounded, 0, False, window), expected, x)
            arguments = (expected.cuda(), x.cuda(), offset.cuda(), mode, rounded, window)
            results, again = ops.active_shift_backward(*arguments), ops.active_shift_backward(*arguments)
            truths = reference_backward(expected, x, offset, mode, rounded, window)
            close(results[0], truths[0], expected)
            close(results[1], truths[1], expected, x)
            assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


@pytest.mark.on_gpu
def test_cuda_gradients():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    offset = (torch.rand(3, 2, dtype=torch.float64, device="cuda") * 4 - 2).requires_grad_()
    for padding_mode in get_args(PaddingMode):
        call = lambda x, offset, mode=padding_mode: active_shift(x, offset, mode, [(1, 0), (0, -1)], (2, 1))  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, offset))
        assert torch.autograd.gradgradcheck(call, (x, offset))


@pytest.mark.on_gpu
def test_cuda_past_2_to_the_31():
    x = torch.randn(1, 2, (1 << 15) + 64, 1 << 15, device="cuda", dtype=torch.float16)
    y = torch.ops.shiftconv.active_shift(x, torch.tensor([[0.5, 0.0], [0.0, -1.0]], device="cuda"), 0, False, 0, False)
    torch.testing.assert_close(y[:, 0, 1:], (x[:, 0, 1:] + x[:, 0, :-1]) / 2, rtol=2e-3, atol=2e-3)
    assert torch.equal(y[:, 1, :, :-1], x[:, 1, :, 1:])
