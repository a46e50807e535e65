"""Opening a data set by its name: digits, cifar10, cifar100, or a folder of images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from shiftconv.names import unknown
from shiftconv.train.data import cifar, digits, folders
from shiftconv.train.data.images import Augment, Images, MemoryImages, Normalisation
from shiftconv.train.data.loader import Loader
from shiftconv.train.settings import OWN_DATA, Data

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class DataSets:
    """The parts of one data set. ``test`` never chooses a model; it is none where the data set has no such part.

    Attributes:
        name: the data set's name.
        train: training images, changed at random if the settings say so.
        val: validation images.
        test: test images, or none.
        class_names: the name of each class, in the order of the labels.
        normalisation: mean and standard deviation per channel, of values in 0..1.
        image_size: side of the served images in pixels.
        workers: processes that read images.
    """

    name: str
    train: Images
    val: Images
    test: Images | None
    class_names: tuple[str, ...]
    normalisation: Normalisation
    image_size: int
    workers: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def loader(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> Loader:
        """Batches of a part. Call its ``start_epoch`` before each epoch of training.

        To see the plain training images in their order, open the data with ``Data(augment=False)`` and ask for
        ``loader("train", 256, shuffle=False)``.

        Args:
            split: train, val or test.
            batch_size: images per batch.
            shuffle: a new order in each epoch; none: for ``train`` only.
            seed: what orders and random transforms follow from.
            device: where the images go; for a GPU they are served from pinned memory.

        Raises:
            ValueError: for an unknown part, one that this data set has not, or a batch size below 1.
        """
        if split not in get_args(Split):
            raise unknown("split", split, get_args(Split))
        images: Images | None = getattr(self, split)
        if images is None:
            raise ValueError(f"the data set {self.name} has no {split} part")
        pin = device is not None and device.type == "cuda"
        shuffle = split == "train" if shuffle is None else shuffle
        return Loader(images, batch_size, shuffle=shuffle, workers=self.workers, seed=seed, pin=pin)


def names() -> list[str]:
    """The names that ``open_data`` knows."""
    return list(OWN_DATA)


def open_data(data: Data | str, folder: str | Path | None = None) -> DataSets:
    """Open a data set.

    Args:
        data: the settings, or just a name: digits, cifar10, cifar100, folder.
        folder: where the images are; overrides the settings' folder.

    Raises:
        ValueError: for an unknown name, or images that cannot be used; names the file or the folder.
        FileNotFoundError: if the data set is not there; says where it was looked for and how to get it.
        ModuleNotFoundError: if digits are asked for without scikit-learn.
    """
    if isinstance(data, str):
        data = Data(name=data, folder=None if folder is None else str(folder))
    elif folder is not None:
        data = replace(data, folder=str(folder))
    if data.name == "folder":
        return _open_folder(data)
    return _open_memory(data)


def _open_memory(data: Data) -> DataSets:
    if data.name == "digits":
        source = digits.load(data.val_share)
    else:
        source = cifar.load(data.name, Path(data.folder or "data"), data.val_share)
    flip = source.mirrored_looks_real if data.flip is None else data.flip
    augment = Augment(data.crop_padding, flip) if data.augment else None

    def images(split: str) -> MemoryImages:
        change = augment if split == "train" else None
        return MemoryImages(*source.parts[split], source.normalisation, change, data.image_size)

    return DataSets(
        data.name,
        images("train"),
        images("val"),
        images("test"),
        source.class_names,
        source.normalisation,
        image_size=data.image_size or source.parts["train"][0].shape[-1],
        workers=data.workers or 0,
    )


def _open_folder(data: Data) -> DataSets:
    assert data.folder is not None  # Data has checked it
    size = data.image_size or 224
    parts, class_names = folders.find(Path(data.folder).expanduser(), data.val_share)
    images = folders.serve(parts, size, augment=data.augment, flip=data.flip is not False)
    return DataSets(
        "folder",
        images["train"],
        images["val"],
        images.get("test"),
        class_names,
        folders.NORMALISATION,
        image_size=size,
        workers=2 if data.workers is None else data.workers,
    )
