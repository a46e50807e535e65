import pytest
import torch

from shiftconv.train.data import open_data
from shiftconv.train.data.images import Augment, MemoryImages
from shiftconv.train.data.loader import Loader
from shiftconv.train.settings import Data

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
