"""The command line stopped, killed and hindered in every way, and its numbers afterwards; one process.

What several processes do is in ``test_survival_processes.py``.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from shiftconv import files
from shiftconv.cli import main
from shiftconv.models import create_model
from shiftconv.train import checkpoint as ck
from shiftconv.train.data import open_data
from shiftconv.train.data.images import FileImages
from shiftconv.train.endings import Stopped
from shiftconv.train.evaluation import Meter
from shiftconv.train.events import Note
from shiftconv.train.loop import train as run_train
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Distillation, Mix, Optim, Sparsity
from shiftconv.train.trainer import Diverged, Trainer

from .conftest import make_pictures
from .disturbed import make_program, notes, same_run, told, train, write_recipe

SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture(scope="module")
def whole_small(recipe, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = run_train(recipe, tmp_path_factory.mktemp("small") / "run", device="cpu").folder
    torch.set_num_threads(threads)
    return folder


def kill(name):
    return f"os.kill(os.getpid(), signal.{name})"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGINT", 130)])
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


def test_a_run_is_stopped_again_and_again(every_option, whole, tmp_path, monkeypatch, capfd):
    """By Slurm's signal, in this process, at each update in turn."""
    run, update = tmp_path / "run", Trainer._update

    def stopping(self):
        update(self)
        if self.step + 1 < len(self.loader):
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "_update", stopping)
    arguments = ["train", str(every_option), "--out", str(run), "--data.workers", "0", "--resume", "auto"]
    for number in range(1, 5):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 75
        assert ck.load(run / "last.pt").age == (0, number)
        assert len(told(capfd.readouterr().err.splitlines())) == 1
    monkeypatch.setattr(Trainer, "_update", update)
    main(["train", "--resume", str(run)])
    same_run(run, whole)


def test_a_run_that_is_killed_goes_on_from_a_checkpoint_within_the_epoch(program, every_option, whole, tmp_path):
    run = tmp_path / "run"
    do = f"time.sleep(0.5); {kill('SIGKILL')}"
    found, lines = train(program, every_option, "--out", run, "--save_minutes", "1e-9", at="0:9", do=do)
    assert (found, told(lines)) == (-9, [])
    assert ck.load(run / "last.pt").age == (1, 3)
    main(["train", "--resume", str(run)])
    assert not [*run.glob(".*")]
    same_run(run, whole)


FULL = """
set -e
mount -t tmpfs -o size=2m tmpfs "$1"
set +e
shift
"$@"
status=$?
rm -f "$DISK/ballast"
mkdir "$KEPT/cut"
cp -r "$DISK/run/." "$KEPT/cut"
unset AT
"$PYTHON" -m shiftconv train --resume "$DISK/run" && cp -r "$DISK/run/." "$KEPT/resumed"
exit $status
"""


def test_a_full_disk_ends_no_run_and_its_last_state_is_told(program, recipe, whole_small, tmp_path, monkeypatch):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    for folder in (disk, kept / "resumed"):
        folder.mkdir(parents=True)
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "tmpfs", disk]).returncode:
        pytest.skip("no file system of its own can be mounted here")
    pictures = make_pictures(tmp_path / "pictures", count=12)
    for name, value in {"DISK": disk, "KEPT": kept, "PYTHON": sys.executable}.items():
        monkeypatch.setenv(name, str(value))
    (kept / "full.sh").write_text(FULL)
    file = write_recipe(
        replace(recipe, data=replace(recipe.data, folder=str(pictures)), tensorboard=True), kept / "a.yaml"
    )
    fill = "file = open(os.environ['DISK'] + '/ballast', 'wb', 0)\n"
    fill += "try:\n    while True: file.write(bytes(4096))\nexcept OSError: pass"
    prefix = [unshare, "-rm", "sh", kept / "full.sh", disk]
    status, lines = train(program, file, "--out", disk / "run", at="0:5", do=fill, prefix=prefix)
    assert status == 2, lines
    wrong = f"cannot write {disk}/run/last.pt: No space left on device"
    for epoch in (2, 3):
        text = (
            f"could not write the checkpoint after epoch {epoch}: {wrong}; the one before is kept and the run goes on"
        )
        assert (text in notes(lines)) or epoch == 3  # the error tells of the last one
    assert told(lines) == [f"shiftconv: error: [Errno 28] {wrong}"]
    assert "epoch 3/3" in "".join(lines[: lines.index(told(lines)[0])])  # it ran to its end
    assert ck.load(kept / "cut" / "last.pt").age == (1, 0)
    same_run(kept / "resumed", whole_small)


def test_curves_and_lists_that_the_disk_does_not_take_end_no_run(recipe, tmp_path, monkeypatch):
    from torch.utils.tensorboard.writer import SummaryWriter

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    genuine = files.write
    monkeypatch.setattr(files, "write", lambda path, *rest: refuse() if "bad" in path.name else genuine(path, *rest))
    monkeypatch.setattr(SummaryWriter, "flush", refuse)
    monkeypatch.setattr(SummaryWriter, "close", refuse)
    folder = make_pictures(tmp_path / "pictures", count=12)
    recipe = replace(recipe, data=replace(recipe.data, folder=str(folder)), tensorboard=True, epochs=2)
    spoil(recipe, 1)
    events = []
    found = run_train(recipe, tmp_path / "run", device="cpu", progress=events.append)
    assert [row["skipped_images"] for row in found.history] == [1, 1]
    said = [event.text for event in events if isinstance(event, Note)]
    assert "the curves for TensorBoard could not be written: No space left on device" in said
    assert "the list of unreadable images could not be written: No space left on device" in said


