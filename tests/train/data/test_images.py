import pytest
import torch
from torchvision.transforms.v2 import functional as F

from shiftconv.train.data.images import Augment, MemoryImages

PLAIN = ((0.0,) * 3, (1 / 255,) * 3)  # serves the pixels as they are


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (20, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crops_as_torchvision_would(pixels):
    data = MemoryImages(pixels, torch.arange(20), PLAIN, Augment(padding=2, flip=True))
    data.start_epoch(seed=3, epoch=5)
    images, labels = data[list(range(20))]
    assert data.mirrored.any() and not data.mirrored.all()
    assert labels.tolist() == list(range(20))
    for i in range(20):
        top, left = data.corners[i].tolist()
        expected = F.crop(F.pad(pixels[i], [2, 2, 2, 2]), top, left, 9, 7)
        expected = F.horizontal_flip(expected) if data.mirrored[i] else expected
        assert torch.equal(images[i].round().byte(), expected)


def test_image_is_the_same_in_any_batch(pixels):
    data = MemoryImages(pixels, torch.arange(20), PLAIN, Augment())
    data.start_epoch(0, 1)
    whole, _ = data[list(range(20))]
    assert torch.equal(data[[7, 3]][0], whole[[7, 3]])
    data.start_epoch(0, 2)
    assert not torch.equal(data[list(range(20))][0], whole)


def test_no_flip(pixels):
    data = MemoryImages(pixels, torch.arange(20), PLAIN, Augment(padding=0, flip=False))
    assert torch.equal(data[list(range(20))][0].round().byte(), pixels)


def test_normalised_and_resized(pixels):
    data = MemoryImages(pixels, torch.arange(20), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    expected = F.normalize(pixels / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(data[list(range(20))][0], expected)
    assert MemoryImages(pixels, torch.arange(20), PLAIN, size=14)[[0]][0].shape == (1, 3, 14, 14)
