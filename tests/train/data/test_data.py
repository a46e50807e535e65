import hashlib
import pickle
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from shiftconv.train.data import cifar, names, open_data
from shiftconv.train.settings import Data


def digest(images):
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


def test_digits_split_is_stratified(digits):
    assert [len(part) for part in (digits.train, digits.val, digits.test)] == [1259, 179, 359]
    for part, share in ((digits.train, 0.7), (digits.val, 0.1), (digits.test, 0.2)):
        counts = torch.bincount(part.labels)
        assert (counts / len(part) - 0.1).abs().max() < 0.006
        assert abs(len(part) / 1797 - share) < 0.002


def test_digits_split_and_pixels_are_fixed(digits):
    assert digest(digits.test.images) == "42418ac9ec9e3b4d"
    assert digest(digits.val.images) == "102d1f371e965c38"
    assert digest(digits.train.images) == "fb2e95046846461c"


def test_digits_split_is_independent_of_the_order(monkeypatch, digits):
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    monkeypatch.setattr(datasets, "load_digits", lambda return_X_y: (images[order], labels[order]))

    def pixels(part):
        return {image.numpy().tobytes() for image in part.images}

    assert pixels(open_data("digits").test) == pixels(digits.test)


def test_digits_parts_share_no_image(digits):
    train = {image.numpy().tobytes() for image in digits.train.images}
    assert not any(image.numpy().tobytes() in train for image in digits.test.images)


def test_digits_are_normalised_and_never_mirrored(digits):
    images = digits.train.images / 255
    assert images.shape[1:] == (3, 32, 32)
    assert images.mean().item() == pytest.approx(digits.normalisation[0][0], abs=1e-4)
    assert images.std().item() == pytest.approx(digits.normalisation[1][0], abs=1e-4)
    assert digits.train.augment is not None and not digits.train.augment.flip
    assert digits.val.augment is None and digits.test.augment is None
    assert open_data(Data(augment=False)).train.augment is None
    assert digits.class_names == tuple("0123456789")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "shiftconv\[demo\]"'):
        open_data("digits")


def test_names():
    assert names() == ["digits", "cifar10", "cifar100", "folder"]
    with pytest.raises(ValueError, match="unknown data set 'cifar-10'; did you mean 'cifar10'"):
        open_data("cifar-10")


def test_unknown_split(digits):
    with pytest.raises(ValueError, match="unknown split 'tset'; did you mean 'test'"):
        digits.loader("tset", 8)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """CIFAR-10 of 40 + 10 images in the genuine format."""
    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, values):
        (folder / name).write_bytes(pickle.dumps(values))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count):
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(40))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(10))])
    name, md5 = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


def test_cifar_validates_on_training_images(small_cifar):
    data = open_data("cifar10", small_cifar)
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 10]
    assert torch.bincount(data.val.labels).tolist() == [1] * 10
    with (small_cifar / "cifar-10-batches-py/data_batch_1").open("rb") as file:
        pixels = pickle.load(file)["data"].reshape(-1, 3, 32, 32)
    known = {image.tobytes() for image in pixels}
    assert all(image.numpy().tobytes() in known for part in (data.train, data.val) for image in part.images)
    assert data.train.augment.flip and data.train.augment.padding == 4
    assert data.class_names[3] == "class 3"


def test_cifar_folder_itself(small_cifar):
    assert len(open_data("cifar10", small_cifar / "cifar-10-batches-py").test) == 10


def test_cifar_damaged(small_cifar):
    path = small_cifar / "cifar-10-batches-py/data_batch_1"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged"):
        open_data("cifar10", small_cifar)


def test_cifar_offline(tmp_path, monkeypatch):
    def no_network(self):
        raise URLError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"not in .*cifar-100-python.* no network.*digits works offline"
    ) as caught:
        open_data("cifar100", tmp_path / "new" / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / "data").exists()


def test_cifar_download_is_moved_when_whole(small_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(
        CIFAR10, "download", lambda self: (small_cifar / self.base_folder).rename(f"{self.root}/{self.base_folder}")
    )
    assert len(open_data("cifar10", tmp_path / "elsewhere").test) == 10
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["cifar-10-batches-py"]


def test_cifar_classes():
    assert cifar.CLASSES == {"cifar10": CIFAR10, "cifar100": CIFAR100}
