import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shiftconv.train import checkpoint as ck
from shiftconv.train import lock
from shiftconv.train.checkpoint import Checkpoint, CheckpointError
from shiftconv.train.run import RunFolder, read_config


def row(epoch):
    return {"epoch": epoch, "val_loss": 1.0, "val_accuracy": 0.5}


def begin(path, recipe, resume=None):
    folder = RunFolder(path)
    try:
        start = folder.open(recipe, resume)
        folder.begin(recipe, start)
    except BaseException:
        folder.close()
        raise
    return folder, start


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
        metrics={"history": [row(e + 1) for e in range(epoch)], "best_epoch": best_epoch},
        recipe=recipe.to_dict(),
    )


@pytest.fixture
def run(tmp_path, recipe):
    """A run of three epochs, the second of which was best."""
    with begin(tmp_path / "run", recipe)[0] as folder:
        folder.save(after(recipe, 1), is_best=True)
        folder.save(after(recipe, 2), is_best=True)
        folder.save(after(recipe, 3, best_epoch=2), is_best=False)
    return folder


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def reopen(run, recipe, resume="auto"):
    folder, start = begin(run.path, recipe, resume)
    folder.close()
    return folder, start


def test_holds_all(run, recipe):
    names = ["best.pt", "config.yaml", "last.pt", "metrics.jsonl", "previous.pt"]
    assert sorted(path.name for path in run.path.iterdir()) == names
    assert read_config(run.config) == recipe
    assert [ck.load(path).epoch for path in (run.last, run.previous, run.best)] == [3, 2, 2]
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [row(1), row(2), row(3)]


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
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [row(1), row(2)]
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
    with pytest.raises(FileExistsError, match=r"already holds a run \(last.pt\); resume it"):
        reopen(run, recipe, None)
    with pytest.raises(ValueError, match=r"another recipe: optim.lr: 0.02 / 0.5 \(there / asked for\)"):
        reopen(run, replace(recipe, optim=replace(recipe.optim, lr=0.5)))
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "file").open(recipe, "auto")


@pytest.mark.parametrize("resume", [None, "auto"])
def test_other_recipe_before_the_first_checkpoint(tmp_path, recipe, resume):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with begin(tmp_path, replace(recipe, seed=1), resume)[0] as folder:
        folder.save(after(replace(recipe, seed=1), 1), is_best=True)
    assert read_config(tmp_path / "config.yaml").seed == 1


def test_a_run_without_a_checkpoint_leaves_nothing(tmp_path, recipe):
    with begin(tmp_path / "runs" / "new", recipe)[0] as folder:
        folder.tensorboard.mkdir()
        (folder.tensorboard / "events").touch()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    begin(tmp_path / "mine", recipe)[0].close()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_other_run_never_overwrites(run, recipe, tmp_path):
    with begin(tmp_path / "far", recipe)[0] as far:
        far.save(after(recipe, 1), is_best=True)
    before = {path: path.read_bytes() for path in far.path.iterdir()}
    for resume in (run.path, run.last):
        with pytest.raises(
            FileExistsError, match=r"far already holds a run \(last.pt\), and .* is no checkpoint of it"
        ):
            begin(far.path, recipe, resume)
    assert {path: path.read_bytes() for path in far.path.iterdir()} == before


@pytest.mark.parametrize(("what", "epoch"), [("", 3), ("last.pt", 3), ("best.pt", 2)])
def test_own_checkpoint_by_its_path(run, recipe, what, epoch):
    assert reopen(run, recipe, run.path / what)[1].epoch == ck.load(run.last).epoch == epoch


def test_stale_result_goes(run, recipe):
    run.result.write_text("{}")
    reopen(run, recipe)
    assert not run.result.exists()


def test_killed_between_best_and_last(run, recipe):
    ck.save(after(recipe, 4), run.best)
    folder, start = reopen(run, recipe)
    assert start.epoch == 4 and folder.restore_best(start) == 4
    assert [ck.load(path).epoch for path in (run.last, run.previous, run.best)] == [4, 3, 4]


def test_unreadable_last_is_not_damaged(run, recipe, monkeypatch):
    def broken(path):
        if path == run.last:
            raise OSError(errno.EIO, "Input/output error")
        return genuine(path)

    genuine = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(OSError, match=r"cannot read .*last.pt: Input/output error") as caught:
        RunFolder(run.path).open(recipe, "auto")
    assert not isinstance(caught.value, CheckpointError)


def test_one_process_at_a_time(run, recipe):
    with RunFolder(run.path) as first:
        first.open(recipe, "auto")
        partial = run.path / ".last.pt.abc.partial"
        partial.touch()
        with pytest.raises(BlockingIOError, match=r"another process runs in .*run; wait for it"):
            RunFolder(run.path).open(recipe, "auto")
        assert partial.exists()
    reopen(run, recipe)


def test_two_that_begin_at_once(tmp_path, recipe):
    with RunFolder(tmp_path / "run") as first, RunFolder(tmp_path / "run") as second:
        first.open(recipe, None)
        second.open(recipe, None)
        first.begin(recipe, None)
        with pytest.raises(BlockingIOError, match="another process runs in"):
            second.begin(recipe, None)
        second.close()
        assert first.config.exists()


def test_another_run_came_and_went(tmp_path, recipe):
    with RunFolder(tmp_path / "run") as late:
        late.open(recipe, None)
        with begin(tmp_path / "run", recipe)[0] as other:
            other.save(after(recipe, 1), is_best=True)
        with pytest.raises(BlockingIOError, match="another process has put a run into"):
            late.begin(recipe, None)
    assert ck.load(other.last).epoch == 1 and other.config.exists()


def test_children_of_a_killed_process_hold_no_lock(tmp_path):
    code = (
        "import os, signal, sys, time; from pathlib import Path; from shiftconv.train.lock import lock\n"
        "lock(Path(sys.argv[1])); child = os.fork()\n"
        "if child == 0:\n    os.close(1); os.close(2); time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    child = int(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    try:
        handle = lock.lock(tmp_path)
        assert handle is not None
        lock.unlock(handle)
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_locked_where_the_system_cannot(run, recipe, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with RunFolder(run.path) as first, RunFolder(run.path) as second:
        assert first.open(recipe, "auto").epoch == second.open(recipe, "auto").epoch == 3


@pytest.mark.parametrize("what", ["", "last.pt", "best.pt"])
def test_resume_elsewhere(run, recipe, tmp_path, what):
    folder, start = begin(tmp_path / "other", recipe, run.path / what)
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
