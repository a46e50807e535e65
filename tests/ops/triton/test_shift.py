"""The Triton kernel against the reference: interpreted, compiled, and on a GPU where there is one."""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from shiftconv.ops.shift import MODES, PaddingMode, reference

triton = pytest.importorskip("triton")

# Triton takes its interpreter, or not, while it is imported, so that one needs a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="this process interprets kernels")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
every_mode = pytest.mark.parametrize("padding_mode", get_args(PaddingMode))
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def kernel(x, offset, mode, transpose):
    return importlib.import_module("shiftconv.ops.triton.shift").shift(x, offset, mode, transpose)


def sample(shape, reach, dtype):
    """Random input in both memory formats, and offsets up to ``reach`` pixels either way."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 50).to(dtype)
    offset = torch.randint(-reach, reach + 1, (shape[1], len(shape) - 2), generator=generator)
    return (x, x.contiguous(memory_format=LAST.get(x.ndim, torch.contiguous_format))), offset


def same(y, x, offset, padding_mode, transpose):
    torch.testing.assert_close(y.cpu(), reference(x, offset, MODES[padding_mode], transpose))
    assert y.stride() == x.stride()


@compiled
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_XDIST_AUTO_NUM_WORKERS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@interpreted
@every_mode
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 5), (1, 3, 4, 3), (1, 2, 2, 3, 2), (1, 2, 1), (0, 2, 3)], ids=str)
def test_equals_reference(shape, padding_mode, transpose):
    for reach in (1, 9):
        inputs, offset = sample(shape, reach, torch.float32)
        for x in inputs:
            same(kernel(x, offset, MODES[padding_mode], transpose), x, offset, padding_mode, transpose)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.complex64, torch.complex128], ids=str)
def test_every_element_size(dtype):
    inputs, offset = sample((1, 3, 4, 3), 2, dtype)
    for x, transpose in itertools.product(inputs, (False, True)):
        mode = "reflect" if dtype.is_complex or not transpose else "zeros"
        same(kernel(x, offset, MODES[mode], transpose), x, offset, mode, transpose)


@interpreted
def test_any_strides_and_huge_offsets():
    (x, _), _ = sample((2, 4, 5, 6), 0, torch.float32)
    x = x[:, ::2, 1:]
    offset = torch.tensor([[2**63 - 1, -(2**63)], [-7, 8]])
    for padding_mode in get_args(PaddingMode):
        y = kernel(x, offset, MODES[padding_mode], False)
        assert torch.equal(y, reference(x, offset, MODES[padding_mode], False))


@compiled
@pytest.mark.parametrize(("capability", "mode", "last"), [(80, MODES["zeros"], True), (90, MODES["reflect"], False)])
def test_compiles_without_spills(capability, mode, last, tmp_path):
    """For a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    function = importlib.import_module("shiftconv.ops.triton.shift").shift_kernel
    pointers = {"x": "*fp32", "y": "*fp32", "offset": "*i64"}
    sizes = dict.fromkeys(("numel", "channels", "depth", "height", "width"), "i32")
    flags = {"PARTS": 1, "AXES": 2, "MODE": mode, "TRANSPOSE": True, "LAST": last, "LONG": False, "BLOCK": 1024}
    source = ASTSource(function, {**pointers, **sizes, **dict.fromkeys(flags, "constexpr")}, flags)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    built = build(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert "STACK:0 " in listing.stdout, listing.stdout


@on_gpu
@every_mode
@pytest.mark.parametrize("shape", [(2, 3, 70), (3, 20, 7, 7), (1, 70, 9, 3), (2, 66, 5, 6, 7), (1, 3, 66, 65)], ids=str)
def test_cuda_equals_reference(shape, padding_mode):
    for reach, dtype in itertools.product((1, 80), (torch.float32, torch.bfloat16, torch.complex64)):
        inputs, offset = sample(shape, reach, dtype)
        for x, transpose in itertools.product(inputs, (False, True)):
            y = torch.ops.shiftconv.shift(x.cuda(), offset.cuda(), MODES[padding_mode], transpose)
            same(y, x, offset, padding_mode, transpose)
