"""The Triton kernel of integer shifts against the reference: interpreted, compiled, and on a GPU where there is one."""

import importlib
import itertools
from typing import get_args

import pytest
import torch

from shiftconv.ops.sampling import MODES, PLAIN, PaddingMode, axes_of, empty_output, geometry
from shiftconv.ops.shift import reference

pytest.importorskip("triton")

every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
either_way = pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])


def kernel(x, offset, mode, transpose, window=PLAIN):
    return importlib.import_module("shiftconv.ops.triton.shift").shift(x, offset, mode, transpose, window)


def random_offset(shape, reach):
    return torch.randint(-reach, reach + 1, (shape[1], len(shape) - 2), generator=torch.Generator().manual_seed(1))


def same(y, x, offset, padding_mode, transpose, window=PLAIN):
    expected = reference(x, offset, MODES[padding_mode], transpose, window)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-3)
    assert y.stride() == expected.stride()


@pytest.mark.interpreted
@every_mode
@either_way
@pytest.mark.parametrize("shape", [(1, 2, 5), (1, 3, 4, 3), (1, 2, 2, 3, 2), (1, 2, 1), (0, 2, 3)], ids=str)
def test_equals_reference(shape, padding_mode, transpose, both_formats):
    for reach in (1, 9):
        offset = random_offset(shape, reach)
        for x in both_formats(shape):
            same(kernel(x, offset, MODES[padding_mode], transpose), x, offset, padding_mode, transpose)


@pytest.mark.interpreted
@every_mode
@either_way
@pytest.mark.parametrize(
    ("shape", "crop", "stride"),
    [
        ((1, 2, 7), [(1, 2)], 3),
        ((1, 3, 4, 3), None, 2),
        ((1, 2, 1, 4), [(-2, -1), (1, -3)], (1, 2)),
        ((1, 2, 2, 3, 2), [(0, 0), (-4, 1), (1, 0)], (2, 3, 1)),
    ],
    ids=str,
)
def test_windows_equal_reference(shape, crop, stride, padding_mode, transpose, both_formats):
    window = geometry(torch.empty(shape), crop, stride)
    sizes = [axis.length for axis in axes_of(torch.empty(shape), window)]
    for reach in (1, 9):
        offset = random_offset(shape, reach)
        x = both_formats((*shape[:2], *sizes) if transpose else shape)[-1 if reach == 1 else 0]
        y = kernel(x, offset, MODES[padding_mode], transpose, window)
        same(y, x, offset, padding_mode, transpose, window)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.complex64, torch.complex128], ids=str)
def test_every_element_size(dtype, both_formats):
    offset = random_offset((1, 3, 4, 3), 2)
    for x, transpose in itertools.product(both_formats((1, 3, 4, 3), dtype), (False, True)):
        mode = "reflect" if dtype.is_complex or not transpose else "zeros"
        same(kernel(x, offset, MODES[mode], transpose), x, offset, mode, transpose)


@pytest.mark.interpreted
def test_moves_by_whole_vectors(both_formats):
    """Rows of vectors, one channel a program: the path that reads vectors, too, and beside it the other one."""
    x = both_formats((1, 3, 40, 32))[0]
    offset = torch.tensor([[1, -8], [0, 3], [-45, 0]])
    for transpose in (False, True):
        same(kernel(x, offset, MODES["zeros"], transpose), x, offset, "zeros", transpose)


@pytest.mark.interpreted
def test_any_strides_and_huge_offsets(both_formats):
    x = both_formats((2, 4, 5, 6))[0][:, ::2, 1:]
    offset = torch.tensor([[2**63 - 1, -(2**63)], [-7, 8]])
    for padding_mode, window in itertools.product(get_args(PaddingMode), (PLAIN, geometry(x, None, 2))):
        y = kernel(x, offset, MODES[padding_mode], False, window)
        assert torch.equal(y, reference(x, offset, MODES[padding_mode], False, window))


