"""Batches of a data set, in an order that follows from the seed and the epoch."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, default_collate

from shiftconv.train.data.images import BadImage, Images, MemoryImages
from shiftconv.train.seed import Stream, generator

Batch = tuple[Tensor, Tensor]


class Loader:
    """Normalised images float32 ``[B, 3, H, W]`` with labels int64 ``[B]``; the last batch may be smaller.

    Args:
        images: what to serve.
        batch_size: images per batch, at least 1.
        shuffle: a new order in each epoch; otherwise the order of the data set.
        workers: processes that read and transform; 0: this one. Changes no number.
        seed: what orders and random transforms follow from.
        pin: serve from pinned memory, from which copies to a GPU are quicker.

    Raises:
        ValueError: for a batch size below 1, or if there are no images.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        shuffle: bool = False,
        workers: int = 0,
        seed: int = 0,
        pin: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) == 0:
            raise ValueError("there is not one image to load")
        self.images, self.batch_size, self.shuffle, self.seed = images, batch_size, shuffle, seed
        self.workers, self.pin = workers, pin
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def start_epoch(self, epoch: int) -> None:
        """From the next iteration on serve the order and the random transforms of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Serve every image once.

        Raises:
            ValueError: if an image cannot be read; names the file.
        """
        self.images.start_epoch(self.seed, self.epoch)
        order = generator(self.seed, Stream.ORDER, self.epoch)
        sampler = RandomSampler(self.images, generator=order) if self.shuffle else SequentialSampler(self.images)
        memory = isinstance(self.images, MemoryImages)
        loader: DataLoader[Any] = DataLoader(
            self.images,
            batch_size=None if memory else self.batch_size,
            sampler=BatchSampler(sampler, self.batch_size, drop_last=False) if memory else sampler,
            num_workers=self.workers,
            collate_fn=None if memory else _collate,
            pin_memory=self.pin,
            generator=generator(self.seed, Stream.WORKERS, self.epoch),
        )
        for batch in _start(loader):
            if isinstance(batch, BadImage):
                raise ValueError(f"cannot read the image {batch.path}: {batch.reason}; replace or remove it")
            yield batch[0], batch[1]


def _collate(samples: list[Any]) -> Any:
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    return bad[0] if bad else default_collate(samples)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    # Python >= 3.12 warns of every fork beside threads; a worker only reads images, in one thread.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        return iter(loader)


def to_device(batch: Batch, device: torch.device, channels_last: bool = False) -> Batch:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, labels = batch
    return images.to(device, non_blocking=True, memory_format=layout), labels.to(device, non_blocking=True)
