import io
import json
import os
import signal
import tarfile
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from shiftconv.train.data import open_data
from shiftconv.train.data.share import Share
from shiftconv.train.settings import Data

pytest.importorskip("webdataset")
pytestmark = [  # webdataset leaves files to be closed by the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def member(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, split, lengths, first=0):
    """Shards of images; the class of each is its number, which is its grey value too."""
    names, number = [], first
    for shard, length in enumerate(lengths):
        names.append(f"tiny-{split}-{shard}.tar")
        with tarfile.open(folder / names[-1], "w") as tar:
            for _ in range(length):
                member(tar, f"{number:05}.png", png(number))
                member(tar, f"{number:05}.cls", str(number).encode())
                number += 1
    return dict(name=split, num_samples=sum(lengths), filenames=names, shard_lengths=list(lengths))


@pytest.fixture
def shards(tmp_path):
    splits = {
        "train": write_shards(tmp_path, "train", (7, 6, 6, 6)),
        "validation": write_shards(tmp_path, "val", (5, 4, 3)),
    }
    (tmp_path / "_info.json").write_text(json.dumps(dict(splits=splits, num_classes=25)))
    return Data(name="wds/tiny", folder=str(tmp_path), image_size=16, workers=0, augment=False, crop_share=1.0)


def labels_of(loader, epoch=0):
    loader.start_epoch(epoch)
    return [step.labels.tolist() for step in loader.steps()]


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (3, 1), (4, 1)])
def test_every_image_is_evaluated_once(shards, world, workers):
    data = open_data(replace(shards, workers=workers))
    assert [len(data.train), len(data.val), data.test] == [25, 12, None]
    assert data.class_names == tuple(map(str, range(25)))
    loaders = [data.loader("val", 4, share=Share(rank, world)) for rank in range(world)]
    found = [(images, labels) for loader in loaders for images, labels in loader]
    labels = torch.cat([labels for _, labels in found])
    assert sorted(labels.tolist()) == list(range(12))
    grey = torch.cat([images for images, _ in found])[:, 0, 0, 0] * 0.229 + 0.485
    torch.testing.assert_close(grey * 255, labels.float(), rtol=0, atol=1e-3)
    assert max(len(labels) for _, labels in found) <= -(-4 // world)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_follows_from_seed_and_epoch(shards, workers):
    data = open_data(replace(shards, workers=workers))

    def run(seed=0, epoch=0, data=data):
        return labels_of(data.loader("train", 8, seed=seed), epoch)

    first = run()
    assert [len(labels) for labels in first] == [8, 8, 8, 8]
    assert run() == first == run(data=open_data(replace(shards, workers=workers)))
    assert run(epoch=1) != first and run(seed=1) != first
    seen = set(chain.from_iterable(first))
    assert seen == set(range(25)) if workers == 0 else len(seen) > 15


@pytest.mark.parametrize("workers", [0, 2])
def test_transforms_follow_from_seed_and_epoch(shards, workers):
    data = open_data(replace(shards, workers=workers, augment=True))
    (one, *_), (two, *_) = (list(data.loader("train", 8).steps()) for _ in range(2))
    assert torch.equal(one.images, two.images)


@pytest.mark.parametrize("world, micro, batch", [(2, None, 8), (2, 3, 8), (3, 2, 10), (4, None, 3), (1, 3, 7)])
def test_ranks_have_the_same_steps(shards, world, micro, batch):
    data = open_data(shards)
    runs = [list(data.loader("train", batch, share=Share(rank, world, micro)).steps()) for rank in range(world)]
    updates = -(-25 // batch)
    assert {sum(step.ends for step in run) for run in runs} == {updates}
    assert {tuple(step.ends for step in run) for run in runs} == {tuple(step.ends for step in runs[0])}
    assert sum(step.share for run in runs for step in run) == pytest.approx(updates)
    assert sum(len(step.labels) for run in runs for step in run if step.share) == updates * batch


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_within_an_epoch(shards, workers):
    data = open_data(replace(shards, workers=workers, augment=True))
    loader = data.loader("train", 6, share=Share(micro_batch_size=4))
    whole, rest = list(loader.steps()), list(loader.steps(2))
    assert len(rest) == len(whole) - 4
    for one, two in zip(whole[4:], rest, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert list(loader.steps(loader.updates)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_each_image_keeps_its_erased_rectangle_wherever_batches_are_cut(shards, workers):
    data = open_data(replace(shards, workers=workers, augment=True, erase_prob=0.7, erase_mode="const"))
    whole, cut = (list(data.loader("train", 8, share=Share(micro_batch_size=size)).steps()) for size in (None, 3))
    one, two = (torch.cat([step.images for step in steps]) for steps in (whole, cut))
    assert torch.equal(one, two)
    erased = (one == 0).all(1).flatten(1)
    assert 0 < erased.any(1).sum() < len(one) and not erased.all(1).any()


class Killer:
    """A transform that kills its worker at one image, once."""

    def __init__(self, transform, note):
        self.transform, self.note, self.count = transform, note, 0
        self.finish = transform.finish

    def pixels(self, image):
        self.count += 1
        if get_worker_info() is not None and self.count == 9 and not self.note.exists():
            self.note.touch()
            time.sleep(0.3)  # until what was read before has been handed over
            os.kill(os.getpid(), signal.SIGKILL)
        return self.transform.pixels(image)


def test_a_dead_worker_is_replaced_and_no_number_changes(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    data = open_data(replace(shards, workers=2))
    whole = labels_of(data.loader("train", 4))
    data.train.transform = Killer(data.train.transform, tmp_path / "killed")
    loader = data.loader("train", 4)
    assert labels_of(loader) == whole
    assert loader.restarts == 1 and (tmp_path / "killed").exists()


def test_no_more_workers_than_shards(shards):
    data = open_data(replace(shards, workers=9))
    assert data.loader("train", 4).workers == 4
    assert data.loader("train", 4, share=Share(0, 2)).workers == 2
    with pytest.raises(ValueError, match="wds/tiny train has 4 shards, too few for 5 processes"):
        data.loader("train", 4, share=Share(0, 5))


def test_an_image_that_cannot_be_evaluated_stops_the_run(shards, tmp_path):
    with tarfile.open(tmp_path / "tiny-val-1.tar", "w") as tar:
        member(tar, "7.png", b"no image")
        member(tar, "7.cls", b"7")
    with pytest.raises(ValueError, match="only 8 of 12 images of wds/tiny validation can be read"):
        list(open_data(shards).loader("val", 4))


def test_labels_must_be_classes(shards, tmp_path):
    info = json.loads((tmp_path / "_info.json").read_text())
    (tmp_path / "_info.json").write_text(json.dumps(info | dict(num_classes=10)))
    for workers in (0, 1):
        with pytest.raises(ValueError, match="its label is 10, but there are 10 classes") as caught:
            list(open_data(replace(shards, workers=workers)).loader("val", 12))
        assert "\n" not in str(caught.value)


def test_classes_by_name_or_not_at_all(shards, tmp_path):
    info = json.loads((tmp_path / "_info.json").read_text())
    names = [f"grey {number}" for number in range(25)]
    (tmp_path / "_info.json").write_text(json.dumps(info | dict(class_names=names)))
    assert open_data(shards).class_names == tuple(names)
    (tmp_path / "_info.json").write_text(json.dumps(dict(splits=info["splits"])))
    with pytest.raises(ValueError, match=r'does not tell its classes: add "num_classes": COUNT to .*_info.json'):
        open_data(shards)


def test_parts_by_their_files(shards):
    parts = dict(train_split="tiny-train-{0..1}.tar|13", val_split="tiny-val-{0..2}.tar|12")
    data = open_data(replace(shards, **parts))
    assert [len(data.train), len(data.val)] == [13, 12]
    assert set(*labels_of(data.loader("train", 13))) == set(range(13))


def test_what_is_not_there_is_told(shards, tmp_path):
    with pytest.raises(ValueError, match=r"data.val_split 'holdout': split holdout not found.*_info.json") as caught:
        open_data(replace(shards, val_split="holdout"))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no folder of shards .*nowhere"):
        open_data(replace(shards, folder=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"set data.bad_images skip"):
        open_data(replace(shards, bad_images="stop"))
