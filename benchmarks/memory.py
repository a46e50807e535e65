"""Peak memory of training steps beyond their inputs: ``python -m benchmarks.memory``.

Of a shift-wise convolution at each stage of SW-T, and of the whole network. Each candidate runs in a process of its
own, whose high-water mark the kernel tells (Linux). Rows go to ``results/memory.csv``.
"""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench import RESULTS, commit, machine
from benchmarks.networks import large_kernels
from benchmarks.ops.shiftwise import STAGES, Stage, functions

COLUMNS = ["date", "commit", "machine", "torch", "case", "candidate", "peak_mb"]
SHIFTS = 4  # SW-T's
IMAGES = 16
NETWORK = "shiftwise_tiny"
CASES = [
    *(f"{stage._replace(images=IMAGES)} {SHIFTS} shifts, forward+backward" for stage in STAGES),
    f"{NETWORK} {large_kernels.PIXELS} px batch {IMAGES}, step",
]
ORIGINAL, CHECKPOINTED = "original formulation", "shiftwise, gradient checkpointing"
CANDIDATES = ("shiftwise", ORIGINAL, CHECKPOINTED)  # the last one of the whole network only
_RETURNS = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else the mark tells how glibc cuts up what was freed


def peak(case: int, candidate: int) -> float:
    """MB that a case takes at most; ``candidate`` is the place in :data:`CANDIDATES`."""
    torch.set_num_threads(1)
    if case < len(STAGES):
        small, whole = operator(STAGES[case]._replace(images=IMAGES), candidate)
    else:
        small, whole = network(candidate)
    small()  # loads and compiles
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = _status("VmRSS")
    whole()
    return (_status("VmHWM") - before) / 1024


def operator(stage: Stage, candidate: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward and backward pass of one image, and of all."""
    run = functions(stage, SHIFTS, "cpu")[candidate]
    slots = -(-stage.kernel // stage.small)
    x = torch.randn(stage.images, stage.channels, stage.side, stage.side, requires_grad=True)
    weight = torch.randn(stage.channels * slots, 1, stage.small, stage.small, requires_grad=True)
    grads = [torch.randn_like(x) for _ in range(3)]
    first = x[:1].detach().requires_grad_()
    return (
        lambda: torch.autograd.grad(run(first, weight), (first, weight), [g[:1] for g in grads]),
        lambda: torch.autograd.grad(run(x, weight), (x, weight), grads),
    )


def network(candidate: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step on small images, which makes the optimizer's state, and one on whole images."""
    net = large_kernels.network(NETWORK, "cpu")
    net.set_grad_checkpointing(CANDIDATES[candidate] == CHECKPOINTED)
    step = large_kernels.step(large_kernels.Original(net) if CANDIDATES[candidate] == ORIGINAL else net)
    x = torch.randn(IMAGES, 3, large_kernels.PIXELS, large_kernels.PIXELS)
    first = x[:2, :, : large_kernels.CHECKED, : large_kernels.CHECKED].contiguous()
    return lambda: step(first), lambda: step(x)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def main() -> None:
    if len(sys.argv) == 3:
        print(peak(int(sys.argv[1]), int(sys.argv[2])))
        return
    path = RESULTS / "memory.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for number, case in enumerate(CASES):
            figures: list[float] = []
            for candidate, name in enumerate(CANDIDATES if number == len(STAGES) else CANDIDATES[:2]):
                command = [sys.executable, "-m", "benchmarks.memory", str(number), str(candidate)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=_RETURNS)
                figures.append(float(done.stdout))
                row = [time.strftime("%Y-%m-%d"), commit(), machine(), torch.__version__, case, name]
                writer.writerow([*row, f"{figures[-1]:.1f}"])
            print(case, *(f"{figure:.1f} MB" for figure in figures), f"{figures[1] / figures[0]:.1f} times", sep="\t")


if __name__ == "__main__":
    main()
