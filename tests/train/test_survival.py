"""The command line stopped, killed and hindered in every way, and its numbers afterwards; one process.

What several processes do is in ``test_survival_processes.py``.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from shiftconv.cli import main
from shiftconv.models import create_model
from shiftconv.train import checkpoint as ck
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Distillation, Mix, Optim, Sparsity

from .conftest import make_pictures
from .disturbed import make_program, notes, result, rows, same_run, told, train, write_recipe

SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes that are compared have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("photos") / "all", count=24)


@pytest.fixture(scope="module")
def every_option(tmp_path_factory, photos):
    """Five updates per epoch, with all that draws random numbers or has a state of its own."""
    home = tmp_path_factory.mktemp("every_option")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.save({"model": create_model("convnext_atto", num_classes=2, **SMALL).state_dict()}, home / "teacher.pt")
    recipe = Recipe(
        model="convnext_atto",
        model_args={**SMALL, "drop_path_rate": 0.3},
        data=Data("folder", folder=str(photos), image_size=32, workers=1, erase_prob=0.5),
        epochs=3,
        batch_size=8,
        micro_batch_size=3,
        optim=Optim("adamw", lr=1e-2, warmup_epochs=1),
        mix=Mix(mixup=0.8, cutmix=1.0),
        label_smoothing=0.1,
        ema_decay=0.7,
        clip_grad=1.0,
        sparse=Sparsity(0.5, rule="rigl", every_steps=2),
        distill=Distillation(
            teacher="convnext_atto",
            teacher_args=SMALL,
            teacher_checkpoint=str(home / "teacher.pt"),
            features="mgd",
            feature_weight=10.0,
        ),
        tensorboard=False,
    )
    return write_recipe(recipe, home / "every.yaml")


@pytest.fixture(scope="module")
def whole(program, every_option, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, lines = train(program, every_option, "--out", folder)
    assert status == 0, lines
    return folder


def kill(name):
    return f"os.kill(os.getpid(), signal.{name})"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_run_that_a_signal_stops_within_an_epoch_goes_on(program, every_option, whole, tmp_path, name, status):
    run = tmp_path / "run"
    found, lines = train(program, every_option, "--out", run, at="0:7", do=kill(name))
    assert found == status, lines
    line = f"stopped by {name} after 2 updates of epoch 2; go on with: shiftconv train --resume {run}"
    assert told(lines) == [f"shiftconv: {line}"]
    assert ck.load(run / "last.pt").age == (1, 2)
    if name == "SIGTERM":
        found, lines = train(program, "--resume", run)
        assert (found, told(lines)) == (0, [])
    else:
        main(["train", "--resume", str(run)])
    same_run(run, whole)


@pytest.mark.parametrize("update", [3, 9])
def test_a_run_that_is_killed_goes_on_from_a_checkpoint_within_the_epoch(
    program, every_option, whole, tmp_path, update
):
    run = tmp_path / "run"
    save = "trainer.after_update()" if update == 3 else "time.sleep(0)"
    do = f"{save}; time.sleep(1); {kill('SIGKILL')}"
    found, lines = train(program, every_option, "--out", run, "--save_minutes", "1e-9", at=f"0:{update}", do=do)
    assert (found, told(lines)) == (-9, [])
    assert ck.load(run / "last.pt").step > 0
    main(["train", "--resume", str(run)])
    assert len([*run.glob(".*")]) == 0
    same_run(run, whole)
