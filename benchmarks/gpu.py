"""GPU tests and benchmarks of every operator: ``python -m benchmarks.gpu``. Says so and ends where there is no GPU.

Timing is by CUDA events around single calls with the caches flushed in between; the copy that everything is compared
with is printed first. Rows go to ``results/<op>.csv`` with the GPU as machine.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench import append, rows

OPERATORS = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of single calls, candidates in turn, each after 256 MiB of writes that evict the L2 cache."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for lap in range(rounds + 5):  # five laps to warm up
        for name, run in candidates.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if lap >= 5:
                times[name].append(1e-3 * start.elapsed_time(end))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Test and benchmark on the GPU.")
    parser.add_argument("--rounds", type=int, default=51)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to test or to measure")
        return 0
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy_s = statistics.median(measure({"copy": x.clone}, 11)["copy"])
    print(
        f"{torch.cuda.get_device_name()}: copy of 1 GiB at {2 * x.numel() / copy_s / 1e12:.2f} TB/s, read and written"
    )
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cuda", "tests/ops"])
    if tests.returncode:
        print("the GPU tests fail: nothing is measured")
        return 1
    for op in OPERATORS:
        cases = importlib.import_module(f"benchmarks.ops.{op}").cases("cuda")
        append(op, rows(op, cases, arguments.rounds, measure, (torch.cuda.get_device_name(), "gpu")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
