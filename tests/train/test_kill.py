"""A run that is killed at the worst moments and resumed ends with the numbers of one that was not."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from shiftconv.train import checkpoint as ck
from shiftconv.train.loop import train

# Run in a process of its own, which kills itself like a power cut would.
SCRIPT = """
import json, os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path

import torch

from shiftconv import files
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe
from shiftconv.train.trainer import Trainer

recipe, out, moment, threads = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(threads)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    def __init__(self, file):
        self.file = file

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        die()


update, replacing, copy, replace = Trainer._update, files.replacing, files.copy, Path.replace
updates = written = 0


def count_updates(self):
    global updates
    update(self)
    updates += 1
    while updates == 5:  # of three per epoch; the first epoch's checkpoint is written in the background
        if Path(out, "best.pt").exists():
            die()
        time.sleep(0.01)


@contextmanager
def tear_second(path, keep=None):
    global written
    written += path.name == "last.pt"
    with replacing(path, keep) as file:
        yield Torn(file) if path.name == "last.pt" and written == 2 else file


def die_before_the_second_best(source, path):
    global written
    written += 1
    if written == 2:
        die()
    copy(source, path)


def die_between_renames(self, target):
    done = replace(self, target)
    if Path(target).name == "previous.pt":
        die()
    return done


if moment == "epoch":
    Trainer._update = count_updates
elif moment == "write":
    files.replacing = tear_second
elif moment == "best":
    files.copy = die_before_the_second_best
elif moment == "renames":
    Path.replace = die_between_renames
train(Recipe.from_dict(recipe), out, device="cpu")
"""


def numbers(history):
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in history]


@pytest.mark.parametrize("moment", ["epoch", "write", "best", "renames"])
def test_kill_9_and_resume(recipe, whole, tmp_path, moment):
    run = tmp_path / "run"
    arguments = [json.dumps(recipe.to_dict()), str(run), moment, str(torch.get_num_threads())]
    process = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    partial = list(run.glob(".*.partial"))
    assert [path.name.startswith(".last.pt") for path in partial] == [True] * (moment in ("write", "renames"))
    assert run.joinpath("last.pt").exists() == (moment != "renames")

    newest = max(ck.load(path).epoch for path in run.glob("*.pt"))

    events = []
    resumed = train(recipe, run, resume="auto", device="cpu", progress=events.append)
    assert events[0].finished == newest
    whole, _ = whole
    assert numbers(resumed.history) == numbers(whole.history)
    assert [resumed.best_epoch, resumed.test.loss] == [whole.best_epoch, whole.test.loss]
    for name in ("last.pt", "best.pt"):
        one, two = ck.load(run / name).model, ck.load(whole.folder / name).model
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert not list(run.glob(".*"))
