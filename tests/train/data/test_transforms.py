import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from shiftconv.train.data import open_data, transforms
from shiftconv.train.data.transforms import NORMALISATIONS, automatic, eraser, to_evaluate, to_train
from shiftconv.train.settings import Data


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((450, 300), Image.Resampling.BICUBIC)


def plain(image, mean="imagenet"):
    return F.normalize(F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), *NORMALISATIONS[mean])


@pytest.mark.parametrize("size, share, side", [(224, 0.875, 256), (64, 0.9, 71), (224, 1.0, 224)])
def test_the_centre_is_looked_at(picture, size, share, side):
    small = F.center_crop(picture.resize((side * 450 // 300, side), Image.Resampling.BICUBIC), [size, size])
    found = to_evaluate(Data(crop_share=share), size)(picture)
    torch.testing.assert_close(found, plain(small))


def test_large_images_are_looked_at_as_a_whole(picture):
    square = picture.resize((384, 384), Image.Resampling.BICUBIC)
    torch.testing.assert_close(to_evaluate(Data(crop_share=1.0), 384)(picture), plain(square))
    assert to_evaluate(Data(crop_share=0.95), 384)(picture).shape == (3, 384, 384)


def test_mean_of_inception(picture):
    found = to_evaluate(Data(mean="inception"), 64)(picture)
    assert NORMALISATIONS["inception"] == ((0.5,) * 3, (0.5,) * 3)
    assert -1 <= found.min() < -0.1 and 0.1 < found.max() <= 1


def seed():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002


def drawn(data, picture, count=16, size=32):
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    seed()
    transform = to_train(data, size)
    images = torch.stack([transform(picture) for _ in range(count)])
    torch.set_rng_state(torch_state), random.setstate(python_state), np.random.set_state(numpy_state)  # noqa: NPY002
    return images


def test_settings_reach_the_training_images(picture):
    quiet = Data(color_jitter=0.0, interpolation="bilinear")
    base = drawn(quiet, picture)
    assert base.shape == (16, 3, 32, 32) and len({image.sum().item() for image in base}) == 16
    for change in (
        dict(color_jitter=0.4),
        dict(interpolation="bicubic"),
        dict(auto_augment="rand-m9-mstd0.5-inc1"),
        dict(mean="inception"),
        dict(erase_prob=1.0, erase_mode="const"),
        dict(flip=False),
    ):
        assert not torch.equal(
            drawn(Data(**{"color_jitter": 0.0, "interpolation": "bilinear"} | change), picture), base
        )


def test_erased_rectangles():
    quiet = dict(color_jitter=0.0, interpolation="bilinear", erase_prob=1.0)
    for mode in ("const", "rand", "pixel"):
        image = Image.new("RGB", (64, 64), (255, 255, 255))
        white = plain(image)[:, 0, 0]
        images = drawn(Data(**quiet, erase_mode=mode), image)
        erased = (images - white[:, None, None]).abs().amax(1) > 1e-3
        assert erased.flatten(1).any(1).all() and erased.float().mean() < 0.4
        inside = images[:, 0][erased]
        assert len(inside.unique()) == 1 if mode == "const" else len(inside.unique()) > 10
    assert eraser(Data()) is None


def test_no_colours_move_unless_asked_for():
    images = drawn(Data(color_jitter=0.0, flip=False), Image.new("RGB", (64, 64), (10, 200, 30)))
    expected = plain(Image.new("RGB", (32, 32), (10, 200, 30)))
    assert (images - expected).abs().max() < 1e-5


@pytest.mark.parametrize("text", ["rand-z9", "rend-m9", "rand-m9x", "augmix-q1"])
def test_an_unknown_automatic_augmentation_is_told(text):
    with pytest.raises(ValueError, match=r"data.auto_augment .* is not one of timm's .*rand-m9-mstd0.5-inc1") as caught:
        to_train(Data(auto_augment=text), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "3a"])
def test_known_automatic_augmentations(text, picture):
    assert automatic(text, 32, (0.5,) * 3)(picture).size == picture.size


@pytest.mark.parametrize("text", ["rand-m10-inc1", "augmix-m10", "v0"])
def test_posterising_to_nothing_is_black(text, picture):
    """Timm's strongest posterising keeps no bit, which Pillow 13 refuses."""
    augmenters = [automatic(text, 32, (0.5,) * 3), to_train(Data(auto_augment=text), 32).change.transforms[2]]
    for augmenter in augmenters:
        ops = augmenter.ops if hasattr(augmenter, "ops") else [op for pair in augmenter.policy for op in pair]
        named = [op for op in ops if op.name.startswith("Posterize")]
        assert named
        for op in named:
            assert op.aug_fn(picture, 0).getextrema() == ((0, 0),) * 3
            assert op.aug_fn(picture, 3).tobytes() == ImageOps.posterize(picture, 3).tobytes()
            assert op.aug_fn(picture, 8) is picture


@pytest.mark.parametrize("workers", [0, 2])
def test_digits_are_augmented_and_erased_image_by_image(workers):
    settings = dict(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5, crop_padding=0, workers=workers)
    loader = open_data(Data(**settings)).loader("train", 400, shuffle=False)
    clean, _ = next(iter(open_data(Data(augment=False)).loader("train", 400, shuffle=False)))
    found, _ = next(iter(loader))
    same = torch.tensor([torch.equal(a, b) for a, b in zip(clean, found, strict=True)])
    assert 0.05 < same.float().mean() < 0.5
    other = open_data(Data(**settings)).train
    other.start_epoch(0, 0)
    assert torch.equal(other[[7, 300]][0], found[[7, 300]])  # whatever batch they are in
    other.start_epoch(0, 1)
    assert not torch.equal(other[list(range(20))][0], found[:20])


def test_folders_are_served_as_the_settings_say(pictures):
    settings = dict(name="folder", folder=str(pictures), image_size=16, mean="inception", crop_share=1.0)
    data = open_data(Data(**settings, augment=False))
    assert data.normalisation == transforms.NORMALISATIONS["inception"]
    path = data.train.samples[0][0]
    torch.testing.assert_close(data.train[0][0], plain(Image.open(path), "inception"))
