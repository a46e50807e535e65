import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from shiftconv.train import checkpoint as ck
from shiftconv.train.events import Ended, EpochDone, Started, Step
from shiftconv.train.loop import train
from shiftconv.train.settings import Optim
from shiftconv.train.trainer import Diverged, Trainer

from .conftest import make_pictures

TIMES = ("images_per_second", "seconds")


def numbers(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def weights(path):
    return ck.load(path).model


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class Killed(Exception):
    pass


def stop_after(epochs, then=Killed):
    def progress(event):
        if isinstance(event, EpochDone) and event.row["epoch"] == epochs:
            raise then

    return progress


def test_learns_and_tells(whole):
    result, events = whole
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert isinstance(events[0], Started) and isinstance(events[-1], Ended) and events[-1].error is None
    assert {event.part for event in events if isinstance(event, Step)} == {"train", "val", "test"}
    assert [event.row for event in events if isinstance(event, EpochDone)] == result.history
    assert "best epoch" in str(result) and "test  loss" in str(result)


def test_folder(whole):
    result, _ = whole
    names = ["best.pt", "config.yaml", "environment.json", "last.pt", "metrics.jsonl", "previous.pt", "result.json"]
    assert sorted(path.name for path in result.folder.iterdir()) == names
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    names = "epoch step train_loss train_accuracy train_top5 val_loss val_accuracy val_top5 lr"
    assert list(rows[0]) == [*names.split(), "images_per_second", "seconds"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6), (3, 9)]
    assert json.loads((result.folder / "result.json").read_text())["test"]["top1"] == result.test.top1


def test_best_is_chosen_on_validation(whole):
    result, _ = whole
    ranks = [(row["val_accuracy"], -row["val_loss"]) for row in result.history]
    assert result.best_epoch == 1 + ranks.index(max(ranks))
    best = ck.load(result.checkpoint)
    assert best.epoch == result.best_epoch
    assert result.val.loss == pytest.approx(result.history[result.best_epoch - 1]["val_loss"], rel=1e-6)
    assert best.model_args == {"expansion": 1, "num_classes": 2}
    assert best.data["class_names"] == ["cat", "dog"]


def test_repeats_bit_for_bit(whole, recipe, tmp_path):
    result, _ = whole
    torch.rand(7)
    again = train(recipe, tmp_path / "run", device="cpu")
    assert numbers(again.history) == numbers(result.history)
    assert equal(weights(again.folder / "last.pt"), weights(result.folder / "last.pt"))


@pytest.mark.parametrize("epochs", [1, 2])
def test_resumes_bit_for_bit(whole, recipe, tmp_path, epochs):
    result, _ = whole
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", device="cpu", progress=stop_after(epochs))
    again = train(recipe, tmp_path / "run", resume="auto", device="cpu")
    assert numbers(again.history) == numbers(result.history)
    assert (again.best_epoch, again.test.loss, again.val.loss) == (result.best_epoch, result.test.loss, result.val.loss)
    for name in ("last.pt", "best.pt"):
        assert equal(weights(again.folder / name), weights(result.folder / name))
    lines = (again.folder / "metrics.jsonl").read_text().splitlines()
    assert numbers(map(json.loads, lines)) == numbers(result.history)


def test_resuming_a_finished_run_only_tests(whole, recipe):
    result, _ = whole
    again = train(recipe, result.folder, resume="auto", device="cpu")
    assert again.history == result.history
    assert again.test.loss == result.test.loss


