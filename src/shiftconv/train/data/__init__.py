"""Opening a data set by its name: digits, cifar10, cifar100, a folder of images, or one that timm reads."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from shiftconv.names import unknown
from shiftconv.train.data import cifar, digits, folders, transforms
from shiftconv.train.data.images import Augment, Images, MemoryImages, Normalisation
from shiftconv.train.data.loader import Loader
from shiftconv.train.data.noise import noisy
from shiftconv.train.data.share import ALL, Share
from shiftconv.train.data.stream import StreamImages, StreamLoader
from shiftconv.train.data.timm_data import open_timm
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
        skip_bad: a training image that cannot be read gives its place to another one.
    """

    name: str
    train: Images | StreamImages
    val: Images | StreamImages
    test: Images | StreamImages | None
    class_names: tuple[str, ...]
    normalisation: Normalisation
    image_size: int
    workers: int = 0
    skip_bad: bool = False

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
        share: Share = ALL,
    ) -> Loader | StreamLoader:
        """Batches of a part. Call its ``start_epoch`` before each epoch of training, which takes its ``steps``.

        To see the plain training images in their order, open the data with ``Data(augment=False)`` and ask for
        ``loader("train", 256, shuffle=False)``.

        Args:
            split: train, val or test.
            batch_size: images per update, on all ranks together.
            shuffle: a new order in each epoch; none: for ``train`` only.
            seed: what orders and random transforms follow from.
            device: where the images go. For a GPU they are read into pinned memory, and pictures are normalised there.
            share: the part of this process, where several train together or updates are accumulated.

        Raises:
            ValueError: for an unknown part, one that this data set has not, or a batch size below 1.
        """
        if split not in get_args(Split):
            raise unknown("split", split, get_args(Split))
        images: Images | StreamImages | None = getattr(self, split)
        if images is None:
            raise ValueError(f"the data set {self.name} has no {split} part")
        shuffle = split == "train" if shuffle is None else shuffle
        if isinstance(images, StreamImages):
            training, workers = shuffle and split == "train", self.workers
            return StreamLoader(
                images, batch_size, training=training, workers=workers, seed=seed, device=device, share=share
            )
        skip_bad = self.skip_bad and shuffle and split == "train"
        return Loader(
            images,
            batch_size,
            shuffle=shuffle,
            workers=self.workers,
            seed=seed,
            device=device,
            share=share,
            skip_bad=skip_bad,
        )


def names() -> list[str]:
    """The names that ``open_data`` knows."""
    return list(OWN_DATA)


def open_data(data: Data | str, folder: str | Path | None = None) -> DataSets:
    """Open a data set.

    Args:
        data: the settings, or just a name: digits, cifar10, cifar100, folder, or one with a prefix of timm's.
        folder: where the images are; overrides the settings' folder.

    Raises:
        ValueError: for an unknown name, or images that cannot be used; names the file or the folder.
        FileNotFoundError: if the data set is not there; says where it was looked for and how to get it.
        ModuleNotFoundError: without the package that reads it; says how to install it.
    """
    if isinstance(data, str):
        data = Data(name=data, folder=None if folder is None else str(folder))
    elif folder is not None:
        data = replace(data, folder=str(folder))
    if data.name == "folder":
        return _open_folder(data)
    if data.name not in OWN_DATA:
        return _open_timm(data)
    return _open_memory(data)


def _open_memory(data: Data) -> DataSets:
    if data.name == "digits":
        source = digits.load(data.val_share)
    else:
        source = cifar.load(data.name, Path(data.folder or "data"), data.val_share)
    flip = source.mirrored_looks_real if data.flip is None else data.flip
    side = source.parts["train"][0].shape[-1]
    automatic = None
    if data.auto_augment is not None:
        automatic = transforms.automatic(data.auto_augment, side, source.normalisation[0])
    augment = Augment(data.crop_padding, flip, automatic, transforms.eraser(data)) if data.augment else None

    def images(split: str) -> MemoryImages:
        change = augment if split == "train" else None
        pixels, labels = source.parts[split]
        if split == "train" and data.label_noise > 0:
            keys, classes = [image.numpy().tobytes() for image in pixels], len(source.class_names)
            labels = torch.tensor(noisy(keys, labels.tolist(), classes, data.label_noise))
        return MemoryImages(pixels, labels, source.normalisation, change, data.image_size)

    return DataSets(
        data.name,
        images("train"),
        images("val"),
        images("test"),
        source.class_names,
        source.normalisation,
        image_size=data.image_size or side,
        workers=data.workers or 0,
    )


def _open_folder(data: Data) -> DataSets:
    assert data.folder is not None  # Data has checked it
    size = data.image_size or 224
    folder = Path(data.folder).expanduser()
    parts, class_names = folders.find(folder, data.val_share)
    if data.label_noise > 0:
        paths, labels = zip(*parts["train"], strict=True)
        changed = noisy(folders.keys(folder, parts["train"]), labels, len(class_names), data.label_noise)
        parts["train"] = list(zip(paths, changed, strict=True))
    images = folders.serve(parts, data, size)
    return DataSets(
        "folder",
        images["train"],
        images["val"],
        images.get("test"),
        class_names,
        transforms.NORMALISATIONS[data.mean],
        image_size=size,
        workers=2 if data.workers is None else data.workers,
        skip_bad=data.bad_images == "skip",
    )


def _open_timm(data: Data) -> DataSets:
    if data.label_noise > 0:
        raise ValueError(f"data.label_noise works with {', '.join(OWN_DATA)} only, got {data.name}")
    size = data.image_size or 224
    parts = open_timm(data, size)
    return DataSets(
        data.name,
        parts.train,
        parts.val,
        None,
        parts.class_names,
        transforms.NORMALISATIONS[data.mean],
        image_size=size,
        workers=2 if data.workers is None else data.workers,
        skip_bad=data.bad_images == "skip",
    )
