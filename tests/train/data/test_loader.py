import os
import signal
import time

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from shiftconv.train.data import open_data, serving
from shiftconv.train.data.images import Augment, MemoryImages
from shiftconv.train.data.loader import Loader
from shiftconv.train.data.share import Share
from shiftconv.train.seed import Stream, generator
from shiftconv.train.settings import Data

from ..conftest import make_pictures

PLAIN = ((0.0,) * 3, (1.0,) * 3)


def batches(loader, epoch):
    loader.start_epoch(epoch)
    return list(loader)


def equal(one, two):
    pairs = [(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_follows_from_seed_and_epoch(kind, pictures):
    def loader(workers, seed=0):
        if kind == "memory":
            images = torch.arange(20 * 3 * 8 * 8).view(20, 3, 8, 8).byte()
            data = MemoryImages(images, torch.arange(20), PLAIN, Augment())
            return Loader(data, 6, shuffle=True, workers=workers, seed=seed)
        data = open_data(Data(name="folder", folder=str(pictures), image_size=16, workers=workers))
        return data.loader("train", 6, seed=seed)

    here = loader(0)
    first, second = batches(here, 0), batches(here, 1)
    torch.rand(3)  # the global generator has no part in it
    assert equal(batches(loader(0), 1), second)
    assert equal(batches(loader(2), 1), second)
    assert not equal(first, second)
    assert not equal(batches(loader(0, seed=1), 0), first)


def test_random_transforms_are_new_in_each_epoch():
    images = torch.arange(20 * 3 * 8 * 8).view(20, 3, 8, 8).byte()
    loader = Loader(MemoryImages(images, torch.arange(20), PLAIN, Augment()), 20)
    assert not equal(batches(loader, 0), batches(loader, 1))
    assert equal(batches(loader, 0), batches(loader, 0))


def test_serves_each_image_once():
    data = MemoryImages(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), torch.arange(20), PLAIN)
    loader = Loader(data, 6, shuffle=True)
    assert [len(labels) for _, labels in loader] == [6, 6, 6, 2]
    assert len(loader) == 4
    assert torch.cat([labels for _, labels in loader]).sort().values.tolist() == list(range(20))


@pytest.mark.parametrize("size", [0, -3])
def test_batch_size(size):
    data = MemoryImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), PLAIN)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        Loader(data, size)


def test_nothing_to_load():
    with pytest.raises(ValueError, match="not one image"):
        Loader(MemoryImages(torch.zeros(0, 3, 8, 8), torch.zeros(0), PLAIN), 6)


def plain(count=23):
    """Images whose every pixel is their number."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    return MemoryImages(pixels, torch.arange(count), PLAIN)


def test_the_order_is_that_of_a_random_sampler():
    loader = Loader(plain(), 8, shuffle=True, seed=3)
    sampler = RandomSampler(range(23), generator=generator(3, Stream.ORDER, 1))
    assert [labels.tolist() for _, labels in batches(loader, 1)] == list(BatchSampler(sampler, 8, drop_last=False))


def test_steps_alone_are_the_batches():
    loader = Loader(plain(), 8, shuffle=True)
    loader.start_epoch(2)
    steps = list(loader.steps())
    assert equal([step[:2] for step in steps], list(loader))
    assert [(step.share, step.ends) for step in steps] == [(1.0, True)] * 3
    assert loader.updates == len(loader) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_gradient_of_the_parts_is_that_of_the_update(workers):
    def losses(rank, world, micro):
        loader = Loader(plain(), 8, shuffle=True, workers=workers, share=Share(rank, world, micro))
        sums, total = [], torch.zeros(())
        for images, labels, share, ends in loader.steps():
            total = total + share * (images.mean((1, 2, 3)) * 255 + labels).mean()
            if ends:
                sums.append(total)
                total = torch.zeros(())
        return torch.stack(sums)

    whole = losses(0, 1, None)
    torch.testing.assert_close(sum(losses(rank, 3, 2) for rank in range(3)), whole)
    torch.testing.assert_close(losses(0, 1, 3), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_within_an_epoch_without_reading_what_was_done(workers, pictures, monkeypatch):
    data = open_data(Data(name="folder", folder=str(pictures), image_size=16, workers=workers))
    loader = data.loader("train", 6, share=Share(micro_batch_size=4))
    loader.start_epoch(1)
    whole = list(loader.steps())
    done = next(i for i, step in enumerate(whole) if step.ends) + 1
    read = []
    get = type(data.train).read
    monkeypatch.setattr(type(data.train), "read", lambda self, index: read.append(index) or get(self, index))
    rest = list(loader.steps(1))
    assert equal([step[:2] for step in rest], [step[:2] for step in whole[done:]])
    assert [step[2:] for step in rest] == [step[2:] for step in whole[done:]]
    assert len(read) == (0 if workers else 14)
    assert list(loader.steps(loader.updates)) == []
    with pytest.raises(ValueError, match=r"first must be in 0\.\.4, .*got 5"):
        next(loader.steps(5))


@pytest.mark.parametrize("world", [1, 2, 3, 30])
def test_ranks_evaluate_every_image_once(world):
    parts = [list(Loader(plain(), 8, share=Share(rank, world))) for rank in range(world)]
    labels = sorted(label for part in parts for _, labels in part for label in labels.tolist())
    assert labels == list(range(23))
    assert max(len(labels) for part in parts for _, labels in part) <= -(-8 // world)
    assert all(len(part) <= 3 for part in parts)


@pytest.fixture
def impatient(monkeypatch):
    """Torch looks every 5 seconds whether the workers live; too long for a test."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


