"""What a teacher is worth where 40 % of the labels are wrong: ``python -m benchmarks.distill_digits``.

The recipes ``digits_noisy`` (the student without teacher), ``digits_noisy_teacher`` and ``digits_noisy_distilled``, and
the last one with other losses. All students have the same network, images, wrong labels, augmentation, optimiser, rate
and epochs; a seed draws weights and order, and the teacher of a seed has that seed. Wrong labels are in the training
part only: validation chooses the epoch by right ones, of each run alike. The test images choose nothing.

The setting was chosen by validation accuracy with the seeds of ``--case choice``, which are others than those of
``--case report``; so was the rate of the student without teacher. Rows go to ``results/distill_digits.csv``.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks.bench import RESULTS, commit, machine
from shiftconv import recipes
from shiftconv.models.convert import load_checkpoint
from shiftconv.train.data import open_data
from shiftconv.train.evaluation import evaluate
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe

Case = Literal["choice", "report"]
COLUMNS = ["date", "commit", "machine", "threads", "torch", "case", "seed", "candidate"]
COLUMNS += ["val", "test", "last_test", "best_epoch", "seconds"]
SEEDS: dict[Case, tuple[int, ...]] = {"choice": (100, 101), "report": (0, 1, 2, 3, 4)}
TEACHER, ALONE = "teacher", "no teacher"
_RATES = (1e-3, 1e-2)  # of the student without teacher, besides the recipe's
_LOSSES = {  # by what they differ from the recipe
    "kd T=4 alpha=1": dict(logits="kd", temperature=4.0, alpha=1.0),
    "kd T=4 alpha=0.9": dict(logits="kd", temperature=4.0, alpha=0.9),
    "kd T=1 alpha=0.9": dict(logits="kd", temperature=1.0, alpha=0.9),
    "kd T=2 alpha=0.9 standardised": dict(logits="kd", temperature=2.0, alpha=0.9, standardize=True),
    "nkd": dict(logits="nkd", temperature=1.0, alpha=1.0),
    "nkd alone": dict(logits="nkd", temperature=1.0, alpha=1.0, keep_task_loss=False),
    "dist": dict(logits="dist", temperature=1.0),
    "dist alone": dict(logits="dist", temperature=1.0, keep_task_loss=False),
}
# The best of each kind by validation; kd's is the recipe's. The second rate is next to the best, for a fair chance.
_REPORTED = (ALONE, f"{ALONE}, rate 0.01", "kd T=4 alpha=0.9", "nkd alone", "dist")


@dataclass(frozen=True)
class Figures:
    """Accuracies of the epoch that validation chose, and on the test images also after the last one."""

    val: float
    test: float
    last_test: float
    best_epoch: int
    seconds: float

    def row(self) -> list[str]:
        shares = [f"{value:.4f}" for value in (self.val, self.test, self.last_test)]
        return [*shares, str(self.best_epoch), f"{self.seconds:.1f}"]


def run(recipe: Recipe, folder: Path) -> Figures:
    """Train in a folder, which then holds the checkpoints."""
    start = time.thread_time()
    result = train(replace(recipe, tensorboard=False), folder, device="cpu")
    seconds = time.thread_time() - start
    images = open_data(recipe.data).loader("test", 256)
    last = evaluate(load_checkpoint(None, folder / "last.pt"), images, device=torch.device("cpu"))
    assert result.test is not None
    return Figures(result.val.top1, result.test.top1, last.top1, result.best_epoch, seconds)


def students(case: Case) -> dict[str, Recipe]:
    """Each by its name; those that have a teacher lack its checkpoint."""
    alone, distilled = recipes.get("digits_noisy"), recipes.get("digits_noisy_distilled")
    everyone = {ALONE: alone}
    everyone |= {f"{ALONE}, rate {rate:g}": replace(alone, optim=replace(alone.optim, lr=rate)) for rate in _RATES}
    for name, change in _LOSSES.items():
        everyone[name] = replace(distilled, distill=replace(distilled.distill, **change))
    return {name: recipe for name, recipe in everyone.items() if case == "choice" or name in _REPORTED}


def rows(case: Case) -> Iterator[tuple[list[str], str, Figures]]:
    """As :data:`COLUMNS`, with the candidate and its figures."""
    who = [time.strftime("%Y-%m-%d"), commit(), machine(), str(torch.get_num_threads()), torch.__version__]
    for seed in SEEDS[case]:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            teacher = run(replace(recipes.get("digits_noisy_teacher"), seed=seed), home / "teacher")
            yield [*who, case, str(seed), TEACHER, *teacher.row()], TEACHER, teacher
            for number, (name, recipe) in enumerate(students(case).items()):
                if recipe.distill.teacher is not None:
                    checkpoint = str(home / "teacher" / "best.pt")
                    recipe = replace(recipe, distill=replace(recipe.distill, teacher_checkpoint=checkpoint))
                figures = run(replace(recipe, seed=seed), home / str(number))
                yield [*who, case, str(seed), name, *figures.row()], name, figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill_digits", description="A teacher on digits.")
    parser.add_argument("--case", choices=get_args(Case), nargs="*", default=get_args(Case))
    cases: list[Case] = parser.parse_args().case
    torch.set_num_threads(1)
    path = RESULTS / "distill_digits.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for case in cases:
            found: dict[str, list[Figures]] = {}
            for row, name, figures in rows(case):
                writer.writerow(row)
                file.flush()
                found.setdefault(name, []).append(figures)
            print(case, "val", "test", "worst", "best", "last", sep="\t")
            for name, each in found.items():
                tests = [figures.test for figures in each]
                means = [statistics.mean(f.val for f in each), statistics.mean(tests), min(tests), max(tests)]
                means.append(statistics.mean(f.last_test for f in each))
                print(name, *(f"{value:.4f}" for value in means), sep="\t")


if __name__ == "__main__":
    main()
