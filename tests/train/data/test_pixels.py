import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from shiftconv.train.data import open_data
from shiftconv.train.data.images import BadImage, in_rgb
from shiftconv.train.data.loader import collate
from shiftconv.train.data.pixels import _constants
from shiftconv.train.data.transforms import NORMALISATIONS, to_evaluate, to_train
from shiftconv.train.seed import seeded
from shiftconv.train.settings import Data


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC)


def timms(data, size):
    """Timm's whole transform, which makes a normalised image of each picture by itself."""
    mean, std = NORMALISATIONS[data.mean]
    return create_transform(
        size,
        is_training=True,
        mean=mean,
        std=std,
        interpolation=data.interpolation,
        color_jitter=data.color_jitter or None,
        auto_augment=data.auto_augment,
        re_prob=data.erase_prob,
        re_mode=data.erase_mode,
        re_count=data.erase_count,
    )


SETTINGS = [
    dict(color_jitter=0.0),
    dict(),
    dict(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", erase_prob=0.5),
    dict(erase_prob=1.0, erase_mode="rand", erase_count=3, mean="inception"),
    dict(erase_prob=0.5, erase_mode="const"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_number_is_that_of_timms_transform(picture, settings):
    data = Data(**settings)
    with seeded(3):
        expected = [timms(data, 48)(picture) for _ in range(12)]
    with seeded(3):
        look = to_train(data, 48)
        handed = [look.pixels(picture) for _ in range(12)]
    assert all(pixels.dtype == torch.uint8 and pixels.shape == (3, 48, 48) for pixels, _ in handed)
    found = look.finish(torch.stack([pixels for pixels, _ in handed]), [erased for _, erased in handed])
    assert found.is_contiguous() and torch.equal(found, torch.stack(expected))
    with seeded(3):
        assert torch.equal(torch.stack([look(picture) for _ in range(12)]), found)


def test_every_number_is_timms_in_evaluation(picture):
    mean, std = NORMALISATIONS["imagenet"]
    for size, share, mode in ((48, 0.875, "center"), (384, 1.0, "squash")):
        expected = create_transform(size, mean=mean, std=std, interpolation="bicubic", crop_pct=share, crop_mode=mode)
        assert torch.equal(to_evaluate(Data(crop_share=share), size)(picture), expected(picture))


def test_all_bytes_are_normalised_as_timm_does():
    every = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    for mean in ("imagenet", "inception"):
        expected = create_transform(16, crop_pct=1.0, mean=NORMALISATIONS[mean][0], std=NORMALISATIONS[mean][1])(every)
        assert torch.equal(to_evaluate(Data(mean=mean, crop_share=1.0), 16)(every), expected)


def test_constants_are_tensors_of_the_device_that_divides():
    """A GPU would multiply by the reciprocal of a number, which is not the same."""
    for constant in _constants(NORMALISATIONS["imagenet"], torch.device("meta")):
        assert constant.device.type == "meta" and constant.dtype == torch.float32


def test_workers_hand_over_bytes(pictures):
    data = open_data(Data(name="folder", folder=str(pictures), image_size=16, erase_prob=1.0))
    samples = data.train.read_all([0, 5])
    bad = BadImage(pictures / "no.png", "none")
    served = collate([samples[0], bad, samples[1]])
    assert served.batch is not None and served.bad == [bad]
    images, labels = served.batch
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16) and len(labels) == 3
    found = data.train.transform.finish(images, served.erased)
    expected = [data.train[index][0] for index in (0, 5, 5)]
    assert torch.equal(found, torch.stack(expected))  # the next good one, with what is erased of it


def test_reading_leaves_the_global_generators_alone(pictures):
    data = open_data(Data(name="folder", folder=str(pictures), image_size=16, auto_augment="rand-m9", erase_prob=1.0))

    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with seeded(5):
        expected = draws()
    with seeded(5):
        first = data.train.read_all([3, 4])
        assert draws() == expected
    again = data.train.read_all([4])[0]
    assert torch.equal(again.pixels, first[1].pixels)


def test_a_picture_in_rgb_is_not_copied(picture):
    assert in_rgb(picture) is picture
    grey = in_rgb(picture.convert("L"))
    assert grey.mode == "RGB" and grey.size == picture.size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_gpu_gives_the_numbers_of_the_cpu(pictures, workers):
    data = open_data(Data(name="folder", folder=str(pictures), image_size=16, workers=workers, erase_prob=0.5))
    here, there = (data.loader("train", 8, device=torch.device(kind)).steps() for kind in ("cpu", "cuda"))
    for one, two in zip(here, there, strict=True):
        assert two.images.is_cuda and two.labels.is_pinned()
        assert torch.equal(one.images, two.images.cpu()) and torch.equal(one.labels, two.labels)
