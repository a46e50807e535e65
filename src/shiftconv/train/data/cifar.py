"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009) by torchvision, which checks every file's MD5 before it reads it."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from os import devnull
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from shiftconv.train.data.images import Normalisation
from shiftconv.train.data.source import Source
from shiftconv.train.data.splits import stratified

CLASSES: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# The values that the ShiftResNet authors use for both.
NORMALISATION: Normalisation = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def load(name: str, folder: Path, val_share: float = 0.1) -> Source:
    """All of CIFAR as uint8 ``[N, 3, 32, 32]``: with the default share 45000 train, 5000 val and 10000 test images.

    The validation images are cut from the training set, stratified and fixed by their pixels.

    Args:
        name: cifar10 or cifar100.
        folder: holds the unpacked download (or is it); filled by a download if it does not.
        val_share: share of the training images to validate on.

    Raises:
        FileNotFoundError: if the files are not there and cannot be downloaded.
        ValueError: if the files are damaged.
    """
    cls, folder = CLASSES[name], folder.expanduser()
    root = folder.parent if folder.name == cls.base_folder else folder
    if not (root / cls.base_folder).is_dir():
        _download(name, root)
    try:
        train, test = cls(str(root), train=True), cls(str(root), train=False)
    except RuntimeError:  # torchvision's word for a missing file or a wrong checksum
        message = f"{name} in {root / cls.base_folder} is incomplete or damaged; remove it to download it again"
        raise ValueError(message) from None
    rest, val = stratified([image.tobytes() for image in train.data], train.targets, (val_share,))
    images, labels = _tensors(train)
    parts = {"train": (images[rest], labels[rest]), "val": (images[val], labels[val]), "test": _tensors(test)}
    return Source(parts, tuple(train.classes), NORMALISATION, mirrored_looks_real=True)


def _tensors(data: CIFAR10) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return images, torch.tensor(data.targets)


def _download(name: str, root: Path) -> None:
    """Download and unpack beside the final place, then move: a broken download leaves nothing behind."""
    cls = CLASSES[name]
    fetch: Callable[..., object] = cls
    created = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        with Path(devnull).open("w") as nowhere, redirect_stdout(nowhere):
            fetch(str(beside), download=True)
        (beside / cls.base_folder).replace(root / cls.base_folder)
    except (OSError, RuntimeError, EOFError) as error:  # no network, a wrong checksum, a truncated archive
        raise FileNotFoundError(
            f"{name} is not in {root / cls.base_folder} and could not be downloaded ({error}); get {cls.url}, unpack "
            f"it in {root}, or name its folder with data.folder; the data set digits works offline"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if created and not any(root.iterdir()):
            root.rmdir()
