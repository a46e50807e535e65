"""Where a shift-wise convolution puts its small kernels, and which channels it leaves alone.

All of it is drawn from generators of their own, seeded as the originals seed torch and NumPy: the tables are theirs,
and no other draw of the program moves.

Source: Li et al., "ShiftwiseConv", CVPR 2025, arXiv:2401.12736, sections 3.2 and 3.3; its code, versions 1 and 2.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.ops.compose import slot_offset
from shiftconv.ops.sampling import format_of

Order = Literal["shuffled", "ordered"]
Small = Literal["pick", "square", "own"]
Coefficient = Literal["none", "linear", "sigmoid"]
Border = Literal["full", "same"]


@dataclass(frozen=True)
class ShiftwiseVariant:
    """What tells the published shift-wise convolutions apart; ``dataclasses.replace`` makes others of them.

    Args:
        wide: ``shuffled``: the wide kernel holds the small ones in random orders, ``num_shifts`` of them added;
            ``ordered``: in their own order.
        tall: the same of the tall kernel.
        small: ``pick``: one random small kernel per shift; ``square``: nine random ones in a square (four in its
            corners if there are no more than nine, one in its middle if there are not even four); ``own``: a kernel of
            its own, if it is smaller than the large one.
        separate: whether the tall kernel has weights of its own; else it shares those of the wide one.
        coefficient: of each placed kernel: ``none``, ``linear`` learned ones that start at 1, or ``sigmoid`` of learned
            ones, one per small kernel, which are spread over [-1, 1] at first.
        constants: whether a number per shifted map is added where the map lies ("embedding"); a buffer.
        identity: whether the input is added.
        total_norm: whether the sum of the branches is normalised once more.
        border: ``full``: what a small kernel computes beyond the border of the map counts (padding k - 1), so that all
            is a convolution; ``same``: only the pixels of the map count (padding k // 2), which runs in activation
            space, slowly.
        even: rounds the number of convolved channels down to an even one, as version 2 of the original does, instead
            of the number of ghosts down, as version 1.
        ghosts_last: whether the convolved channels come first in the output, then the ghosts, as in the originals;
            by default they keep the order of the input.
        seed: of the tables and of the choice of ghosts.

    Raises:
        ValueError: an unknown name, or parts that do not go together.
    """

    wide: Order = "shuffled"
    tall: Order = "shuffled"
    small: Small = "pick"
    separate: bool = False
    coefficient: Coefficient = "none"
    constants: bool = False
    identity: bool = True
    total_norm: bool = False
    border: Border = "full"
    even: bool = False
    ghosts_last: bool = False
    seed: int = 123

    def __post_init__(self):
        for name, kind in (
            *(("wide", Order), ("tall", Order), ("small", Small)),
            *(("coefficient", Coefficient), ("border", Border)),
        ):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        orders = {self.wide, self.tall}
        if (self.separate or self.coefficient == "sigmoid") and (orders != {"ordered"} or self.small != "own"):
            raise ValueError(f"separate weights and sigmoid coefficients need ordered kernels, small='own'; got {self}")
        if self.coefficient == "linear" and (orders != {"shuffled"} or self.small == "own"):
            raise ValueError(f"linear coefficients need shuffled kernels and a small one that shares them, got {self}")
        if self.constants and (orders != {"shuffled"} or self.small != "pick"):
            raise ValueError(f"constants need shuffled kernels and small='pick', got {self}")


_ORDERED = ShiftwiseVariant(wide="ordered", tall="ordered", small="own", identity=False)

VARIANTS: dict[str, ShiftwiseVariant] = {
    "plain": ShiftwiseVariant(),
    "blur": ShiftwiseVariant(small="square"),
    "linear": ShiftwiseVariant(coefficient="linear"),
    "embedding": ShiftwiseVariant(constants=True),
    "shuffled": ShiftwiseVariant(wide="ordered", identity=False, total_norm=True),
    "split": ShiftwiseVariant(wide="ordered", tall="ordered", small="own", separate=True, identity=False),
    "weighted": ShiftwiseVariant(wide="ordered", tall="ordered", small="own", coefficient="sigmoid", identity=False),
}


class Arrangement(NamedTuple):
    """The slot of every small kernel in each arrangement, int32 ``[C, S, R]``, -1 where it is in none.

    The slots of the small kernel are those of its square, row by row, or 0 for the only one.
    """

    wide: Tensor
    tall: Tensor
    small: Tensor


def arrange(variant: ShiftwiseVariant, channels: int, slots: int, shifts: int) -> Arrangement:
    """The tables for ``channels`` of ``slots`` small kernels in ``shifts`` arrangements; always drawn on the CPU."""
    generator = torch.Generator().manual_seed(variant.seed)
    with torch.device("cpu"):
        wide = _orders(variant.wide, channels, slots, shifts, generator)
        tall = _orders(variant.tall, channels, slots, shifts, generator)
        if variant.wide != variant.tall:
            generator.manual_seed(variant.seed)  # as the original with one shuffled branch does
        if variant.small == "pick":
            small = _picks(channels, slots, shifts, generator)
        elif variant.small == "square":
            small = _squares(channels, slots, shifts, generator)
        else:
            small = torch.empty(channels, slots, 0, dtype=torch.int32)
    return Arrangement(wide, tall, small)


def _orders(order: Order, channels: int, slots: int, shifts: int, generator: torch.Generator) -> Tensor:
    """A permutation names the kernel in each slot; the table holds its inverse, the slot of each kernel."""
    if order == "ordered":
        return torch.arange(slots, dtype=torch.int32).view(1, -1, 1).repeat(channels, 1, 1)
    draws = [torch.randperm(slots, generator=generator) for _ in range(shifts * channels)]
    return torch.stack(draws).argsort(1).view(shifts, channels, slots).permute(1, 2, 0).to(torch.int32).contiguous()


def _picks(channels: int, slots: int, shifts: int, generator: torch.Generator) -> Tensor:
    picks = torch.stack([torch.randint(0, slots, (channels,), generator=generator) for _ in range(shifts)], 1)
    table = torch.full((channels, slots, shifts), -1, dtype=torch.int32)
    return table.scatter_(1, picks[:, None], 0)


def _squares(channels: int, slots: int, shifts: int, generator: torch.Generator) -> Tensor:
    """All cells of the square, its corners, or its middle. The original draws from NumPy's global generator."""
    cells = [*range(9)] if slots > 9 else [0, 2, 6, 8] if slots >= 4 else [4]
    table = torch.full((shifts, channels, slots), -1, dtype=torch.int32)
    for row in table.view(-1, slots):
        row[torch.randperm(slots, generator=generator)[: len(cells)]] = torch.tensor(cells, dtype=torch.int32)
    return table.permute(1, 2, 0).contiguous()


def choose_ghosts(channels: int, ratio: float, even: bool = False, seed: int = 123) -> tuple[Tensor, Tensor]:
    """Which channels a shift-wise convolution takes, and which it lets pass, both int64 and rising.

    Args:
        channels: ``C``.
        ratio: the share of ghosts, in [0, 1).
        even: see :class:`ShiftwiseVariant`.
        seed: of the choice.

    Raises:
        TypeError: a ratio that is no number.
        ValueError: a ratio that leaves no channel to convolve.
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool):
        raise TypeError(f"ghost_ratio must be a number, got {ratio!r}")
    if not 0 <= ratio < 1:  # nor NaN
        raise ValueError(f"ghost_ratio must be in [0, 1) and leave channels to convolve, got {ratio}")
    ghosts = channels - int(channels * (1 - ratio)) // 2 * 2 if even else int(channels * ratio)
    if ghosts >= channels:
        raise ValueError(f"ghost_ratio must be in [0, 1) and leave channels to convolve, got {ratio} of {channels}")
    chosen = np.sort(np.random.RandomState(seed).choice(channels, ghosts, replace=False))
    rest = np.setdiff1d(np.arange(channels), chosen)
    return torch.from_numpy(rest.astype(np.int64)), torch.from_numpy(chosen.astype(np.int64))


def sinusoids(positions: int, channels: int) -> Tensor:
    """The constants of the "embedding" variant: ``[channels, positions]``, sines and cosines in turn by channel."""
    channel = torch.arange(channels)[:, None]
    angle = torch.arange(positions) / 10000 ** ((channel - channel % 2) / channels)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


def slot_moves(branch: str, slots: Tensor, columns: int, kernel_size: int, small_kernel_size: int) -> Tensor:
    """How far the maps of the small kernels move down and right to act from ``slots`` ``[C, S, R]`` of a branch.

    As :func:`shiftconv.ops.shift_sum` takes it, ``[R, C * S, 2]``; ``columns`` is the width of the branch in slots.
    """
    long = slot_offset(slots, kernel_size, small_kernel_size)
    if branch == "small":
        cells = (slots.div(columns, rounding_mode="floor"), slots % columns)
        down, right = (torch.where(slots < 0, long, (columns // 2 - cell) * small_kernel_size) for cell in cells)
    else:
        down, right = (long, torch.zeros_like(long)) if branch == "tall" else (torch.zeros_like(long), long)
    return torch.stack((by_way(down), by_way(right)), 2)


def landing(slots: int, size: int, kernel_size: int, small_kernel_size: int, like: Tensor) -> Tensor:
    """Whether the map of a small kernel, moved from its slot, lies on each pixel: ``[slots, size]``, 1 or 0.

    The map is as large as all that the kernel touches, ``size + small_kernel_size - 1``.
    """
    slot = torch.arange(slots, device=like.device)[:, None]
    at = torch.arange(size, device=like.device) - slot_offset(slot, kernel_size, small_kernel_size)
    before = small_kernel_size // 2
    return ((at > before - small_kernel_size) & (at < size + before)).to(like.dtype)


def by_way(table: Tensor) -> Tensor:
    """``[C, S, R]`` as :func:`shiftconv.ops.shift_sum` takes it, ``[R, C * S]``."""
    return table.permute(2, 0, 1).flatten(1)


def select(x: Tensor, channels: Tensor) -> Tensor:
    """``x[:, channels]`` in the memory format of ``x``, which index_select does not keep by itself."""
    if format_of(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
    return x.index_select(1, channels)


def insert(x: Tensor, channels: Tensor, y: Tensor) -> Tensor:
    """A copy of ``x``, in its memory format, whose ``channels`` are ``y``."""
    if format_of(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).index_copy(3, channels, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x.index_copy(1, channels, y)