def spoil(recipe, count, part="train"):
    """Make so many pictures of a part unreadable: empty, cut, gone."""
    images = getattr(open_data(recipe.data), part).samples[:count]
    paths = [path for path, _ in images]
    for number, path in enumerate(paths):
        if number % 3 == 0:
            path.write_bytes(b"")
        elif number % 3 == 1:
            path.write_bytes(path.read_bytes()[:90])
        else:
            path.unlink()
            path.symlink_to("nowhere")
    return paths


def test_pictures_that_cannot_be_read_are_skipped_told_and_counted(recipe, tmp_path):
    folder = make_pictures(tmp_path / "pictures", count=24)
    recipe = replace(recipe, data=replace(recipe.data, folder=str(folder)), epochs=2)
    bad = spoil(recipe, 3)
    found = {}
    for workers in (0, 2):
        events = []
        recipe = replace(recipe, data=replace(recipe.data, workers=workers))
        found[workers] = run_train(recipe, tmp_path / str(workers), device="cpu", progress=events.append)
        assert [row["skipped_images"] for row in found[workers].history] == [3, 3]
        lines = (tmp_path / str(workers) / "bad_images.txt").read_text().splitlines()
        assert [line.partition(": ")[0] for line in lines] == sorted(map(str, bad))
        said = [event.text for event in events if isinstance(event, Note)]
        assert len(said) == 3 and all("another one takes its place" in text for text in said)
    same_run(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("part", ["train", "val"])
def test_pictures_that_must_be_readable_stop_the_run_in_one_line(recipe, tmp_path, capfd, part):
    folder = make_pictures(tmp_path / "pictures", count=24)
    stop = replace(
        recipe, data=replace(recipe.data, folder=str(folder), bad_images="stop" if part == "train" else "skip")
    )
    (path,) = spoil(stop, 1, part)
    file = write_recipe(stop, tmp_path / "a.yaml")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(file), "--out", str(tmp_path / "run"), "--data.workers", "1"])
    assert caught.value.code == 2
    (line,) = told(capfd.readouterr().err.splitlines())
    assert line.startswith(f"shiftconv: error: cannot read the image {path}: ")


def test_processes_that_read_pictures_can_be_killed(recipe, whole_small, tmp_path, monkeypatch):
    genuine, update = FileImages.read, Trainer._update
    killed = []

    def slowly(self, index):
        time.sleep(0.02)
        return genuine(self, index)

    def killing(self):
        update(self)
        if self.step == 0 and self.finished == 1:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(FileImages, "read", slowly)
    monkeypatch.setattr(Trainer, "_update", killing)
    recipe = replace(recipe, data=replace(recipe.data, workers=2))
    found = run_train(recipe, tmp_path / "run", device="cpu")
    assert len(killed) == 1
    assert [row.get("restarted_workers") for row in found.history] == [None, 1, 1]
    same_run(found.folder, whole_small)


def test_a_flipped_bit_and_a_lost_recipe_are_told_and_the_run_goes_on(recipe, whole_small, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(whole_small, run)
    content = bytearray((run / "last.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (run / "last.pt").write_bytes(content)
    config = bytearray((run / "config.yaml").read_bytes())
    config[3] ^= 4
    (run / "config.yaml").write_bytes(config)
    main(["train", "--resume", str(run)])
    lines = capfd.readouterr().err.splitlines()
    assert "going on after epoch 2" in lines[0]
    assert [f"{run}/last.pt is damaged" in line for line in notes(lines)] == [True, False]
    assert f"{run}/config.yaml holds no recipe" in notes(lines)[1]
    same_run(run, whole_small)


def test_only_a_run_that_the_same_launcher_began_is_started_anew(recipe, whole_small, tmp_path, monkeypatch):
    run, given = tmp_path / "run", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "a"}
    shutil.copytree(whole_small, run)
    for name, value in {**given, "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FileExistsError, match="already holds a run"):
        run_train(recipe, run, device="cpu")
    run_train(recipe, run, resume="auto", device="cpu")  # from now on it is this launcher's
    for resume in (None, whole_small):  # what it went on from at first is not where it goes on after a restart
        run_train(recipe, run, resume=resume, device="cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    with pytest.raises(FileExistsError, match="already holds a run"):
        run_train(recipe, run, device="cpu")


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_no_state_within_an_epoch_is_saved_that_has_diverged(recipe, tmp_path, monkeypatch, where):
    update = Trainer._update

    def spoiling(self):
        update(self)
        if self.finished == 1 and self.step == 1:
            if where == "loss":
                self._meter._sums[0] = float("inf")
            else:
                next(self.model.parameters()).data.view(-1)[0] = float("nan")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_update", spoiling)
    monkeypatch.setattr(Meter, "due", lambda self: False)
    with pytest.raises(Diverged, match=r"the training loss became (inf|nan) in epoch 2, step 2 "):
        run_train(recipe, tmp_path / "run", device="cpu")
    assert ck.load(tmp_path / "run" / "last.pt").age == (1, 0)


def test_pictures_that_were_skipped_before_a_stop_are_counted_after_it(recipe, tmp_path, monkeypatch):
    folder, update = make_pictures(tmp_path / "pictures", count=24), Trainer._update
    recipe = replace(recipe, data=replace(recipe.data, folder=str(folder)), epochs=1)
    bad = spoil(recipe, 4)

    def stopping(self):
        update(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_update", stopping)
    with pytest.raises(Stopped):
        run_train(recipe, tmp_path / "run", device="cpu")
    seen = len((tmp_path / "run" / "bad_images.txt").read_text().splitlines())
    assert 0 < seen < len(bad)
    monkeypatch.setattr(Trainer, "_update", update)
    (row,) = run_train(recipe, tmp_path / "run", resume="auto", device="cpu").history
    assert row["skipped_images"] == len(bad) == len((tmp_path / "run" / "bad_images.txt").read_text().splitlines())
