"""Time candidates of an operator or network on the CPU, interleaved in one run; append rows to ``results/<op>.csv``.

First every candidate's result is compared with the operator's reference; if one differs, nothing is measured::

    python -m benchmarks.bench shift [--threads 1 2] [--rounds 15] [--case resnet]

A round visits the candidates in turn, and the ratios to the baseline are taken within a round, so that a busy
neighbour hits all alike. With one thread the clock is that thread's processor time, else the wall's.
"""

import argparse
import csv
import ctypes
import importlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).with_name("results")
COLUMNS = ["date", "commit", "machine", "threads", "torch", "op", "case", "direction", "candidate"]
COLUMNS += ["median_us", "p20_us", "p80_us", "ratio"]  # time over the baseline's: median of the paired rounds


class Case(NamedTuple):
    """Candidates for one shape and direction, all doing the same; ``check`` raises if a result is wrong."""

    name: str
    direction: str
    baseline: str
    candidates: dict[str, Callable[[], object]]
    check: Callable[[], None]


_CASE_S = 6.0  # a case whose candidates take long has fewer rounds, but five at least
Timer = Callable[[dict[str, Callable[[], object]], int], dict[str, list[float]]]


def measure(candidates: dict[str, Callable[[], object]], rounds: int, round_s: float = 0.01) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one number a round."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls: dict[str, int] = {}
    whole = 0.0
    for name, run in candidates.items():
        run()
        start = clock()
        run()
        took = max(clock() - start, 1e-6)
        calls[name] = max(1, round(round_s / took))
        whole += calls[name] * took
    rounds = max(min(rounds, 5), min(rounds, int(_CASE_S / whole)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            for _ in range(calls[name]):
                run()
            times[name].append((clock() - start) / calls[name])
    return times


def machine() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )


def commit() -> str:
    """Short hash of the checkout, ``none`` outside of one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def rows(
    op: str, cases: Iterable[Case], rounds: int, timer: Timer = measure, place: tuple[str, str] | None = None
) -> Iterator[list[str]]:
    """One row per candidate, as :data:`COLUMNS`; ``place`` is machine and threads, this processor's unless given."""
    place = place or (machine(), str(torch.get_num_threads()))
    who = [time.strftime("%Y-%m-%d"), commit(), *place, torch.__version__, op]
    for case in cases:
        case.check()
        times = timer(case.candidates, rounds)
        for name, seconds in times.items():
            low, *_, high = statistics.quantiles(seconds, n=5)
            ratio = statistics.median(s / b for s, b in zip(seconds, times[case.baseline], strict=True))
            figures = [f"{1e6 * s:.2f}" for s in (statistics.median(seconds), low, high)]
            yield [*who, case.name, case.direction, name, *figures, f"{ratio:.3f}"]


def append(op: str, table: Iterable[list[str]]) -> None:
    """Write rows at the end of ``results/<op>.csv`` as they come, and show them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{op}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in table:
            writer.writerow(row)
            file.flush()
            print(*row[3:4], *row[6:], sep="\t", flush=True)


def keep_memory() -> None:
    """Let glibc keep freed blocks: fresh pages cost more than the work on them, and hit one candidate by chance."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description="Benchmark an operator or a network on the CPU."
    )
    parser.add_argument("op", help="a module of benchmarks/ops or benchmarks/networks")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    kind = "networks" if Path(__file__).with_name("networks").joinpath(f"{arguments.op}.py").exists() else "ops"
    suite = importlib.import_module(f"benchmarks.{kind}.{arguments.op}")
    keep_memory()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        cases = (case for case in suite.cases("cpu") if arguments.case in case.name)
        append(arguments.op, rows(arguments.op, cases, arguments.rounds))


if __name__ == "__main__":
    main()