def test_all_options_at_once_resume_too(recipe, tmp_path):
    optim = Optim("adamw", lr=1e-3, schedule="step", milestones=(1,), decay_norms=False)
    recipe = replace(recipe, epochs=2, optim=optim, amp="bf16", clip_grad=1.0, label_smoothing=0.1, channels_last=True)
    recipe = replace(recipe, deterministic=True, data=replace(recipe.data, workers=1), model_args={"drop_rate": 0.3})
    whole = train(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", device="cpu", progress=stop_after(1))
    again = train(recipe, tmp_path / "run", resume="auto", device="cpu")
    assert numbers(again.history) == numbers(whole.history)
    assert [row["lr"] for row in whole.history] == pytest.approx([1e-3, 1e-4])


def test_tensorboard(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(replace(recipe, epochs=2, tensorboard=True), tmp_path / "run", device="cpu")
    curves = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    assert set(curves.Tags()["scalars"]) == {
        "loss/train", "loss/val", "accuracy/train", "accuracy/val", "top5/train", "top5/val",
        "run/lr", "run/images_per_second", "run/seconds"
    }  # fmt: skip
    assert [event.step for event in curves.Scalars("loss/val")] == [1, 2]


def test_divergence_keeps_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    genuine = Trainer._update

    def poison(self):
        genuine(self)
        if self.finished == 1:
            next(self.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_update", poison)
    with pytest.raises(
        Diverged, match=r"loss became nan in epoch 2.*the last good checkpoint, after epoch 1, is untouched"
    ):
        train(recipe, tmp_path / "run", device="cpu")
    assert ck.load(tmp_path / "run" / "last.pt").epoch == 1


def test_nan_in_the_last_update_is_found_by_validation(recipe, tmp_path, monkeypatch):
    genuine = Trainer._steps

    def poison(self, epoch):
        done = genuine(self, epoch)
        next(self.model.parameters()).data.fill_(float("nan"))
        return done

    monkeypatch.setattr(Trainer, "_steps", poison)
    with pytest.raises(Diverged, match="validation loss became nan in epoch 1"):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_bad_input_leaves_no_folder(recipe, tmp_path):
    missing = replace(recipe, data=replace(recipe.data, folder=str(tmp_path / "nowhere")))
    for bad, device, kind, message in [
        (missing, "cpu", FileNotFoundError, "no folder of images"),
        (recipe, "cuda:99", ValueError, "not on this machine"),
        (replace(recipe, amp="fp16"), "cpu", ValueError, "needs a CUDA device"),
        (replace(recipe, model="shiftresnet21"), "cpu", ValueError, "shiftresnet20"),
    ]:
        with pytest.raises(kind, match=message):
            train(bad, tmp_path / "run", device=device)
        assert not (tmp_path / "run").exists()


def test_corrupt_image_keeps_the_checkpoint(recipe, tmp_path):
    folder = make_pictures(tmp_path / "pictures")
    recipe = replace(recipe, data=replace(recipe.data, folder=str(folder)))

    def spoil(event):
        if isinstance(event, EpochDone):
            for path in folder.rglob("*.png"):
                path.write_bytes(b"spoilt")

    with pytest.raises(ValueError, match=r"not one image of a micro-batch can be read: .*png"):
        train(recipe, tmp_path / "run", device="cpu", progress=spoil)
    assert ck.load(tmp_path / "run" / "last.pt").epoch == 1


def test_no_test_images(recipe, tmp_path):
    make_pictures(tmp_path / "pictures" / "train", count=6)
    recipe = replace(recipe, epochs=2, data=replace(recipe.data, folder=str(tmp_path / "pictures")))
    result = train(recipe, tmp_path / "run", device="cpu")
    assert result.test is None and "test" not in str(result).splitlines()[-1]


def test_one_picture_class_folder_of_any_mode(recipe, tmp_path):
    folder = make_pictures(tmp_path / "pictures")
    Image.new("L", (5, 90)).save(Path(folder) / "cat" / "grey.jpg")
    train(replace(recipe, epochs=2, data=replace(recipe.data, folder=str(folder))), tmp_path / "run", device="cpu")


def test_a_network_that_cannot_take_the_images(recipe, tmp_path):
    for args, message in [
        ({"num_classes": 7}, "model_args.num_classes is 7, but the data folder has 2 classes"),
        ({"in_chans": 1}, r"the network shiftresnet20 cannot take an image of shape \[1, 3, 16, 16\]: "),
        ({"features_only": True}, r"must give logits \[1, 2\] for one image, but gave list"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(replace(recipe, model_args=args), tmp_path / "run", device="cpu")
        assert not (tmp_path / "run").exists()


def test_the_folder_is_looked_at_before_the_data(whole, recipe):
    result, _ = whole
    missing = replace(recipe, data=replace(recipe.data, folder="nowhere"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(missing, result.folder, device="cpu")


def test_resuming_with_other_classes(whole, recipe, tmp_path):
    result, _ = whole
    make_pictures(tmp_path / "pictures", classes=("cat", "emu"), count=12)
    recipe = replace(recipe, data=replace(recipe.data, folder=str(tmp_path / "pictures")))
    before = {path: path.read_bytes() for path in result.folder.iterdir()}
    with pytest.raises(ValueError, match=r"last.pt was trained on: class number 1 is 'dog' there and 'emu' here"):
        train(recipe, result.folder, resume="auto", device="cpu")
    assert {path: path.read_bytes() for path in result.folder.iterdir()} == before


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_states_that_do_not_fit(whole, recipe, tmp_path, part):
    result, _ = whole
    ck.save(replace(ck.load(result.folder / "last.pt"), **{part: {"a": 1}}), tmp_path / "a.pt")
    with pytest.raises(ck.CheckpointError, match=r"a.pt does not fit a run of shiftresnet20: ") as caught:
        train(recipe, tmp_path / "run", resume=tmp_path / "a.pt", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "run").exists()


def test_the_best_epoch_is_that_of_the_file(whole, recipe, tmp_path, monkeypatch):
    result, _ = whole
    shutil.copytree(result.folder, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "last.pt", tmp_path / "run" / "best.pt")
    monkeypatch.setattr(Trainer, "rank", lambda self, row: 0)  # as if the last epoch came out worse again
    again = train(recipe, tmp_path / "run", resume=tmp_path / "run" / "previous.pt", device="cpu")
    assert again.best_epoch == ck.load(again.checkpoint).epoch == 3
