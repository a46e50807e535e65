"""Several processes that are stopped, killed and broken in every way, and their numbers afterwards."""

import json
import shutil
import signal
import time
from dataclasses import replace

import pytest

from shiftconv.cli import main
from shiftconv.train import checkpoint as ck
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Mix, Optim

from . import processes
from .conftest import make_pictures
from .disturbed import alive, make_program, result, rows, same_run, start, told, train, write_recipe
from .processes import distance

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
PAIR = ("--gpus", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Five updates per epoch of a network without batch norms, which draws no random numbers."""
    return Recipe(
        model="convnext_atto",
        model_args={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2},
        data=Data(
            "folder", folder=str(make_pictures(tmp_path_factory.mktemp("all"), count=24)), image_size=32, workers=0
        ),
        epochs=3,
        batch_size=8,
        micro_batch_size=3,
        optim=Optim("sgd", lr=1e-2),
        mix=Mix(mixup=0.8, cutmix=1.0),
        ema_decay=0.7,
        clip_grad=1.0,
        tensorboard=False,
    )


@pytest.fixture(scope="module")
def file(recipe, tmp_path_factory):
    return write_recipe(recipe, tmp_path_factory.mktemp("recipe") / "pair.yaml")


@pytest.fixture(scope="module")
def whole(program, file, tmp_path_factory):
    """A run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, lines = train(program, file, *PAIR, "--out", folder)
    assert status == 0, lines
    return folder


def near(one, two, limit=1e-6):
    for first, second in zip(rows(one), rows(two), strict=True):
        assert first == pytest.approx(second, abs=limit)
    assert result(one)["test"] == pytest.approx(result(two)["test"], abs=limit)
    assert distance(one, two) < limit


def nobody_is_left(program):
    """Wait a little: those that are done need a moment to go."""
    for _ in range(100):
        if not alive(program):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {alive(program)}")


def test_a_signal_to_the_launcher_stops_all_at_the_same_update(program, file, whole, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    status, lines = train(program, file, *PAIR, "--out", run, at="0:7", do="os.kill(os.getppid(), signal.SIGTERM)")
    assert status in (75, 143), lines
    (line,) = told(lines)
    start = ck.load(run / "last.pt")
    assert (start.epoch, start.ranks) == (1, 2) and start.step >= 2
    where = f"stopped by SIGTERM after {start.step} updates of epoch 2"
    assert line == f"shiftconv: {where}; go on with: shiftconv train --resume {run}"
    nobody_is_left(program)
    shutil.copytree(run, copy)
    status, lines = train(program, "--resume", run, *PAIR)
    assert status == 0 and len(lines) == 4, lines  # what goes on, where, and two epochs
    same_run(run, whole)
    main(["train", "--resume", str(copy)])
    near(copy, whole)


def test_a_process_that_is_killed_is_started_anew(program, file, whole, tmp_path):
    run = tmp_path / "run"
    do = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"  # the checkpoint of the epoch is written meanwhile
    status, lines = train(program, file, *PAIR, "--max-restarts", 1, "--out", run, at="1:7", do=do)
    assert status == 0, lines
    assert "going on after epoch 1" in "".join(lines)
    same_run(run, whole)


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(program, file, whole, tmp_path):
    run = tmp_path / "run"
    do = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    status, lines = train(program, file, *PAIR, "--out", run, at="0:7", do=do)
    assert status == 137, lines
    assert "process 0 of the 2 of this run (counted from 0) was killed by SIGKILL" in told(lines)[-1]
    assert all("another process of this run is gone" in line for line in told(lines)[:-1])
    nobody_is_left(program)
    main(["train", "--resume", str(run)])
    near(run, whole)


def test_processes_without_their_launcher_stop_with_a_checkpoint(program, file, whole, tmp_path):
    run = tmp_path / "run"
    launcher = start(program, file, *PAIR, "--out", run, at="0:7", do="os.kill(os.getppid(), signal.SIGKILL)")
    _, err = launcher.communicate(timeout=60)  # until the last process has closed it
    assert launcher.returncode == -signal.SIGKILL
    nobody_is_left(program)
    (line,) = told(err.splitlines())
    assert line.startswith("shiftconv: stopped by the launcher is gone after ")
    start_ = ck.load(run / "last.pt")
    assert start_.epoch == 1 and start_.step >= 2
    main(["train", "--resume", str(run)])
    near(run, whole)


def test_a_loss_that_is_no_number_is_told_once(program, file, tmp_path):
    run = tmp_path / "run"
    do = "next(trainer.model.parameters()).data.fill_(float('nan'))"
    status, lines = train(program, file, *PAIR, "--out", run, at="1:7", do=do)
    assert status == 2, lines
    (line,) = told(lines)
    assert line.startswith("shiftconv: error: the training loss became nan in epoch 2, step 5 ")
    assert ck.load(run / "last.pt").age == (1, 0)
    nobody_is_left(program)


def test_a_folder_that_holds_a_run_is_told_once_and_stays_as_it_is(program, file, whole):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    status, lines = train(program, file, *PAIR, "--out", whole, at="0:99", do="0")
    (line,) = told(lines)
    assert status == 2 and line.startswith(f"shiftconv: error: {whole} already holds a run")
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    nobody_is_left(program)


HOOK = """
import os, signal
from shiftconv.train.trainer import Trainer

update, updates = Trainer._update, 0


def stopping(self):
    global updates
    update(self)
    updates += 1
    if updates == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


Trainer._update = stopping
"""


def test_a_stopped_pair_goes_on_in_pieces(recipe, tmp_path):
    """In float64, for rounding is not the same."""
    whole = processes.run(recipe, tmp_path / "whole", 1)
    arguments = [json.dumps(recipe.to_dict()), str(tmp_path / "run"), "float64", ""]
    stopped = processes.start(arguments, 2, script=HOOK + processes.SCRIPT)
    output, _ = stopped.communicate(timeout=120)
    assert "stopped by SIGTERM" in output
    assert ck.load(tmp_path / "run" / "last.pt").age == (1, 3)
    near(processes.run(replace(recipe, parallel="fsdp"), tmp_path / "run", 2, resume="auto"), whole)