@pytest.mark.interpreted
@either_way
def test_several_images_a_program_and_long_indices(transpose, both_formats, monkeypatch):
    shared = importlib.import_module("shiftconv.ops.triton._work")
    monkeypatch.setattr(shared, "_ENOUGH_PROGRAMS", 2)
    monkeypatch.setattr(shared, "_INT32", 0)
    offset = random_offset((5, 2, 3, 4), 3)
    for x, padding_mode in itertools.product(both_formats((5, 2, 3, 4)), ("zeros", "symmetric")):
        same(kernel(x, offset, MODES[padding_mode], transpose), x, offset, padding_mode, transpose)


def compiled(machine_code, shape, dtype, capability, mode="zeros", last=False, transpose=False):
    """What a call on a GPU of that capability would run."""
    kernel = importlib.import_module("shiftconv.ops.triton._gather").gather_kernel
    work = importlib.import_module("shiftconv.ops.triton._work").work
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    offset = torch.empty(0, dtype=torch.int64)
    plan = work(x, empty_output(x), PLAIN, MODES[mode], transpose, 1)
    flags = dict(plan.flags, ROUNDED=False, DERIVATIVE=0, CORRELATE=False)
    return machine_code(kernel, (x, x, offset, x, x, *plan.sizes), flags, capability)


@pytest.mark.compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills_and_in_vectors(capability, machine_code):
    """For GPUs that need not be there.

    Rows are written in vectors, and read in vectors where a channel moves by whole ones. A vector must lie at a
    multiple of its size, so all other moves read number by number.
    """
    code = compiled(machine_code, (64, 96, 56, 56), torch.int16, capability)
    assert code.spills == 0
    assert code.count("STG.128") >= 2
    assert code.count(r"STG(\.U16|\.64)?") == 0
    assert code.count("LDG.128") >= 1


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "mode", "last", "transpose"),
    [
        ((64, 768, 7, 7), "zeros", False, False),
        ((64, 96, 56, 56), "zeros", True, True),
        ((64, 96, 56, 56), "reflect", False, True),
    ],
    ids=str,
)
def test_compiles_without_spills(shape, mode, last, transpose, machine_code):
    code = compiled(machine_code, shape, torch.float32, 90, mode, last, transpose)
    assert code.spills == 0
    assert code.orders <= {"[1, 0]"}  # a warp's threads lie along what is contiguous


@pytest.mark.on_gpu
@every_mode
@pytest.mark.parametrize("shape", [(2, 3, 70), (3, 20, 7, 7), (1, 70, 9, 3), (2, 66, 5, 6, 7), (1, 3, 66, 64)], ids=str)
def test_cuda_equals_reference(shape, padding_mode, both_formats):
    for reach, dtype in itertools.product((1, 80), (torch.float32, torch.bfloat16, torch.complex64)):
        offset = random_offset(shape, reach)
        for x, transpose, stride in itertools.product(both_formats(shape, dtype), (False, True), (1, 2)):
            window = geometry(x, None, stride)
            if transpose:
                x = reference(x, offset, 0, False, window)
            y = torch.ops.shiftconv.shift(x.cuda(), offset.cuda(), MODES[padding_mode], transpose, window)
            torch.testing.assert_close(y.cpu(), reference(x, offset, MODES[padding_mode], transpose, window))
            again = torch.ops.shiftconv.shift(x.cuda(), offset.cuda(), MODES[padding_mode], transpose, window)
            assert torch.equal(y, again)


@pytest.mark.on_gpu
@pytest.mark.parametrize("shape", [(3, 2, 1 << 14, (1 << 15) - 64), (1, 2, (1 << 15) + 64, 1 << 15)], ids=str)
def test_cuda_past_2_to_the_31(shape):
    x = torch.randint(0, 255, shape, dtype=torch.uint8, device="cuda")
    y = torch.ops.shiftconv.shift(x, torch.tensor([[1, -2], [0, 16]], device="cuda"), 0, False)
    assert torch.equal(y[:, 0, 1:, :-2], x[:, 0, :-1, 2:])
    assert torch.equal(y[:, 1, :, 16:], x[:, 1, :, :-16])
    assert not y[:, 0, 0].any() and not y[:, 1, :, :16].any()
