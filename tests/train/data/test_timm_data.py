from dataclasses import replace

import pytest
import torch

from shiftconv.train.data import open_data, timm_data
from shiftconv.train.data.share import Share
from shiftconv.train.settings import Data

from ..conftest import make_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with train/ and val/, whose names both torchvision and Hugging Face understand."""
    folder = tmp_path_factory.mktemp("split")
    make_pictures(folder / "train", count=6)
    make_pictures(folder / "validation", count=3)
    return folder


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """Hugging Face's data sets, of a folder and without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield Data(name=f"hfds/{folder}", folder=str(tmp_path / "cache"), image_size=16, workers=0)
    datasets.enable_progress_bars()


def by_folders(folder, **settings):
    return Data(name="torch/image_folder", folder=str(folder), image_size=16, workers=0, **settings)


def test_a_data_set_of_torchvision(folder):
    data = open_data(by_folders(folder))
    assert [len(data.train), len(data.val), data.test] == [12, 6, None]
    assert data.class_names == ("cat", "dog") and data.image_size == 16 and data.skip_bad
    assert open_data(Data(name="torch/image_folder", folder=str(folder))).workers == 2
    images, labels = next(iter(data.loader("val", 8)))
    assert images.shape == (6, 3, 16, 16) and labels.tolist() == [0] * 3 + [1] * 3


def test_it_is_served_as_any_folder(folder):
    settings = dict(folder=str(folder), image_size=16, auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5)
    mine = open_data(Data(name="folder", **settings)).loader("train", 5, seed=3)
    for workers in (0, 2):
        other = open_data(Data(name="torch/image_folder", workers=workers, **settings)).loader("train", 5, seed=3)
        for one, two in zip(mine.steps(), other.steps(), strict=True):
            assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)


def test_a_part_without_a_folder_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match="has no sub-folder holdout, the part that torch/image_folder was asked for"):
        open_data(by_folders(folder, val_split="holdout"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder of images .*nowhere"):
        open_data(by_folders(tmp_path / "nowhere"))


def test_unknown_name(folder):
    with pytest.raises(
        ValueError, match=r"torch/cifra10 cannot be opened .*Unknown torchvision dataset cifra10"
    ) as caught:
        open_data(Data(name="torch/cifra10", folder=str(folder)))
    assert "\n" not in str(caught.value)


def test_no_network(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm_data, "create_dataset", no_network)
    with pytest.raises(FileNotFoundError, match="torch/mnist is not there and could not be downloaded: no network"):
        open_data(Data(name="torch/mnist", folder=str(tmp_path)))


def test_parts_with_other_classes(tmp_path):
    make_pictures(tmp_path / "train", count=2)
    make_pictures(tmp_path / "val", classes=("cat", "emu"), count=2)
    with pytest.raises(ValueError, match="must have the same classes, but those of torch/image_folder"):
        open_data(by_folders(tmp_path))


def test_label_noise_is_for_data_of_our_own(folder):
    with pytest.raises(ValueError, match=r"data.label_noise works with digits, .*only, got torch/image_folder"):
        open_data(by_folders(folder, label_noise=0.1))


@pytest.mark.parametrize(
    "name, pip", [("hfds/x", "datasets"), ("wds/x", "webdataset"), ("tfds/x", "tensorflow_datasets tensorflow")]
)
def test_a_missing_package_is_told(name, pip, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timm_data, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {pip}$"):
        open_data(Data(name=name, folder=str(tmp_path)))
    assert capsys.readouterr().out == ""  # timm prints


def test_pictures_of_hugging_face(hub, folder):
    data = open_data(hub)
    assert [len(data.train), len(data.val), data.test] == [12, 6, None]
    assert data.class_names == ("cat", "dog")
    mine = open_data(Data(name="folder", folder=str(folder), image_size=16))
    for (a, k), (b, m) in zip(mine.loader("val", 6), data.loader("val", 6), strict=True):
        assert torch.equal(a, b) and torch.equal(k, m)
    labels = sorted(label for step in data.loader("train", 5).steps() for label in step.labels.tolist())
    assert labels == [0] * 6 + [1] * 6


def test_a_missing_part_of_hugging_face_is_told(hub):
    with pytest.raises(ValueError, match=r"data.val_split 'test': .*train\[90%:\]") as caught:
        open_data(replace(hub, val_split="test"))
    assert "\n" not in str(caught.value)
    data = open_data(replace(hub, train_split="train[:75%]", val_split="train[75%:]"))
    assert [len(data.train), len(data.val)] == [9, 3]


def test_the_only_column_of_its_kind_is_taken(tmp_path, hub):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=["a", "b"]))
    picture = {"bytes": (make_pictures(tmp_path / "p", count=1) / "cat" / "0.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"img": [picture] * 3, "fine_label": [0, 1, 1]}, features=features)
    (tmp_path / "table").mkdir()
    for part in ("train", "validation"):
        rows.to_parquet(str(tmp_path / "table" / f"{part}.parquet"))
    data = open_data(replace(hub, name=f"hfds/{tmp_path / 'table'}"))
    assert data.class_names == ("a", "b")
    assert next(iter(data.loader("val", 3)))[1].tolist() == [0, 1, 1]
    rows.rename_column("img", "one").add_column("two", [1, 2, 3]).remove_columns("one").to_parquet(
        str(tmp_path / "table" / "train.parquet")
    )
    (tmp_path / "table" / "validation.parquet").unlink()
    with pytest.raises(ValueError, match=r"no column 'image' and no columns of kind Image.*'fine_label', 'two'"):
        open_data(replace(hub, name=f"hfds/{tmp_path / 'table'}"))


def test_nowhere_to_be_found(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hfds/.*nowhere is not there") as caught:
        open_data(replace(hub, name=f"hfds/{tmp_path / 'nowhere'}"))
    assert "\n" not in str(caught.value)


def test_an_image_without_a_label_cannot_be_read(folder):
    data = open_data(by_folders(folder))
    data.val.get = lambda index, get=data.train.get: (get(index)[0], -1 if index == 1 else 0)
    with pytest.raises(
        ValueError, match="cannot read the image torch/image_folder validation/number 1: it has no label"
    ):
        list(data.loader("val", 6))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_hugging_face(hub, workers):
    pytest.importorskip("datasets").load_dataset(hub.name[5:], cache_dir=hub.folder)  # a local folder tells no numbers
    data = replace(hub, name=f"hfids/{hub.name[5:]}", workers=workers)
    data = open_data(data)
    assert [len(data.train), len(data.val)] == [12, 6]
    labels = [torch.cat([k for _, k in data.loader("val", 4, share=Share(rank, 2))]).tolist() for rank in range(2)]
    assert sorted(labels[0] + labels[1]) == [0, 0, 0, 1, 1, 1]
    steps = list(data.loader("train", 5).steps())
    assert [len(step.labels) for step in steps] == [5, 5, 5]
