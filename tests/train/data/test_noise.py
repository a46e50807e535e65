import pytest
import torch

from shiftconv.train.data import open_data
from shiftconv.train.data.noise import noisy
from shiftconv.train.settings import Data

KEYS = [str(number).encode() for number in range(6000)]
LABELS = [number % 6 for number in range(6000)]


def test_a_share_gets_another_class_each_as_often():
    changed = noisy(KEYS, LABELS, 6, 0.5)
    steps = torch.bincount((torch.tensor(changed) - torch.tensor(LABELS)) % 6)
    assert steps[0] == 3000 and steps.sum() == 6000
    assert (steps[1:] - 600).abs().max() < 100
    assert noisy(KEYS, LABELS, 6, 0.0) == LABELS
    assert all(a != b for a, b in zip(noisy(KEYS, LABELS, 6, 1.0), LABELS, strict=True))


def test_noise_follows_from_what_an_image_is_not_from_its_place():
    changed = dict(zip(KEYS, noisy(KEYS, LABELS, 6, 0.3), strict=True))
    assert noisy(KEYS[::-1], LABELS[::-1], 6, 0.3) == [changed[key] for key in KEYS[::-1]]


def test_one_class_has_no_other():
    with pytest.raises(ValueError, match=r"data.label_noise needs at least 2 classes, but there is 1"):
        noisy(KEYS, [0] * 6000, 1, 0.1)


def test_only_the_training_part_of_digits_is_noisy():
    clean, noise = open_data("digits"), open_data(Data(label_noise=0.25))
    assert torch.equal(clean.val.labels, noise.val.labels) and torch.equal(clean.test.labels, noise.test.labels)
    assert torch.equal(clean.train.images, noise.train.images)
    assert (clean.train.labels != noise.train.labels).sum() == round(0.25 * 1259)


def test_only_the_training_part_of_a_folder_is_noisy(pictures):
    clean, noise = (
        open_data(Data(name="folder", folder=str(pictures), image_size=16, label_noise=share)) for share in (0.0, 0.4)
    )
    assert clean.val.samples == noise.val.samples and clean.test.samples == noise.test.samples
    changed = [(a, b) for a, b in zip(clean.train.samples, noise.train.samples, strict=True) if a != b]
    assert len(changed) == 8 and all(a[0] == b[0] and a[1] == 1 - b[1] for a, b in changed)
