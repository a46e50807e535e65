import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from shiftconv.train.data import folders, open_data
from shiftconv.train.settings import Data

from ..conftest import make_pictures


def small(folder, **settings):
    return open_data(Data(name="folder", folder=str(folder), image_size=16, **settings))


def test_class_folders_are_split(pictures):
    data = small(pictures)
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 2, 2]
    assert data.class_names == ("cat", "dog")
    paths = [path for part in (data.train, data.val, data.test) for path, _ in part.samples]
    assert len(set(paths)) == 24
    images, labels = next(iter(data.loader("test", 8)))
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert labels.tolist() == [0, 1]


def test_split_is_the_same_in_another_place(pictures, tmp_path):
    make_pictures(tmp_path / "copy", count=12)
    names = [[path.name for path, _ in small(folder).test.samples] for folder in (pictures, tmp_path / "copy")]
    assert names[0] == names[1]


@pytest.mark.parametrize("val", ["val", "validation"])
def test_parts_of_its_own(tmp_path, val):
    for part, count in (("train", 4), (val, 3), ("test", 2)):
        make_pictures(tmp_path / part, count=count)
    data = small(tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 6, 4]


def test_without_test_or_validation(tmp_path):
    make_pictures(tmp_path / "train", count=10)
    data = small(tmp_path, val_share=0.2)
    assert [len(data.train), len(data.val), data.test] == [16, 4, None]
    with pytest.raises(ValueError, match="no test part"):
        data.loader("test", 8)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of images .*nowhere.*digits works offline"):
        small(tmp_path / "nowhere")


def test_empty(tmp_path):
    with pytest.raises(ValueError, match="has no sub-folders"):
        small(tmp_path)


def test_class_without_images(tmp_path):
    make_pictures(tmp_path)
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"no images in .*eel; known endings: .jpg"):
        small(tmp_path)


def test_parts_with_other_classes(tmp_path):
    make_pictures(tmp_path / "train", classes=("cat", "dog"))
    make_pictures(tmp_path / "val", classes=("cat", "emu"))
    with pytest.raises(ValueError, match=r"val lacks dog and .*train lacks emu"):
        small(tmp_path)


def test_val_without_train(tmp_path):
    make_pictures(tmp_path / "val")
    with pytest.raises(ValueError, match="has val/ but no train/"):
        small(tmp_path)


def test_too_few_to_split(tmp_path):
    make_pictures(tmp_path, count=2)
    with pytest.raises(ValueError, match="cannot be split: class number 0 has 2 images"):
        small(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_unreadable_image(tmp_path, damage, workers):
    make_pictures(tmp_path)
    for name in ("cat", "dog"):
        path = tmp_path / name / "bad.png"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes({"truncated": path.read_bytes()[:900], "text": b"no image", "empty": b""}[damage])
    data = small(tmp_path, workers=workers, bad_images="stop")
    with pytest.raises(ValueError, match=r"cannot read the image .*bad.png: ") as caught:
        for part in ("train", "val", "test"):
            list(data.loader(part, 4))
    assert "\n" not in str(caught.value)


def test_grey_and_transparent_images(tmp_path):
    make_pictures(tmp_path)
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (20, 12)).save(tmp_path / "cat" / f"mode {mode}.png")
    data = small(tmp_path)
    assert sum(len(labels) for part in ("train", "val", "test") for _, labels in data.loader(part, 4)) == 20


def test_plain_training_images_in_their_order(pictures):
    data = small(pictures, augment=False)
    loader = data.loader("train", 8, shuffle=False)
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [label for _, label in data.train.samples] == sorted(labels.tolist())
    loader.start_epoch(1)
    again = data.loader("train", 8, shuffle=False, seed=5)
    assert all(torch.equal(one, two) for (one, _), (two, _) in zip(loader, again, strict=True))


@pytest.mark.parametrize("call", ["scandir", "listdir"])
def test_forbidden_folder(tmp_path, monkeypatch, call):
    make_pictures(tmp_path)
    (tmp_path / "cat" / "deep").mkdir()
    secret = tmp_path / "cat" / "deep" if call == "scandir" else tmp_path  # root may read all, so the system must lie

    def guarded(path="."):
        if str(path) == str(secret):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return genuine(path)

    genuine = getattr(os, call)
    monkeypatch.setattr(os, call, guarded)
    with pytest.raises(PermissionError, match="cannot be read") as caught:
        small(tmp_path)
    assert str(caught.value) == f"the folder of images {tmp_path} cannot be read: no permission for {secret}"


def test_the_order_is_that_of_torchvision(tmp_path):
    make_pictures(tmp_path)
    make_pictures(tmp_path / "cat", classes=("b-c", "b"), count=2)
    (tmp_path / "cat" / "Z.JPG").write_bytes(b"")
    (tmp_path / "cat" / "notes.txt").touch()
    expected = make_dataset(str(tmp_path), {"cat": 0, "dog": 1}, extensions=IMG_EXTENSIONS)
    assert folders._samples(tmp_path, ("cat", "dog")) == [(Path(path), label) for path, label in expected]
