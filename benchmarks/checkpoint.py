"""How long a checkpoint stops training: ``python -m benchmarks.checkpoint [--folder DIR]``.

Of SLaK-B with the state of AdamW, averaged weights and masks. The candidates are the background of
:class:`shiftconv.train.run.RunFolder` and its file written by the thread that trains, as ``torch.save`` does:

    stop_first  seconds that the first save of a run stops training if its memory is new
    stop        the same of a later one that need not wait for the one before, or of the first after ``prepare``
    disk        seconds until the file is on the disk, last.pt synchronised and renamed
    best_disk   the same for a best one, which is copied to best.pt
    step_ratio  a step of a small network while a checkpoint is written over one while none is; none for the
                thread that trains, which makes no steps then
    load        seconds to read the file and verify its checksums

Figures are medians of the rounds. Needs 8 GB of memory and 10 GB of disk, which are given back.
"""

import argparse
import csv
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.bench import RESULTS, commit, machine
from benchmarks.networks import large_kernels
from shiftconv.sparse import SparseTraining
from shiftconv.train import checkpoint as ck
from shiftconv.train.checkpoint import Checkpoint
from shiftconv.train.recipe import Recipe
from shiftconv.train.run import RunFolder

COLUMNS = ["date", "commit", "machine", "threads", "torch", "case", "candidate", "rounds", "megabytes"]
COLUMNS += ["stop_first_s", "stop_s", "disk_s", "best_disk_s", "step_ratio", "load_s"]
MODEL, DENSITY = "slak_base", 0.6
MEMORY, DISK = 8e9, 10e9
GOAL = 1.0  # seconds that a later save may stop training
RECIPE = Recipe(model=MODEL, epochs=100)


def state() -> Checkpoint:
    """A checkpoint as in the middle of a long run; only the values of its tensors are made up."""
    net = large_kernels.network(MODEL, "cpu")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    sparse = SparseTraining(net, optimizer, DENSITY, rule="set")
    history = [{"epoch": n + 1, "val_loss": 1.0, "val_accuracy": 0.5, "seconds": 1e3} for n in range(50)]
    optimizer.zero_grad()
    return Checkpoint(
        model_name=MODEL,
        model_args={"num_classes": 1000},
        model=net.state_dict(),
        optimizer=optimizer.state_dict(),
        scheduler={},
        scaler={},
        epoch=len(history),
        metrics={"history": history, "best_epoch": 1},
        recipe=RECIPE.to_dict(),
        sparse=sparse.state_dict(),
        ema={name: value.clone() for name, value in net.state_dict().items()},
    )


def stepper() -> Callable[[], None]:
    """A training step of some ten milliseconds with the Python of a usual one."""
    net = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = torch.randn(8, 32, 32, 32, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(net(x), x).backward()
        optimizer.step()

    return step


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check(checkpoint: Checkpoint, path: Path) -> None:
    """What was written is what was to be written."""
    there = ck.load(path)
    for name in ("model", "ema"):
        for key, value in getattr(checkpoint, name).items():
            if not torch.equal(value, getattr(there, name)[key]):
                raise AssertionError(f"{path}: {name} {key} differs")


def background(checkpoint: Checkpoint, path: Path, rounds: int) -> list[float]:
    """Figures of the columns from ``stop_first`` to ``step_ratio``."""
    step = stepper()
    for _ in range(10):
        step()
    alone: list[float] = []
    beside: list[float] = []
    stops: list[float] = []
    disk: list[float] = []
    with RunFolder(path) as folder:
        folder.begin(RECIPE, folder.open(RECIPE, None))
        first = seconds(lambda: folder.save(checkpoint, is_best=False))
    shutil.rmtree(path)
    with RunFolder(path) as folder:
        folder.begin(RECIPE, folder.open(RECIPE, None))
        folder.prepare(checkpoint)
        folder.wait()
        for _ in range(rounds):
            alone += [seconds(step) for _ in range(100)]
            start = time.perf_counter()
            stops.append(seconds(lambda: folder.save(checkpoint, is_best=False)))
            ends = [time.perf_counter()]
            while folder.busy:
                step()
                ends.append(time.perf_counter())
            folder.wait()
            disk.append(ends[-1] - start)
            beside += [b - a for a, b in pairwise(ends[:-1])]
            alone += [seconds(step) for _ in range(100)]
        best = seconds(lambda: (folder.save(checkpoint, is_best=True), folder.wait()))
        check(checkpoint, folder.best)
    ratio = statistics.median(beside) / statistics.median(alone)
    return [first, statistics.median(stops), statistics.median(disk), best, ratio]


def foreground(checkpoint: Checkpoint, path: Path, rounds: int) -> list[float]:
    """The same of a training thread that writes by itself."""
    path.mkdir()
    last, best = path / "last.pt", path / "best.pt"
    took = [seconds(lambda: ck.save(checkpoint, last, keep=path / "previous.pt")) for _ in range(rounds + 1)]
    both = seconds(lambda: (ck.save(checkpoint, last), ck.save(checkpoint, best)))
    later = statistics.median(took[1:])
    return [took[0], later, later, both, float("nan")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="How long a checkpoint takes.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; none: the system's folder for such files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        place = Path(name)
        require(place)
        checkpoint = state()
        figures: dict[str, list[float]] = {}
        for candidate in (background, foreground):
            path = place / candidate.__name__
            figures[candidate.__name__] = candidate(checkpoint, path, arguments.rounds)
            loads = [seconds(lambda file=path / "last.pt": ck.load(file)) for _ in range(arguments.rounds)]
            figures[candidate.__name__].append(statistics.median(loads))
            megabytes = (path / "last.pt").stat().st_size / 1e6
            shutil.rmtree(path)
            append(candidate.__name__, arguments.rounds, megabytes, figures[candidate.__name__])
    stop = figures["background"][1]
    print("within the goal" if stop <= GOAL else f"training stops for more than {GOAL:g} s")


def require(place: Path) -> None:
    """Leave if the machine has too little for this."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1e3 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if free < MEMORY or shutil.disk_usage(place).free < DISK:
        raise SystemExit(f"needs {MEMORY / 1e9:g} GB of free memory and {DISK / 1e9:g} GB of free disk in {place}")


def append(candidate: str, rounds: int, megabytes: float, figures: list[float]) -> None:
    """Write a row at the end of ``results/checkpoint.csv`` and show it."""
    path = RESULTS / "checkpoint.csv"
    new = not path.exists()
    case = f"{MODEL}, density {DENSITY:g}, with its average"
    row = [time.strftime("%Y-%m-%d"), commit(), machine(), str(torch.get_num_threads()), torch.__version__, case]
    row += [candidate, str(rounds), f"{megabytes:.0f}", *(f"{figure:.3f}" for figure in figures)]
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
            print(*COLUMNS[5:], sep="\t")
        writer.writerow(row)
    print(*row[5:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
