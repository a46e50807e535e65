"""Batches of a data set, in an order that follows from the seed and the epoch."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from shiftconv.train.data.images import BadImage, Images, MemoryImages
from shiftconv.train.data.pixels import Patch, Sample
from shiftconv.train.data.serving import PREFETCH, Batch, MicroBatch, Served, Serving
from shiftconv.train.data.share import ALL, Piece, Share, deal
from shiftconv.train.seed import Stream, generator


class Loader(Serving):
    """Normalised images float32 ``[B, 3, H, W]`` with labels int64 ``[B]``; the last batch may be smaller.

    Training takes ``steps``. Iterating serves this rank's part of the images, each once, as evaluation needs it.
    Neither workers nor ranks change what an image looks like, and updates that are done are not read again.

    Args:
        images: what to serve.
        batch_size: images per update on all ranks together, at least 1.
        shuffle: a new order in each epoch; otherwise the order of the data set.
        workers: as of ``Serving``.
        seed: what orders and random transforms follow from.
        device: as of ``Serving``; pictures are normalised on it.
        share: as of ``Serving``.
        skip_bad: the place of an image that cannot be read is taken by the next good one of its micro-batch; otherwise
            it is an error.

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
        device: torch.device | None = None,
        share: Share = ALL,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(batch_size, workers=workers, device=device, share=share, skip_bad=skip_bad)
        if len(images) == 0:
            raise ValueError("there is not one image to load")
        self.images, self.shuffle, self.seed = images, shuffle, seed

    @property
    def images_per_epoch(self) -> int:
        return len(self.images)

    def steps(self, first: int = 0) -> Iterator[MicroBatch]:
        self.check_first(first)
        order = self._order()

        def pieces() -> Iterator[Piece]:
            return deal(order, self.batch_size, self.share, first)

        for piece, (images, labels) in zip(pieces(), self._batches(lambda: (p.indices for p in pieces())), strict=True):
            yield MicroBatch(images, labels, piece.share, piece.ends)

    def __iter__(self) -> Iterator[Batch]:
        order, size = self._order()[self.share.rank :: self.share.world], self.micro_batch
        return self._batches(lambda: (order[start : start + size] for start in range(0, len(order), size)))

    def finish(self, images: Tensor, erased: Sequence[list[Patch]]) -> Tensor:
        if isinstance(self.images, MemoryImages):
            return images
        return self.images.transform.finish(images, erased, self.device)

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.images)))
        return torch.randperm(len(self.images), generator=generator(self.seed, Stream.ORDER, self.epoch)).tolist()

    def _batches(self, lists: Callable[[], Iterator[list[int]]]) -> Iterator[Batch]:
        """The batch of each list of indices."""

        def start(done: int) -> DataLoader[Any]:
            return DataLoader(
                _Batches(self.images),
                batch_size=None,
                sampler=islice(lists(), done, None),  # pyright: ignore[reportArgumentType] - lists are indices here
                num_workers=self.workers,
                collate_fn=as_it_is,
                pin_memory=self.pin,
                generator=generator(self.seed, Stream.WORKERS, self.epoch),
                prefetch_factor=max(2, PREFETCH // self.micro_batch) if self.workers else None,
            )

        self.images.start_epoch(self.seed, self.epoch)
        return self.serve(start, lambda served, _: served)


class _Batches(Dataset[Served]):
    """A data set of lists of indices."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, indices: list[int]) -> Served:
        if isinstance(self.images, MemoryImages):
            return Served(self.images[indices], [])
        return collate(self.images.read_all(indices))


def collate(samples: Sequence[Sample | BadImage]) -> Served:
    """One batch; the next good image, counted round, is in the place of each bad one."""
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    if not good:
        return Served(None, bad)
    filled: list[Sample] = []
    following = good[0]
    for sample in reversed(samples):
        following = following if isinstance(sample, BadImage) else sample
        filled.append(following)
    filled.reverse()
    images, labels = default_collate([(sample.pixels, sample.label) for sample in filled])
    return Served((images, labels), bad, [sample.erased for sample in filled])


def as_it_is(served: Any) -> Any:
    return served
