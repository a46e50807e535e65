"""Data sets that can only be read from the front: shards of tar files, downloads.

Timm's readers deal the shards out to ranks and their workers, and shuffle shards and images of a buffer. So, other
than with data sets that are read image by image, the order depends on the numbers of ranks and workers; with the same
ones it follows from the seed and the epoch.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shiftconv.train.data.images import BadImage, drawing, in_rgb
from shiftconv.train.data.loader import as_it_is, collate
from shiftconv.train.data.pixels import Look, Patch, Sample
from shiftconv.train.data.serving import PREFETCH, Batch, MicroBatch, Served, Serving
from shiftconv.train.data.share import ALL, Share, deal
from shiftconv.train.seed import Stream, derive, generator


class StreamImages:
    """What a stream serves.

    Args:
        reader: timm's, not yet read from.
        kind: wds, hfids or tfds.
        name: what to call the images in messages.
        transform: what a network sees of them.
        draws: whether the transform draws random numbers.
        classes: how many there are.
    """

    def __init__(self, reader: Any, kind: str, name: str, transform: Look, draws: bool, classes: int) -> None:
        self.reader, self.kind, self.name = reader, kind, name
        self.transform, self.draws, self.classes = transform, draws, classes

    def __len__(self) -> int:
        return self.reader.num_samples

    def shards(self) -> int | None:
        """How many shards there are to deal out, if that is known."""
        if self.kind == "wds":
            return len(self.reader.split_info.filenames)
        if self.kind == "hfids":
            return self.reader.builder.as_streaming_dataset(split=self.reader.split).num_shards
        return None


class StreamLoader(Serving):
    """As ``Loader``, of a stream. Every update is full: an epoch goes on at the front where images are missing.

    Training gives every rank as many images as the others. Resuming within an epoch reads what was done once more.
    Evaluation serves each image once; its batches may be smaller where a shard ends.

    Args:
        images: what to serve.
        batch_size: images per update on all ranks together, at least 1.
        training: shuffled and without end, or each image once.
        workers: as of ``Serving``; no more than there are shards for.
        seed: what orders and random transforms follow from.
        device: as of ``Serving``; images are normalised on it.
        share: as of ``Serving``.

    Raises:
        ValueError: for a batch size below 1, if there are no images, or fewer shards than ranks to train.
    """

    def __init__(
        self,
        images: StreamImages,
        batch_size: int,
        *,
        training: bool,
        workers: int = 0,
        seed: int = 0,
        device: torch.device | None = None,
        share: Share = ALL,
    ) -> None:
        super().__init__(batch_size, workers=workers, device=device, share=share)
        if len(images) == 0:
            raise ValueError("there is not one image to load")
        shards = images.shards()
        if shards is not None:
            if training and shards < share.world:
                raise ValueError(f"{images.name} has {shards} shards, too few for {share.world} processes")
            self.workers = min(workers, max(1, shards // share.world))
        self.images, self.training, self.seed = images, training, seed

    @property
    def images_per_epoch(self) -> int:
        return len(self.images)

    def steps(self, first: int = 0) -> Iterator[MicroBatch]:
        self.check_first(first)
        pieces = list(deal(range(self.updates * self.batch_size), self.batch_size, self.share))
        sizes = [len(piece.indices) for piece in pieces]
        done = len(pieces) * first // max(1, self.updates)

        def cut(served: Iterator[Served], more: int) -> Iterator[Served]:
            return _cut(served, sizes[done + more :], sum(sizes[: done + more]))

        batches = self.serve(lambda _: self._read_from_front(sum(sizes), max(sizes)), cut)
        for piece, (images, labels) in zip(pieces[done:], batches, strict=True):
            yield MicroBatch(images, labels, piece.share, piece.ends)

    def __iter__(self) -> Iterator[Batch]:
        if self.training:
            return ((images, labels) for images, labels, _, _ in self.steps())
        return self._evaluate()

    def _evaluate(self) -> Iterator[Batch]:
        count, batches = 0, self.serve(lambda _: self._read_from_front(None, self.micro_batch), _drop)
        for images, labels in batches:
            count += len(labels)
            yield images, labels
        wanted = self._expected()
        if wanted is not None and count < wanted:
            what = f"only {count} of {wanted} images of {self.images.name} can be read"
            raise ValueError(f"{what}; replace or remove the others, or correct the number in _info.json")

    def finish(self, images: Tensor, erased: Sequence[list[Patch]]) -> Tensor:
        return self.images.transform.finish(images, erased, self.device)

    def _expected(self) -> int | None:
        """Images that this rank must read, where the shards tell how many they have; timm passes over bad ones."""
        lengths = self.images.reader.split_info.shard_lengths if self.images.kind == "wds" else ()
        if not lengths:
            return None
        each = max(1, self.workers)
        mine = range(self.share.rank * each, (self.share.rank + 1) * each)
        return sum(length for shard, length in enumerate(lengths) if shard % (each * self.share.world) in mine)

    def _read_from_front(self, count: int | None, chunk: int) -> DataLoader[Any]:
        each = None if count is None else -(-count // (max(1, self.workers) * chunk)) * chunk
        return DataLoader(
            _Chunks(self.images, (self.share.rank, self.share.world), each, chunk, (self.seed, self.epoch)),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=as_it_is,
            pin_memory=self.pin,
            generator=generator(self.seed, Stream.WORKERS, self.epoch),
            prefetch_factor=max(2, PREFETCH // chunk) if self.workers else None,
        )


class _Chunks(IterableDataset[Served]):
    """Batches of ``chunk`` images that one worker of one rank reads, ``count`` images or one pass over its shards."""

    def __init__(
        self, images: StreamImages, place: tuple[int, int], count: int | None, chunk: int, seeds: tuple[int, int]
    ) -> None:
        self.images, self.place, self.count, self.chunk, self.seeds = images, place, count, chunk, seeds

    def __iter__(self) -> Iterator[Served]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        number = self.place[0] * workers + worker
        samples: list[Sample] = []
        for index, (image, label) in enumerate(self._reader(number, workers)):
            if not 0 <= int(label) < self.images.classes:
                reason = f"its label is {label}, but there are {self.images.classes} classes"
                yield Served(None, [BadImage(Path(self.images.name), reason)])
                return
            with drawing(*self.seeds, number, index) if self.images.draws else nullcontext():
                samples.append(Sample(*self.images.transform.pixels(in_rgb(image)), int(label)))
            if len(samples) == self.chunk:
                yield collate(samples)
                samples = []
            if index + 1 == self.count:
                break
        if samples:
            yield collate(samples)

    def _reader(self, number: int, workers: int) -> Any:
        """A fresh reader, for a used one goes on where it was; it finds this rank and this worker as timm would."""
        reader = copy.copy(self.images.reader)
        seed, epoch = self.seeds
        reader.set_epoch(epoch)
        reader.common_seed = seed
        reader.worker_seed = derive(seed, Stream.WORKERS, epoch, number)
        rank, world = self.place
        if self.images.kind == "wds":  # to it ranks are workers, else it would repeat images to evaluate
            reader.worker_info, reader.num_workers = True, world * workers
            reader.global_worker_id, reader.global_num_workers = number, world * workers
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        else:
            reader.dist_rank, reader.dist_num_replicas = rank, world
        if self.count is not None:
            reader.num_samples, reader.batch_size = self.count * world * workers, 1
        return reader


def _drop(served: Iterator[Served], batches: int) -> Iterator[Served]:
    for number, batch in enumerate(served):
        if number >= batches:
            yield batch


def _cut(served: Iterator[Served], sizes: list[int], passed: int) -> Iterator[Served]:
    """Batches of these sizes, after so many images that are passed over."""
    kept: list[_Part] = []
    held = 0
    for size in sizes:
        while held < size:
            chunk = next(served, None)
            if chunk is None:
                raise ValueError("the stream ended before the epoch did; its shards have no images")
            if chunk.batch is None:
                yield chunk
                continue
            part = _Part(*chunk.batch, chunk.erased)
            over = min(passed, len(part.labels))
            passed -= over
            if over < len(part.labels):
                kept.append(part.cut(slice(over, None)))
                held += len(kept[-1].labels)
        whole = kept[0] if len(kept) == 1 else _joined(kept)
        images, labels, erased = whole.cut(slice(size))
        yield Served((images, labels), [], erased)
        kept, held = ([whole.cut(slice(size, None))] if held > size else []), held - size


class _Part(NamedTuple):
    """Images that follow one another, their labels, and what is to be erased of each."""

    images: Tensor
    labels: Tensor
    erased: Sequence[list[Patch]]

    def cut(self, part: slice) -> "_Part":
        return _Part(self.images[part], self.labels[part], self.erased[part])


def _joined(parts: list[_Part]) -> _Part:
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    return _Part(images, labels, [patches for part in parts for patches in part.erased])
