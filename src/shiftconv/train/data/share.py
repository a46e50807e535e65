"""Who computes which images of an update: ranks side by side, and micro-batches one after the other."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from shiftconv.train.checks import flags, integer, optional


@dataclass(frozen=True)
class Share:
    """The part of each update that one process computes.

    Attributes:
        rank: number of this process, from 0.
        world: how many processes train together.
        micro_batch_size: images that are computed at a time, at most (but at least a pair, if mirrored); none: the
            rank's whole part.
        mirrored: image ``i`` of an update of B and image ``B-1-i`` are always in the same micro-batch, in the order in
            which flipping the micro-batch pairs them, as timm's mixup pairs images.
    """

    rank: int = 0
    world: int = 1
    micro_batch_size: int | None = None
    mirrored: bool = False

    def __post_init__(self) -> None:
        integer("world", self.world, 1)
        integer("rank", self.rank, 0)
        if self.rank >= self.world:
            raise ValueError(f"rank must be below the number of processes, {self.world}, got {self.rank}")
        optional(integer, "micro_batch_size", self.micro_batch_size, 1)
        flags("share", mirrored=self.mirrored)

    def accumulation(self, images: int) -> int:
        """Micro-batches of each rank for an update of so many images."""
        if self.micro_batch_size is None:
            return 1
        limit = max(2, self.micro_batch_size // 2 * 2) if self.mirrored else self.micro_batch_size
        return math.ceil(math.ceil(images / self.world) / limit)


ALL = Share()


class Piece(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        indices: its images.
        share: their share of the images of the whole update, over all ranks.
        ends: whether it is the rank's last one of its update.
    """

    indices: list[int]
    share: float
    ends: bool


def deal(order: Sequence[int], batch_size: int, share: Share, first: int = 0) -> Iterator[Piece]:
    """The micro-batches of a rank, from update ``first`` on.

    Each update takes the next ``batch_size`` images of the order, the last one what is left. They are dealt as equally
    as can be, and every rank has as many micro-batches as the others in each update, for collectives must pair. One
    that would be empty repeats the update's first image (or pair) with share 0, so it adds nothing to a gradient.
    With ``share.mirrored`` an odd update leaves out its last image; a single one is paired with itself.

    Args:
        order: the images of the epoch.
        batch_size: images per update on all ranks together.
        share: whose part.
        first: updates that are passed over.
    """
    for start in range(first * batch_size, len(order), batch_size):
        update = list(order[start : start + batch_size])
        count = share.accumulation(len(update))
        if share.mirrored:
            dealt = _pairs(update, count * share.world)
        else:
            dealt = [update[slice(*ends)] for ends in _cuts(len(update), count * share.world)]
        total = sum(map(len, dealt))
        for number in range(count):
            indices = dealt[number * share.world + share.rank]
            spare = [update[0], update[-1]] if share.mirrored else update[:1]
            yield Piece(indices or spare, len(indices) / total, number == count - 1)


def _pairs(update: list[int], parts: int) -> list[list[int]]:
    half = max(1, len(update) // 2)
    front, back = update[:half], (update * 2 if len(update) == 1 else update)[half : 2 * half][::-1]
    return [front[a:b] + back[a:b][::-1] for a, b in _cuts(half, parts)]


def _cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """Start and end of each part of ``range(length)``; the first ones are longer by one where it does not go even."""
    short, longer = divmod(length, parts)
    starts = [number * short + min(number, longer) for number in range(parts + 1)]
    return list(pairwise(starts))
