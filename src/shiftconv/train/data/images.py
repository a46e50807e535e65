"""Data sets of pictures: in memory as one uint8 tensor, or files on disk. Each serves normalised batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.v2 import functional as F

from shiftconv.train.data.pixels import Look, Normalisation, Sample
from shiftconv.train.seed import Stream, derive, generator, reseed, seeded

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Augment:
    """Random crop after padding with black, and mirroring (Lee et al. 2015, as ShiftResNet trains on CIFAR).

    Attributes:
        padding: black pixels around an image before the crop.
        flip: mirror half of the images.
        automatic: RandAugment or its like, after both; slow, for it takes one image at a time.
        erase: changes a normalised image ``[3, H, W]`` in place, at the end.
    """

    padding: int = 4
    flip: bool = True
    automatic: Callable[[Image.Image], Image.Image] | None = None
    erase: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class BadImage:
    """A picture that cannot be read. It travels through the loader as a value, for a traceback is no clear message."""

    path: Path
    reason: str


class MemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """Pictures in memory. The index is a list: one call augments, resizes and normalises a whole batch.

    What happens to image ``i`` in an epoch follows from the seed, the epoch and ``i`` alone, so it depends neither on
    the batch size nor on the number of workers.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        labels: int64 ``[N]``.
        normalisation: mean and standard deviation per channel.
        augment: what to change at random; none: nothing.
        size: side of the square pictures served, in pixels; none: as they are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalisation: Normalisation,
        augment: Augment | None = None,
        size: int | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in normalisation)
        self.augment, self.size = augment, size
        self.start_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.images)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Draw the crop and the mirroring of every picture for this epoch."""
        self.seed, self.epoch = seed, epoch
        if self.augment is not None:
            draw, n = generator(seed, Stream.AUGMENT, epoch), len(self)
            self.corners = torch.randint(0, 2 * self.augment.padding + 1, (n, 2), generator=draw)
            self.mirrored = torch.rand(n, generator=draw) < 0.5

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch of these indices: float32 ``[B, 3, size, size]``, normalised, and int64 ``[B]``."""
        index = torch.as_tensor(indices)
        images = self.images[index]
        if self.augment is not None:
            images = _crop(images, self.corners[index], self.mirrored[index] & self.augment.flip, self.augment.padding)
            images = self._change(images, index)
        if self.size is not None and tuple(images.shape[-2:]) != (self.size, self.size):
            images = F.resize(images, [self.size, self.size], antialias=True)
        images = (images.float() - self.mean) / self.std
        if self.augment is not None and self.augment.erase is not None:
            for image, number in zip(images, index.tolist(), strict=True):
                with drawing(self.seed, self.epoch, number, 1):  # 0 is for automatic
                    self.augment.erase(image)
        return images, self.labels[index]

    def _change(self, images: Tensor, index: Tensor) -> Tensor:
        if self.augment is None or self.augment.automatic is None:
            return images
        changed = torch.empty_like(images)
        for place, number in enumerate(index.tolist()):
            picture = Image.fromarray(images[place].permute(1, 2, 0).numpy())
            with drawing(self.seed, self.epoch, number):
                changed[place] = F.pil_to_tensor(self.augment.automatic(picture))
        return changed


def _crop(images: Tensor, corners: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Each image's own crop from the images after padding; torchvision would crop the whole ``[B, C, H, W]`` alike."""
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    y, x = torch.arange(height), torch.arange(width)
    x = torch.where(mirrored[:, None], width - 1 - x, x)
    rows, columns = corners[:, :1] + y, corners[:, 1:] + x
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Pictures(Dataset[tuple[Tensor, int] | BadImage], ABC):
    """Pictures that are read one by one. An index gives one as the network sees it, ``read_all`` as it is handed over.

    Random transforms of image ``i`` follow from the seed, the epoch and ``i``, whoever reads it.

    Args:
        transform: what a network sees of them.
        draws: whether the transform draws random numbers.
    """

    def __init__(self, transform: Look, draws: bool = True) -> None:
        self.transform, self.draws = transform, draws
        self.start_epoch(0, 0)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture in RGB, its pixels read, and its class. Raises an OSError or ValueError if it cannot be read."""

    @abstractmethod
    def where(self, index: int) -> Path:
        """The picture's file, or whatever tells which one it is."""

    def start_epoch(self, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImage:
        (sample,) = self.read_all([index])
        if isinstance(sample, BadImage):
            return sample
        return self.transform.finish(sample.pixels[None], [sample.erased])[0], sample.label

    def read_all(self, indices: Sequence[int]) -> list[Sample | BadImage]:
        """These pictures as they are handed over."""
        with untouched() if self.draws else nullcontext():
            return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample | BadImage:
        try:
            image, label = self.read(index)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that PIL raises
            return BadImage(self.where(index), str(error) or type(error).__name__)
        if self.draws:
            reseed(derive(self.seed, Stream.AUGMENT, self.epoch, index), CPU)
        return Sample(*self.transform.pixels(image), label)


class FileImages(Pictures):
    """Picture files.

    Args:
        samples: path and class of each picture.
        transform: as of ``Pictures``.
        draws: as of ``Pictures``.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Look, draws: bool = True) -> None:
        super().__init__(transform, draws)
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with Image.open(path) as file:
            return in_rgb(file), label

    def where(self, index: int) -> Path:
        return self.samples[index][0]


def in_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB, its pixels read; itself where it is, for PIL's ``convert`` would copy it."""
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@contextmanager
def untouched() -> Iterator[None]:
    """Put the global generators back at the end of the block.

    A worker draws nothing else, so there it need not be done, which takes longer than to seed them.
    """
    if get_worker_info() is None:
        with seeded(0):
            yield
    else:
        yield


@contextmanager
def drawing(seed: int, epoch: int, *parts: int) -> Iterator[None]:
    """Let the global generators, from which timm's transforms draw, follow from these numbers."""
    with untouched():
        reseed(derive(seed, Stream.AUGMENT, epoch, *parts), CPU)
        yield


Images = MemoryImages | Pictures
