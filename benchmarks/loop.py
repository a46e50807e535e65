"""What the training loop costs beside the training: ``python -m benchmarks.loop``.

The loop trains a network on digits, and so does a bare loop over the same batches: forward, cross entropy, backward,
optimiser, next rate. Both take turns; what is compared is processor time of the one thread.

    bare_ms       a step of the bare loop
    loop_ms       a step of ours: the same, and counting, schedules, seeding, signals, the clock, a live bar
    ratio         ours over bare, the median of the rounds
    overhead_us   ours less bare, of a step, the median of the rounds
    share_of_20   that as a share of a step of 20 ms

The small network's step is short, so that the difference is measured finely; the large one's is about 20 ms. Features
that are asked for, such as averages of the weights, are work and not counted here.
"""

import argparse
import csv
import io
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.bench import RESULTS, commit, machine
from shiftconv.train.data import open_data
from shiftconv.train.device import Compute
from shiftconv.train.progress import RichProgress
from shiftconv.train.ranks import Ranks, StopRequest
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Optim
from shiftconv.train.trainer import Trainer

COLUMNS = ["date", "commit", "machine", "threads", "torch", "case", "rounds"]
COLUMNS += ["bare_ms", "loop_ms", "ratio", "overhead_us", "share_of_20"]
GOAL = 0.03
SMALL = Recipe(
    model="convnext_atto",
    model_args={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    data=Data("digits", augment=False),
    batch_size=8,
    optim=Optim("adamw", lr=1e-3, weight_decay=0.05, decay_norms=False),
    tensorboard=False,
)
CASES = {
    "small network, batch 8": SMALL,
    "shiftresnet20, batch 8": replace(SMALL, model="shiftresnet20", model_args={"expansion": 3}),
}


def bare_epoch(trainer: Trainer) -> int:
    """What a user would write; gives the steps."""
    steps = 0
    trainer.model.train()
    for images, labels, _, _ in trainer.loader.steps():
        trainer.schedules.step_update(steps)
        loss = F.cross_entropy(trainer.model(images), labels)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
        steps += 1
    return steps


def measure(recipe: Recipe, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a step of the bare loop and of ours, of each round."""
    bar = RichProgress(Console(file=io.StringIO(), force_terminal=True))
    trainer = Trainer(recipe, open_data(recipe.data), Compute(torch.device("cpu")), bar)
    bare: list[float] = []
    ours: list[float] = []
    with StopRequest() as stop:

        def after_update() -> None:
            stop.asked(Ranks())
            time.monotonic()

        trainer.after_update = after_update
        for number in range(rounds + 1):
            start = time.thread_time()
            steps = bare_epoch(trainer)
            middle = time.thread_time()
            trainer.step = 0
            trainer._steps(0)  # pyright: ignore[reportPrivateUsage] - an epoch without its validation
            end = time.thread_time()
            if number:  # the first one takes memory and compiles kernels
                bare.append((middle - start) / steps)
                ours.append((end - middle) / steps)
    bar.close()
    return bare, ours


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description="What the training loop costs.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    path = RESULTS / "loop.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for case, recipe in CASES.items():
            bare, ours = measure(recipe, rounds)
            overhead = statistics.median(two - one for one, two in zip(bare, ours, strict=True))
            row = dict(
                date=time.strftime("%Y-%m-%d"),
                commit=commit(),
                machine=machine(),
                threads=1,
                torch=torch.__version__,
                case=case,
                rounds=rounds,
                bare_ms=f"{1e3 * statistics.median(bare):.3f}",
                loop_ms=f"{1e3 * statistics.median(ours):.3f}",
                ratio=f"{statistics.median(two / one for one, two in zip(bare, ours, strict=True)):.3f}",
                overhead_us=f"{1e6 * overhead:.0f}",
                share_of_20=f"{overhead / 0.02:.4f}",
            )
            writer.writerow(row)
            file.flush()
            print({name: row[name] for name in COLUMNS[5:]}, "goal", GOAL)


if __name__ == "__main__":
    main()
