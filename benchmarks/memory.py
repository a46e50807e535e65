"""Peak memory of a training step of a shift-wise convolution beyond its inputs: ``python -m benchmarks.memory``.

Each candidate runs in a process of its own, whose high-water mark the kernel tells (Linux). Rows go to
``results/memory.csv``.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.bench import RESULTS, commit, machine
from benchmarks.ops.shiftwise import STAGES, functions

COLUMNS = ["date", "commit", "machine", "torch", "case", "candidate", "peak_mb"]
SHIFTS = 4  # SW-T's
IMAGES = 16


def peak(stage_number: int, candidate: int) -> float:
    """MB that one forward and backward pass takes at most; 0 is ours, 1 the original formulation."""
    torch.set_num_threads(1)
    stage = STAGES[stage_number]._replace(images=IMAGES)
    run = functions(stage, SHIFTS, "cpu")[candidate]
    slots = -(-stage.kernel // stage.small)
    x = torch.randn(stage.images, stage.channels, stage.side, stage.side, requires_grad=True)
    weight = torch.randn(stage.channels * slots, 1, stage.small, stage.small, requires_grad=True)
    grads = [torch.randn_like(x) for _ in range(3)]
    small = [t[:1, :, :, :].detach().requires_grad_() for t in (x, weight)]
    torch.autograd.grad(run(small[0], weight), (small[0], weight), [g[:1] for g in grads])  # loads and compiles
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = _status("VmRSS")
    torch.autograd.grad(run(x, weight), (x, weight), grads)
    return (_status("VmHWM") - before) / 1024


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
        for number, stage in enumerate(STAGES):
            figures: list[float] = []
            for candidate, name in enumerate(("shiftwise", "original formulation")):
                command = [sys.executable, "-m", "benchmarks.memory", str(number), str(candidate)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                figures.append(float(done.stdout))
                case = f"{stage._replace(images=IMAGES)} {SHIFTS} shifts, forward+backward"
                row = [time.strftime("%Y-%m-%d"), commit(), machine(), torch.__version__, case, name]
                writer.writerow([*row, f"{figures[-1]:.1f}"])
            print(stage, *(f"{figure:.1f} MB" for figure in figures), f"{figures[1] / figures[0]:.1f} times", sep="\t")


if __name__ == "__main__":
    main()
