"""Any folder of images, its classes named by sub-folders as torchvision's ImageFolder has them."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from shiftconv.train.data import transforms
from shiftconv.train.data.images import FileImages
from shiftconv.train.data.splits import stratified
from shiftconv.train.settings import Data

CROP_SHARE = 0.875  # the centre of a validation image that is looked at, as 224 of 256 pixels
TEST_SHARE = 0.1
LAYOUT = "it needs train/ and val/ with one sub-folder of images per class in each, or one sub-folder per class"

Samples = list[tuple[Path, int]]


def find(folder: Path, val_share: float = 0.1) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """Paths and classes of the parts ``train``, ``val`` and perhaps ``test``, and the names of the classes.

    With a sub-folder train/ the parts are the sub-folders; a missing val/ (or validation/) is cut from the training
    images, a missing test/ means that there is no test part. Otherwise every sub-folder is a class, and the images are
    split into train, val and test, stratified and fixed by their paths below the folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        PermissionError: if it, or a folder in it, must not be read; names both.
        ValueError: if a folder has no classes, a class has no (or too few) images, or two parts have different classes.
    """
    try:
        return _find(folder, val_share)
    except PermissionError as error:
        what = f"the folder of images {folder} cannot be read: no permission for {error.filename or folder}"
        raise PermissionError(what) from None


def _find(folder: Path, val_share: float) -> tuple[dict[str, Samples], tuple[str, ...]]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder of images {folder.absolute()}: {LAYOUT}; the data set digits works offline"
        )
    here = {"train": folder / "train", "val": folder / "val", "test": folder / "test"}
    if not here["val"].is_dir():
        here["val"] = folder / "validation"
    if not here["train"].is_dir():
        if here["val"].is_dir():
            raise ValueError(f"the folder {folder} has {here['val'].name}/ but no train/: {LAYOUT}")
        names = _classes(folder)
        return _split(folder, _samples(folder, names), (TEST_SHARE, val_share), ("test", "val")), names
    names = _classes(here["train"])
    parts = {"train": _samples(here["train"], names)}
    for part in ("val", "test"):
        if here[part].is_dir():
            _same_classes(here["train"], names, here[part])
            parts[part] = _samples(here[part], names)
    if "val" not in parts:
        parts |= _split(folder, parts["train"], (val_share,), ("val",))
    return parts, names


def serve(parts: dict[str, Samples], data: Data, size: int) -> dict[str, FileImages]:
    """The parts as data sets of ``[3, size, size]`` tensors: changed at random to train on, else the centre.

    Raises:
        ValueError: for an augmentation that timm does not know.
    """
    centre = transforms.to_evaluate(data, size)
    served = {part: FileImages(samples, centre, draws=False) for part, samples in parts.items()}
    if data.augment:
        served["train"] = FileImages(parts["train"], transforms.to_train(data, size))
    return served


def keys(folder: Path, samples: Samples) -> list[bytes]:
    """What identifies each image, wherever the folder is: its path below it."""
    return [path.relative_to(folder).as_posix().encode() for path, _ in samples]


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not names:
        raise ValueError(f"the folder {folder} has no sub-folders: {LAYOUT}")
    return names


def _same_classes(train: Path, names: tuple[str, ...], folder: Path) -> None:
    others = _classes(folder)
    if names != others:
        missing, surplus = sorted(set(names) - set(others)), sorted(set(others) - set(names))
        facts = [f"{folder} lacks {', '.join(missing)}"] * bool(missing)
        facts += [f"{train} lacks {', '.join(surplus)}"] * bool(surplus)
        raise ValueError(f"the parts of a data set must have the same classes, but {' and '.join(facts)}")


def _samples(folder: Path, names: tuple[str, ...]) -> Samples:
    samples: Samples = []
    empty: list[str] = []
    for label, name in enumerate(names):
        found = _images(folder / name)
        samples += [(path, label) for path in found]
        empty += [str(folder / name)] * (not found)
    if empty:
        raise ValueError(f"no images in {', '.join(empty)}; known endings: {' '.join(IMG_EXTENSIONS)}")
    return samples


def _images(folder: Path) -> list[Path]:
    """The images below a folder, in the order of torchvision's ImageFolder, which passes over what it may not read."""

    def stop(error: OSError) -> None:
        raise error

    walk = sorted(os.walk(folder, onerror=stop, followlinks=True))
    paths = [Path(top, name) for top, _, names in walk for name in sorted(names)]
    return [path for path in paths if path.name.lower().endswith(IMG_EXTENSIONS)]


def _split(folder: Path, samples: Samples, shares: tuple[float, ...], names: tuple[str, ...]) -> dict[str, Samples]:
    try:
        indices = stratified(keys(folder, samples), [label for _, label in samples], shares)
    except ValueError as error:
        raise ValueError(f"the folder {folder} cannot be split: {error}; give it train/ and val/ instead") from None
    return {name: [samples[i] for i in part] for name, part in zip(("train", *names), indices, strict=True)}
