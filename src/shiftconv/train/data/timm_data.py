"""Data sets by timm's prefixes: hfds/, hfids/ (Hugging Face), wds/ (WebDataset), tfds/ (TensorFlow) and torch/.

hfds/ and torch/ are read image by image, as folders are. The others are streams; see ``stream``.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset  # pyright: ignore[reportPrivateImportUsage]

from shiftconv.train.data import transforms
from shiftconv.train.data.images import Pictures, in_rgb
from shiftconv.train.data.pixels import Look
from shiftconv.train.data.stream import StreamImages
from shiftconv.train.settings import Data

PACKAGES = {
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "wds": ("webdataset",),
    "tfds": ("tensorflow_datasets", "tensorflow"),
    "torch": (),
}
SYNONYMS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}  # timm's


@dataclass(frozen=True)
class TimmData:
    """Training and validation images, and the names of the classes, numbers where they have no names."""

    train: "TimmImages | StreamImages"
    val: "TimmImages | StreamImages"
    class_names: tuple[str, ...]


class TimmImages(Pictures):
    """Pictures that timm finds by their number.

    Args:
        get: from a number to a picture, or an open file of one, and its class.
        count: how many there are.
        name: what to call them in messages.
        transform: as of ``Pictures``.
        draws: as of ``Pictures``.
    """

    def __init__(
        self,
        get: Callable[[int], tuple[Any, Any]],
        count: int,
        name: str,
        transform: Look,
        draws: bool,
    ) -> None:
        super().__init__(transform, draws)
        self.get, self.count, self.name = get, count, name

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.get(index)
        if not isinstance(image, Image.Image):
            with image, Image.open(image) as file:
                image = in_rgb(file)
        if label is None or int(label) < 0:
            raise ValueError("it has no label")
        return in_rgb(image), int(label)

    def where(self, index: int) -> Path:
        return Path(self.name, f"number {index}")


def open_timm(data: Data, size: int) -> TimmData:
    """Open the training and the validation part of a data set by timm's name.

    Args:
        data: the settings; their name has one of timm's prefixes.
        size: side of the served images.

    Raises:
        ModuleNotFoundError: without the package that reads it; says how to install it.
        FileNotFoundError: if it is not there and cannot be downloaded.
        ValueError: for an unknown name or part, columns that are no images and classes, unknown classes, or parts with
            different classes.
    """
    prefix = data.name.partition("/")[0]
    missing = [package for package in PACKAGES[prefix] if find_spec(package) is None]
    if missing:
        what = " and ".join(missing)
        raise ModuleNotFoundError(
            f"data.name {data.name!r} needs {what}, not installed here: pip install {' '.join(missing)}",
            name=missing[0],
        )
    if prefix == "wds":
        _check_shards(data)
    parts: list[Any] = []
    names: list[tuple[str, ...]] = []
    for split, training in ((data.train_split, True), (data.val_split, False)):
        opened = _create(data, prefix, split, training)
        change = training and data.augment
        transform = (transforms.to_train if change else transforms.to_evaluate)(data, size)
        where = f"{data.name} {split}"
        names.append(_class_names(data, prefix, opened))
        if prefix == "torch":
            parts.append(TimmImages(opened.__getitem__, len(opened), where, transform, change))
        elif prefix == "hfds":
            parts.append(TimmImages(opened.reader.__getitem__, len(opened.reader), where, transform, change))
        else:
            parts.append(StreamImages(opened.reader, prefix, where, transform, change, len(names[-1])))
    if names[0] != names[1]:
        raise ValueError(
            f"the parts of a data set must have the same classes, but those of {data.name} have {len(names[0])} and "
            f"{len(names[1])} classes, or others"
        )
    return TimmData(parts[0], parts[1], names[0])


def _check_shards(data: Data) -> None:
    assert data.folder is not None  # Data has checked it
    remote = "://" in data.folder or data.folder.startswith("pipe:")
    if not remote and not Path(data.folder).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder of shards {Path(data.folder).expanduser().absolute()}")
    if data.bad_images == "stop":
        raise ValueError("a stream of shards passes over training images that cannot be read; set data.bad_images skip")


def _create(data: Data, prefix: str, split: str, training: bool) -> Any:
    root = data.folder if data.folder is None or "://" in data.folder else str(Path(data.folder).expanduser())
    arguments: dict[str, Any] = {}
    if prefix in ("hfds", "hfids"):
        arguments = _columns(data, root)
    if prefix == "torch":
        root = root or "data"
        _check_folder(data, root, split)
    try:
        with redirect_stdout(io.StringIO()):  # downloads tell it all
            return create_dataset(
                data.name,
                root=root,
                split=split,
                is_training=training,
                download=prefix in ("torch", "tfds"),
                **arguments,
            )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{data.name} is not there: {_line(error)}") from None
    except OSError as error:
        raise FileNotFoundError(f"{data.name} is not there and could not be downloaded: {_line(error)}") from None
    except (AssertionError, KeyError, RuntimeError, ValueError, TypeError) as error:
        hint = ""
        if prefix == "wds":
            hint = " (a part is named in _info.json, or written as name-{0000..0099}.tar|COUNT)"
        elif prefix in ("hfds", "tfds"):
            hint = " (or take a piece of one, such as train[90%:])"
        which = "data.train_split" if training else "data.val_split"
        raise ValueError(
            f"{data.name} cannot be opened with {which} {split!r}: {_line(error)}; name a part that it has{hint}"
        ) from None


def _check_folder(data: Data, root: str, split: str) -> None:
    """Without a folder of the part, timm would take all images for it."""
    if data.name.lower().split("/")[1] not in ("image_folder", "folder"):
        return
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder of images {Path(root).absolute()}")
    known = next((names for names in SYNONYMS.values() if split in names), ())
    if not any(Path(root, name).is_dir() for name in (split, *known)):
        raise ValueError(f"the folder {root} has no sub-folder {split}, the part that {data.name} was asked for")


def _columns(data: Data, root: str | None) -> dict[str, str]:
    """Which columns of a Hugging Face data set hold the images and the classes, as timm's arguments."""
    import datasets

    name = data.name.partition("/")[2]
    try:
        features = datasets.load_dataset_builder(name, cache_dir=root).info.features
        if features is None:  # known only when it is prepared
            found = datasets.load_dataset(name, cache_dir=root)
            features = next(iter(found.values())).features  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, nothing that it can read
        raise FileNotFoundError(f"{data.name} is not there and could not be downloaded: {_line(error)}") from None
    chosen: dict[str, str] = {}
    for key, usual, kind in (("input_key", "image", datasets.Image), ("target_key", "label", datasets.ClassLabel)):
        fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
        if usual in features or len(fitting) == 1:
            chosen[key] = usual if usual in features else fitting[0]
        else:
            what = f"no column {usual!r} and {len(fitting) or 'no'} columns of kind {kind.__name__}"
            raise ValueError(f"{data.name} has {what}, but it must be clear which one to take; it has {list(features)}")
    return chosen


def _class_names(data: Data, prefix: str, opened: Any) -> tuple[str, ...]:
    """The classes as the data set tells them, or as many numbers as it has classes."""
    if prefix == "torch":
        names = getattr(opened, "classes", None) or getattr(opened, "all_categories", None)
        if names is None:
            raise ValueError(f"{data.name} does not tell its classes")
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)
    reader = opened.reader
    if reader.class_to_idx:
        return tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
    if prefix == "wds":
        names, count = reader.info.get("class_names"), reader.info.get("num_classes")
        if isinstance(names, list | tuple) and names:
            return tuple(map(str, names))
        if isinstance(count, int) and count > 0:
            return tuple(map(str, range(count)))
        raise ValueError(f'{data.name} does not tell its classes: add "num_classes": COUNT to {data.folder}/_info.json')
    if prefix == "hfds":
        labels = reader.dataset.unique(reader.label_key)
        if all(isinstance(label, int) for label in labels):
            return tuple(map(str, range(max(labels) + 1)))
    raise ValueError(f"{data.name} does not tell its classes: its labels must be of kind ClassLabel")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
