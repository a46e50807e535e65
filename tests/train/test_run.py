import errno
import io
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
from shiftconv.train.run import RunFolder, read_config, resume_target


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


def after(recipe, epoch, best_epoch=None, step=0):
    best_epoch = best_epoch or epoch
    return Checkpoint(
        model_name="net",
        model_args={},
        model={"weight": torch.full((100,), float(epoch))},
        optimizer={},
        scheduler={},
        scaler={},
        epoch=epoch,
        step=step,
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
    folder.wait()
    assert [ck.load(path).epoch for path in (run.last, run.previous)] == [4, 3]


def test_damaged_last_falls_back_and_the_previous_survives(run, recipe):
    damage(run.last)
    folder, start = reopen(run, recipe)
    assert start.epoch == 2
    assert "last.pt is damaged" in folder.notes[0]
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [row(1), row(2)]
    folder.save(after(recipe, 3), is_best=False)
    folder.wait()
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


@pytest.mark.parametrize("lost", [True, False])
def test_lost_best_may_be_the_previous_one(run, recipe, lost):
    run.best.unlink() if lost else damage(run.best)
    folder, start = reopen(run, recipe)
    assert folder.restore_best(start) == 2 and len(folder.notes) == (not lost)
    assert ck.load(run.best).epoch == 2


def test_lost_best(run, recipe):
    damage(run.best)
    damage(run.previous)
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
        folder.write_environment({"torch": "2"})
        folder.loggers.touch()
        folder.bad_images.touch()
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


@pytest.mark.parametrize("reads", [0, 1, 5, 20])
def test_unreadable_last_is_not_damaged(run, recipe, monkeypatch, reads):
    class Broken(io.FileIO):
        def __init__(self, path):
            super().__init__(path)
            self.reads = 0

        def read(self, *size):
            self.reads += 1
            if self.reads > reads:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(*size)

    genuine = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a: Broken(path) if path == run.last else genuine(path, *a))
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


def test_damaged_config_is_written_anew(run, recipe):
    run.config.write_text("model: [")
    folder, _ = reopen(run, recipe)
    assert "config.yaml holds no recipe" in folder.notes[0] and folder.notes[0].endswith("; it is written anew")
    assert read_config(run.config) == recipe


def test_newest_counts_updates_too(run, recipe):
    with begin(run.path, recipe, "auto")[0] as folder:
        folder.save(after(recipe, 3, best_epoch=2, step=5), is_best=False)
        folder.save(after(recipe, 3, best_epoch=2, step=9), is_best=False)
    assert reopen(run, recipe)[1].age == (3, 9)
    damage(run.last)
    assert reopen(run, recipe)[1].age == (3, 5)
    damage(run.last)
    damage(run.previous)
    assert reopen(run, recipe)[1].age == (2, 0)


def test_within_the_first_epoch_nothing_is_best(tmp_path, recipe):
    with begin(tmp_path / "run", recipe)[0] as run:
        run.save(after(recipe, 0, step=4), is_best=False)
    folder, start = reopen(run, recipe)
    assert start.age == (0, 4) and folder.restore_best(start) == 0
    assert not run.best.exists() and run.metrics.read_text() == ""


def test_best_that_is_lost_within_an_epoch(run, recipe):
    with begin(run.path, recipe, "auto")[0] as folder:
        folder.save(after(recipe, 3, best_epoch=3, step=5), is_best=False)
    run.best.unlink()
    folder, start = reopen(run, recipe)
    assert folder.restore_best(start) == 3 and ck.load(run.best).age == (3, 0) and not folder.notes
    run.best.unlink()
    run.previous.unlink()
    assert folder.restore_best(start) == 3 and ck.load(run.best).age == (3, 5)
    assert "of epoch 3, are lost; those of epoch 3 and 5 updates are kept" in folder.notes[-1]


def test_environment_of_each_start(tmp_path, recipe):
    def starts(folder):
        return json.loads(folder.environment.read_text())

    (tmp_path / "environment.json").write_text("[1]")  # of a run that came to nothing
    with begin(tmp_path, recipe)[0] as folder:
        folder.write_environment({"torch": "2.11"})
        folder.save(after(recipe, 1), is_best=True)
    assert starts(folder) == [{"torch": "2.11"}]
    with begin(tmp_path, recipe, "auto")[0] as folder:
        folder.write_environment({"torch": "2.14"})
    assert starts(folder) == [{"torch": "2.11"}, {"torch": "2.14"}]
    folder.environment.write_text("[{")
    with begin(tmp_path, recipe, "auto")[0] as folder:
        folder.write_environment({"torch": "3"})
    assert starts(folder) == [{"torch": "3"}] and "environment.json is damaged and begun anew" in folder.notes[0]


def test_holds(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (run.path, run.last, Path("run"), Path("run/best.pt")):
        assert run.holds(path)
    assert not run.holds(tmp_path) and not run.holds(tmp_path / "last.pt")


@pytest.mark.parametrize("what", ["", "last.pt", "best.pt"])
@pytest.mark.parametrize("config", ["whole", "damaged", "lost"])
def test_resume_target(run, recipe, what, config):
    if config == "damaged":
        run.config.write_text("model: [")
    elif config == "lost":
        run.config.unlink()
        damage(run.last)
    before = sorted(run.path.iterdir())
    assert resume_target(run.path / what) == (recipe, run.path)
    assert sorted(run.path.iterdir()) == before


def test_resume_target_of_a_run_that_was_killed_before_its_first_checkpoint(tmp_path, recipe):
    folder, _ = begin(tmp_path / "run", recipe)
    assert resume_target(folder.path) == (recipe, folder.path)
    folder.close()


def test_nothing_is_the_target(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; resume takes a run's folder or a checkpoint"):
        resume_target(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no checkpoint, and no recipe: .*config.yaml"):
        resume_target(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"metrics.jsonl is no run's checkpoint \(last.pt, previous.pt or best.pt"
    ):
        resume_target(run.metrics)
    run.config.unlink()
    for path in run.checkpoints:
        damage(path)
    with pytest.raises(CheckpointError, match=r"last.pt is damaged"):
        resume_target(run.path)
