import random
from dataclasses import replace

import pytest
import torch

from shiftconv.train.checkpoint import Checkpoint, CheckpointError, load, save


@pytest.fixture
def checkpoint():
    return Checkpoint(
        model_name="net",
        model_args={"num_classes": 3},
        model={"weight": torch.randn(200, generator=torch.Generator().manual_seed(0))},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]},
        scheduler={"decay_t": [1, 2]},
        scaler={},
        epoch=2,
        metrics={"history": [{"epoch": n, "val_loss": 1.0, "val_accuracy": 0.5} for n in (1, 2)], "best_epoch": 1},
        recipe={"model": "net"},
    )


def same(one, two):
    return torch.equal(one.model["weight"], two.model["weight"]) and one.epoch == two.epoch


def test_there_and_back(checkpoint, tmp_path):
    save(checkpoint, tmp_path / "a.pt")
    assert same(load(tmp_path / "a.pt"), checkpoint)
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (plain["format"], plain["version"]) == ("shiftconv.checkpoint", 1)
    keys = {"model_name", "model_args", "model", "optimizer", "scheduler", "scaler", "epoch", "metrics", "recipe"}
    assert keys <= set(plain)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(checkpoint, tmp_path, share):
    path = tmp_path / "a.pt"
    save(checkpoint, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"a.pt is damaged or no checkpoint") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_changed_bytes_are_found_or_harmless(checkpoint, tmp_path):
    path = tmp_path / "a.pt"
    save(checkpoint, path)
    content, rng, found = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            assert same(load(path), checkpoint)
        except CheckpointError:
            found += 1
    assert found > 50  # the others hit padding


def test_changed_weight_is_found(checkpoint, tmp_path):
    path = tmp_path / "a.pt"
    save(checkpoint, path)
    content = bytearray(path.read_bytes())
    at = content.index(checkpoint.model["weight"].numpy().tobytes())
    content[at + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        load(path)


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "no format 'shiftconv.checkpoint'"),
        ([1], "no format"),
        ({"format": "shiftconv.checkpoint", "version": 2}, "has version 2; this shiftconv reads 1"),
        ({"format": "shiftconv.checkpoint", "version": 1, "model": {}}, "no whole checkpoint: it lacks"),
        (Hostile(), "is damaged or no checkpoint"),
    ],
)
def test_other_files(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*a.pt"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": [1]}, "model must be a dict, got list"),
        ({"epoch": True}, "epoch must be a int, got bool"),
        ({"metrics": {}}, "metrics.history must be a list, got NoneType"),
        ({"metrics": {"history": [], "best_epoch": 1}}, "its epoch is 2, its history has 0 rows"),
        ({"metrics": {"history": [{}, {}], "best_epoch": 3}}, "its best epoch is 3"),
        ({"metrics": {"history": [{"epoch": 1}, {}], "best_epoch": 1}}, "row 1 of its history is"),
        ({"step": -1}, "its epoch is 2, its step -1"),
        ({"step": True}, "step must be a int, got bool"),
        ({"ranks": 0}, "its processes are 0"),
        ({"ema": 3}, "ema must be a dict, got int"),
        ({"epoch": 0, "metrics": {"history": [], "best_epoch": 0}}, "its epoch is 0, its step 0"),
        ({"epoch": 0, "step": 3, "metrics": {"history": [], "best_epoch": 1}}, "its best epoch is 1"),
        ({"step": 3, "metrics": {"history": [{}, {}], "best_epoch": 0}}, "its best epoch is 0"),
        ({"recipe": {"epochs": 3}}, "the recipe has no 'model'"),
        ({"recipe": {"model": "net", "epoch": 3}}, "unknown recipe setting 'epoch'"),
        ({"data": {"class_names": 3}}, "data.class_names must be a list"),
    ],
)
def test_whole_but_senseless(checkpoint, tmp_path, change, message):
    save(replace(checkpoint, **change), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a.pt is no whole checkpoint: .*{message}"):
        load(tmp_path / "a.pt")


def test_within_the_first_epoch(checkpoint, tmp_path):
    metrics = {"history": [], "best_epoch": 0}
    parts = dict(ema={"w": torch.ones(2)}, task={"p": torch.ones(3)}, meter={"loss": torch.tensor(2.0), "seen": 7})
    save(replace(checkpoint, epoch=0, step=5, metrics=metrics, ranks=4, **parts), tmp_path / "a.pt")
    there = load(tmp_path / "a.pt")
    assert there.age == (0, 5) and there.ranks == 4 and there.meter == parts["meter"]
    assert torch.equal(there.ema["w"], torch.ones(2)) and torch.equal(there.task["p"], torch.ones(3))


def test_files_of_before_have_no_steps(checkpoint, tmp_path):
    new = ("step", "ema", "task", "meter", "ranks")
    values = {key: value for key, value in vars(checkpoint).items() if key not in new}
    torch.save({"format": "shiftconv.checkpoint", "version": 1, **values}, tmp_path / "a.pt")
    there = load(tmp_path / "a.pt")
    assert same(there, checkpoint) and there.age == (2, 0) and (there.ema, there.ranks) == ({}, 1)


def test_checksums_are_there_whatever_torch_is_set_to(checkpoint, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save(checkpoint, tmp_path / "a.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load(tmp_path / "a.pt"), checkpoint)


def test_an_error_that_is_not_the_disks_leaves_the_old_file(checkpoint, tmp_path):
    save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(Exception, match="pickle"):
        save(replace(checkpoint, scheduler={"f": lambda: 0}), tmp_path / "a.pt")
    assert same(load(tmp_path / "a.pt"), checkpoint) and len(list(tmp_path.iterdir())) == 1


def test_damage_is_told_from_an_error_that_is_being_handled(checkpoint, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        try:
            load(tmp_path / "b.pt")
        except FileNotFoundError:
            load(tmp_path / "a.pt")