class Deadly(MemoryImages):
    """The worker that reads one of these images at first is killed; with a file to write to, once."""

    killers, note = (), None

    def __getitem__(self, indices):
        once = self.note is not None and self.note.exists()
        if get_worker_info() is not None and set(indices) & set(self.killers) and not once:
            if self.note:
                self.note.touch()
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(indices)


def deadly(count=40):
    return Deadly(plain(count).images, torch.arange(count), PLAIN, Augment())


def test_a_dead_worker_is_replaced_and_no_number_changes(tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    undisturbed = list(Loader(deadly(), 4, shuffle=True, workers=2).steps())
    images, told = deadly(), []
    images.killers, images.note = (33, 34), tmp_path / "killed"
    loader = Loader(images, 4, shuffle=True, workers=2)
    loader.tell = told.append
    steps = list(loader.steps())
    assert equal([step[:2] for step in steps], [step[:2] for step in undisturbed])
    assert loader.restarts == len(told) == 1 and "started anew" in told[0] and "\n" not in told[0]
    assert images.note.exists()
    assert signal.getsignal(signal.SIGCHLD) == before  # torch's would raise anywhere in the main thread


def test_workers_that_die_again_and_again_stop_the_run(monkeypatch, impatient):
    images = deadly()
    images.killers = range(40)
    loader = Loader(images, 4, workers=1)
    monkeypatch.setattr(serving, "RESTARTS", 1)
    with pytest.raises(RuntimeError, match=r"died 2 times .*shared memory.* data.workers below 1") as caught:
        list(loader.steps())
    assert "\n" not in str(caught.value) and loader.restarts == 1


def test_an_error_of_the_code_in_a_worker_is_no_death():
    images = plain()
    images.labels = torch.arange(3)  # too few
    loader = Loader(images, 4, workers=1)
    with pytest.raises(IndexError, match="in DataLoader worker process"):
        list(loader.steps())
    assert loader.restarts == 0


@pytest.fixture
def damaged(tmp_path):
    """24 images of which one is no image and one is not there, once they were found."""
    folder = make_pictures(tmp_path / "damaged", count=12)
    data = open_data(Data(name="folder", folder=str(folder), image_size=16, workers=0, erase_prob=0.5))
    bad = [path for path, _ in data.train.samples[3:5]]
    bad[0].write_bytes(b"no image")
    bad[1].unlink()
    return data, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_good_image_takes_the_place_of_a_bad_one(damaged, workers):
    (data, bad), told = damaged, []
    loader = Loader(data.train, 5, workers=workers, skip_bad=True)
    loader.tell = told.append
    images, labels = (torch.cat(part) for part in zip(*(step[:2] for step in loader.steps()), strict=True))
    assert len(images) == len(labels) == 20
    assert torch.equal(images[3], images[0]) and torch.equal(images[4], images[0])
    assert not torch.equal(images[1], images[0])
    assert set(loader.bad) == set(bad) and "cannot identify" in loader.bad[bad[0]]
    assert len(told) == 2 and str(bad[0]) in told[0] and str(bad[1]) in told[1]


def test_bad_images_stop_what_they_must_stop(damaged):
    data, bad = damaged
    with pytest.raises(ValueError, match=f"cannot read the image {bad[0]}: cannot identify.*; replace or remove it"):
        list(Loader(data.train, 5).steps())
    with pytest.raises(ValueError, match=r"not one image of a micro-batch can be read: .*png; replace"):
        list(Loader(data.train, 5, share=Share(micro_batch_size=1), skip_bad=True).steps())
    assert data.loader("train", 4).skip_bad
    assert not any(loader.skip_bad for loader in (data.loader("val", 4), data.loader("train", 4, shuffle=False)))
    data = open_data(Data(name="folder", folder=str(data.train.samples[0][0].parents[1]), bad_images="stop"))
    assert not data.loader("train", 4).skip_bad


def test_too_many_bad_images_stop_the_run(damaged, monkeypatch):
    data, _ = damaged
    data.train.samples[5][0].write_bytes(b"")
    monkeypatch.setattr(serving, "BAD_READ", 21)  # so the first epoch is too short to judge
    loader = Loader(data.train, 10, skip_bad=True)
    assert len(list(loader.steps())) == 2 and len(loader.bad) == 3
    with pytest.raises(ValueError, match=r"6 of the 30 images read so far cannot be read, more than 10%; the last"):
        list(loader.steps())
