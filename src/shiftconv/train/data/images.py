"""Data sets of pictures: in memory as one uint8 tensor, or files on disk. Each serves normalised batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from shiftconv.train.seed import Stream, derive, generator, seeded

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation per channel, of values in 0..1


@dataclass(frozen=True)
class Augment:
    """Random crop after padding with black, and mirroring (Lee et al. 2015, as ShiftResNet trains on CIFAR)."""

    padding: int = 4
    flip: bool = True


@dataclass(frozen=True)
class BadImage:
    """A file that cannot be read. It travels through the loader as a value, for a traceback is no clear message."""

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
        if self.size is not None and tuple(images.shape[-2:]) != (self.size, self.size):
            images = F.resize(images, [self.size, self.size], antialias=True)
        return (images.float() - self.mean) / self.std, self.labels[index]


def _crop(images: Tensor, corners: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Each image's own crop from the images after padding; torchvision would crop the whole ``[B, C, H, W]`` alike."""
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    y, x = torch.arange(height), torch.arange(width)
    x = torch.where(mirrored[:, None], width - 1 - x, x)
    rows, columns = corners[:, :1] + y, corners[:, 1:] + x
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class FileImages(Dataset[tuple[Tensor, int] | BadImage]):
    """Picture files. Random transforms of image ``i`` follow from the seed, the epoch and ``i``, whoever reads it.

    Args:
        samples: path and class of each picture.
        transform: from a PIL picture in RGB to a normalised float32 tensor ``[3, H, W]``.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples, self.transform = list(samples), transform
        self.start_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.samples)

    def start_epoch(self, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImage:
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that PIL raises
            return BadImage(path, str(error) or type(error).__name__)
        with seeded(derive(self.seed, Stream.AUGMENT, self.epoch, index)):
            return self.transform(image), label


Images = MemoryImages | FileImages
