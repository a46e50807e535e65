"""What sparse training costs in time: ``python -m benchmarks.sparse_step``.

Of SLaK-T with masks of single weights and SW-T with masks of whole kernels, images of 224 px, float32, fused AdamW:

    step      a training step, by itself (forward, cross entropy, backward, AdamW)
    masks     what sparse training does in each step, timed inside of it by hooks of the optimiser around its own
    ratio     a step with sparse training over one without, of the same network in turn
    update    one exchange of connections; as a share of the steps between two at the intervals of the papers
    total     masks and updates as a share of the steps they come with: what an epoch costs more

A batch has 8 images, what a small machine can take. Masks and updates do not depend on it and the step grows with it,
so with the 128 images of the papers the shares would be smaller. The ratio has the noise of whole steps, some percent
on a busy machine; the shares are the finer figures. With one thread the clock is its processor time, else the wall's.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import RESULTS, commit, keep_memory, machine
from benchmarks.networks import large_kernels
from shiftconv.models.large_kernel_net import LargeKernelNet
from shiftconv.nn import ShiftwiseConv2d
from shiftconv.sparse import SparseTraining, groups
from shiftconv.sparse.group import SparseGroup

COLUMNS = ["date", "commit", "machine", "threads", "torch", "case", "rule", "every_steps", "rounds"]
COLUMNS += ["step_ms", "masks_ms", "update_ms", "ratio", "masks_share", "update_share", "total_share"]
IMAGES, PIXELS, SMALL = 8, 224, 64  # the last: images whose gradients are as good for an update
GOAL = 0.02


class Case(NamedTuple):
    """A network, its masks, and after how many steps the papers update them."""

    model: str
    granularity: str
    density: float
    rules: tuple[str, ...]
    every_steps: tuple[int, ...]

    def groups(self, net: LargeKernelNet) -> list[SparseGroup]:
        select = ShiftwiseConv2d if self.granularity == "kernel" else None
        return groups(net, self.granularity, select=select)

    def __str__(self) -> str:
        return f"{self.model} {PIXELS} px batch {IMAGES}, density {self.density:g} by {self.granularity}"


CASES = (
    Case("slak_tiny", "weight", 0.6, ("set", "rigl"), (2000, 100)),  # SLaK-T's interval, SLaK-S and -B's
    Case("shiftwise_tiny", "kernel", 0.7, ("set", "rigl"), (100,)),
)


class Figures(NamedTuple):
    """Seconds, one number a round, of the steps with and without sparse training, its part of them, and updates."""

    dense: list[float]
    sparse: list[float]
    masks: list[float]
    updates: list[float]


class Stopwatch:
    """Sums up what is between hooks of an optimiser that are set before and after others."""

    def __init__(self) -> None:
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self.seconds = self._since = 0.0

    def start(self, *_: object) -> None:
        self._since = self.clock()

    def stop(self, *_: object) -> None:
        self.seconds += self.clock() - self._since

    def time(self, run: Callable[[], object]) -> float:
        before = self.clock()
        run()
        return self.clock() - before


def measure(case: Case, rule: str, rounds: int) -> Figures:
    """Steps without and with sparse training in turn, then updates."""
    net = large_kernels.network(case.model, "cpu").train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    small = x[..., :SMALL, :SMALL].contiguous()

    def step() -> None:
        backward(net, optimizer, x)
        optimizer.step()

    backward(net, optimizer, small)
    optimizer.step()  # makes the optimiser's averages
    figures = Figures([], [], [], [])
    sparse = SparseTraining(net, optimizer, case.density, rule=rule, granularity=case.groups(net))
    for number in range(rounds + 1):
        sparse.detach()
        watch = Stopwatch()
        dense = watch.time(step)
        handles = [optimizer.register_step_pre_hook(watch.start), optimizer.register_step_post_hook(watch.start)]
        sparse = SparseTraining(net, optimizer, case.density, sparse.masks, rule, case.groups(net))
        handles += [optimizer.register_step_pre_hook(watch.stop), optimizer.register_step_post_hook(watch.stop)]
        took = watch.time(step)
        for handle in handles:
            handle.remove()
        check(sparse, case)
        if number:  # the first one compiles and takes memory
            figures.dense.append(dense)
            figures.sparse.append(took)
            figures.masks.append(watch.seconds)
    for _ in range(rounds):
        backward(net, optimizer, small)
        figures.updates.append(Stopwatch().time(sparse.update))
        check(sparse, case)
    return figures


def backward(net: LargeKernelNet, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), torch.arange(len(x))).backward()


@torch.no_grad()
def check(sparse: SparseTraining, case: Case) -> None:
    """What is timed has done its work."""
    if sparse.active != round(case.density * sum(group.capacity for group in sparse.groups)):
        raise AssertionError(f"{case}: {sparse.active} active entries")
    for group in sparse.groups:
        for member in group.members:
            if member.weight.masked_select(member.spread(~group.mask)).any():
                raise AssertionError(f"{case}: {group.name} has weights that are not active and not zero")


def rows(case: Case, rounds: int) -> Iterator[list[str]]:
    """One for each rule and interval, as :data:`COLUMNS`."""
    place = [machine(), str(torch.get_num_threads()), torch.__version__]
    for rule in case.rules:
        figures = measure(case, rule, rounds)
        step, masks, update = (1e3 * statistics.median(s) for s in (figures.dense, figures.masks, figures.updates))
        ratio = statistics.median(s / d for s, d in zip(figures.sparse, figures.dense, strict=True))
        for every in case.every_steps:
            shares = masks / step, update / (every * step)
            row = [time.strftime("%Y-%m-%d"), commit(), *place, str(case), rule, str(every), str(rounds)]
            row += [f"{ms:.2f}" for ms in (step, masks, update)] + [f"{ratio:.3f}"]
            yield row + [f"{share:.5f}" for share in (*shares, sum(shares))]


def append(table: Sequence[Case], rounds: int) -> None:
    """Write rows at the end of ``results/sparse_step.csv`` as they come, and show them."""
    path = RESULTS / "sparse_step.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for case in table:
            print(case, *COLUMNS[6:8], *COLUMNS[9:], sep="\t")
            for row in rows(case, rounds):
                writer.writerow(row)
                file.flush()
                verdict = "" if float(row[-1]) < GOAL else f"more than {GOAL:.0%}"
                print("", *row[6:8], *row[9:], verdict, sep="\t", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_step", description="What sparse training costs.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    append([case for case in CASES if arguments.case in str(case)], arguments.rounds)


if __name__ == "__main__":
    main()
