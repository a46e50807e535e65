"""Kernels are tested in three ways: interpreted, compiled for GPUs that need not be there, and run on one.

Triton takes its interpreter, or not, while it is imported, so that interpreted tests need a process of their own.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KINDS = {
    "interpreted": (not INTERPRETED, "run by test_interpreter.py"),
    "compiled": (INTERPRETED, "this process interprets kernels"),
    "on_gpu": (INTERPRETED or not torch.cuda.is_available(), "no GPU"),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def pytest_configure(config):
    for name, (_, reason) in KINDS.items():
        config.addinivalue_line("markers", f"{name}: a kind of kernel test, skipped if {reason}")


def pytest_collection_modifyitems(items):
    for item in items:
        for name, (skipped, reason) in KINDS.items():
            if skipped and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


class Machine(NamedTuple):
    """What a kernel was compiled to: how often each instruction stands in it, memory accesses with their width."""

    counts: dict[str, int]
    registers: int
    orders: set[str]  # which axis of a tile neighbouring threads follow first, at every load and store of a tile

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.counts.items() if re.fullmatch(pattern, name))

    @property
    def spills(self) -> int:
        return self.count(r"(LDL|STL).*")


@pytest.fixture
def both_formats():
    """``(shape, dtype) -> [x, x in channels last]``, random; one tensor where there are no two formats."""

    def make(shape, dtype=torch.float32):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
        return [x, x.contiguous(memory_format=LAST[x.ndim])] if x.ndim in LAST else [x]

    return make


@pytest.fixture
def machine_code(tmp_path):
    """Compile a kernel for an NVIDIA GPU of some ``capability`` as a call with these arguments would.

    A tensor stands for a pointer to an aligned one of its dtype; integers are specialised as at a call.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    def compiled(kernel, arguments, flags, capability):
        options = {
            name: flags[name] for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg") if name in flags
        }
        constants = {name: value for name, value in flags.items() if name not in options}
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        frozen = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        places = {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(value, tuple):
                signature[name] = tuple("constexpr" if number == 1 else "i32" for number in value)
                places |= {(i, j): number for j, number in enumerate(value)}
            elif isinstance(value, torch.Tensor):
                signature[name], places[i,] = POINTERS[value.dtype], 16
            else:
                signature[name] = "i32" if name in frozen or value != 1 else "constexpr"
                places |= {} if name in frozen else {(i,): value}
        for place, number in places.items():
            if number == 1:
                constants[place] = 1
            elif number % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
        signature = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, attributes)
        return read(build(source, target=GPUTarget("cuda", capability, 32), options=options))

    def read(built):
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        run = lambda *flags: subprocess.run([tool, *flags, cubin], capture_output=True, text=True, check=True).stdout  # noqa: E731
        counts: dict[str, int] = {}
        for name, suffix in re.findall(r"\b([A-Z][A-Z0-9]{2,})((?:\.\w+)*) ", run("-sass")):
            width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffix) if name in ("LDG", "STG", "LDGSTS") else None
            name += width[0] if width else ""
            counts[name] = counts.get(name, 0) + 1
        registers = re.search(r"REG:(\d+)", run("-res-usage"))
        assert registers is not None
        text = built.asm["ttgir"]
        layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<.*order = (\[[\d, ]+\])", text))
        accesses = re.findall(r"tt\.(?:load|store) .*tensor<(\d+)x(\d+)x!tt\.ptr<\w+>, (#\w+)>", text)
        orders = {layouts[name] for rows, columns, name in accesses if "1" not in (rows, columns)}
        return Machine(counts, int(registers[1]), orders)

    return compiled
