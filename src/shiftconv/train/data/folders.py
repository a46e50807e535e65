"""Any folder of images, its classes named by sub-folders as torchvision's ImageFolder has them."""

from pathlib import Path

from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from shiftconv.train.data.images import FileImages, Normalisation
from shiftconv.train.data.splits import stratified

NORMALISATION: Normalisation = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
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
        ValueError: if a folder has no classes, a class has no (or too few) images, or two parts have different classes.
    """
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


def serve(parts: dict[str, Samples], size: int, *, augment: bool, flip: bool) -> dict[str, FileImages]:
    """The parts as data sets of ``[3, size, size]`` tensors: random resized crops to train on, else the centre."""
    mean, std = NORMALISATION
    centre = create_transform(size, mean=mean, std=std, crop_pct=CROP_SHARE)
    train = create_transform(size, is_training=True, mean=mean, std=std, hflip=0.5 if flip else 0.0)
    return {
        part: FileImages(samples, train if part == "train" and augment else centre)  # pyright: ignore[reportArgumentType]
        for part, samples in parts.items()
    }


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
    index = {name: number for number, name in enumerate(names)}
    found = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(set(range(len(names))) - {label for _, label in found})
    if empty:
        text = ", ".join(str(folder / names[label]) for label in empty)
        raise ValueError(f"no images in {text}; known endings: {' '.join(IMG_EXTENSIONS)}")
    return [(Path(path), label) for path, label in found]


def _split(folder: Path, samples: Samples, shares: tuple[float, ...], names: tuple[str, ...]) -> dict[str, Samples]:
    keys = [path.relative_to(folder).as_posix().encode() for path, _ in samples]
    try:
        indices = stratified(keys, [label for _, label in samples], shares)
    except ValueError as error:
        raise ValueError(f"the folder {folder} cannot be split: {error}; give it train/ and val/ instead") from None
    return {name: [samples[i] for i in part] for name, part in zip(("train", *names), indices, strict=True)}
