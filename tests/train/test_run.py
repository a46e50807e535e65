from dataclasses import replace

import pytest
import torch

from shiftconv.train import checkpoint as ck
from shiftconv.train.checkpoint import Checkpoint, CheckpointError
from shiftconv.train.run import RunFolder, read_config


def after(recipe, epoch, best_epoch=None):
    best_epoch = best_epoch or epoch
    return Checkpoint(
        model_name="net",
        model_args={},
        model={"weight": torch.full((100,), float(epoch))},
        optimizer={},
        scheduler={},
        scaler={},
        epoch=epoch,
        metrics={"history": [{"epoch": e + 1} for e in range(epoch)], "best_epoch": best_epoch},
        recipe=recipe.to_dict(),
    )


@pytest.fixture
def run(tmp_path, recipe):
    """A run of three epochs, the second of which was best."""
    folder = RunFolder(tmp_path / "run")
    folder.open(recipe, None)
    folder.save(after(recipe, 1), is_best=True)
    folder.save(after(recipe, 2), is_best=True)
    folder.save(after(recipe, 3, best_epoch=2), is_best=False)
    return folder


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def reopen(run, recipe, resume="auto"):
    folder = RunFolder(run.path)
    return folder, folder.open(recipe, resume)


def test_holds_all(run, recipe):
    names = ["best.pt", "config.yaml", "last.pt", "metrics.jsonl", "previous.pt"]
    assert sorted(path.name for path in run.path.iterdir()) == names
    assert read_config(run.config) == recipe
    assert [ck.load(path).epoch for path in (run.last, run.previous, run.best)] == [3, 2, 2]
    assert run.metrics.read_text() == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n'


def test_auto_starts_where_there_is_no_run(tmp_path, recipe):
    assert RunFolder(tmp_path / "new" / "run").open(recipe, "auto") is None


def test_auto_takes_the_newest(run, recipe):
    folder, start = reopen(run, recipe)
    assert start.epoch == 3 and folder.restore_best(start) == 2 and not folder.notes


def test_resumed_last_becomes_the_previous(run, recipe):
    folder, _ = reopen(run, recipe)
    folder.save(after(recipe, 4), is_best=False)
    assert [ck.load(path).epoch for path in (run.last, run.previous)] == [4, 3]


def test_damaged_last_falls_back_and_the_previous_survives(run, recipe):
    damage(run.last)
    folder, start = reopen(run, recipe)
    assert start.epoch == 2
    assert "last.pt is damaged" in folder.notes[0]
    assert folder.metrics.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    folder.save(after(recipe, 3), is_best=False)
    assert [ck.load(path).epoch for path in (run.last, run.previous)] == [3, 2]


def test_killed_between_the_renames(run, recipe):
    run.last.replace(run.previous)
    _, start = reopen(run, recipe)
    assert start.epoch == 3


def test_best_is_a_fallback_too(run, recipe):
    damage(run.last)
    damage(run.previous)
    assert reopen(run, recipe)[1].epoch == 2


def test_all_damaged(run, recipe):
    for path in (run.last, run.previous, run.best):
        damage(path)
    with pytest.raises(CheckpointError, match=r"last.pt is damaged.*previous.pt.*best.pt.*remove the run's folder"):
        reopen(run, recipe)
    assert run.last.exists()


def test_lost_best(run, recipe):
    damage(run.best)
    folder, start = reopen(run, recipe)
    assert folder.restore_best(start) == 3
    assert "the best weights, of epoch 2, are lost; those of epoch 3 are kept" in folder.notes[-1]
    assert ck.load(run.best).epoch == 3


def test_half_written_files_are_swept(run, recipe):
    (run.path / ".last.pt.abc.partial").write_bytes(b"half")
    reopen(run, recipe)
    assert not list(run.path.glob(".*"))


def test_never_overwrites(run, recipe, tmp_path):
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(FileExistsError, match=r"already holds a run \(config.yaml\); resume it"):
        reopen(run, recipe, None)
    with pytest.raises(ValueError, match=r"another recipe: optim.lr: 0.02 / 0.5 \(there / asked for\)"):
        reopen(run, replace(recipe, optim=replace(recipe.optim, lr=0.5)))
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "file").open(recipe, "auto")


def test_other_recipe_before_the_first_checkpoint(tmp_path, recipe):
    RunFolder(tmp_path).open(recipe, None)
    with pytest.raises(ValueError, match=r"the run in .* has another recipe: seed: 0 / 1"):
        RunFolder(tmp_path).open(replace(recipe, seed=1), "auto")


@pytest.mark.parametrize("what", ["", "last.pt", "best.pt"])
def test_resume_elsewhere(run, recipe, tmp_path, what):
    folder = RunFolder(tmp_path / "other")
    start = folder.open(recipe, run.path / what)
    assert start.epoch == (2 if what == "best.pt" else 3)
    assert folder.restore_best(start) == 2
    assert ck.load(folder.best).epoch == 2 and not folder.notes
    assert ck.load(run.last).epoch == 3


def test_nothing_to_resume(tmp_path, recipe):
    with pytest.raises(FileNotFoundError, match="no checkpoint and no run's folder"):
        RunFolder(tmp_path / "run").open(recipe, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume"):
        RunFolder(tmp_path / "run").open(recipe, tmp_path)
    assert not (tmp_path / "run").exists()


def test_damaged_config(run, recipe):
    run.config.write_text("model: [")
    with pytest.raises(ValueError, match=r"config.yaml holds no recipe"):
        reopen(run, recipe)
