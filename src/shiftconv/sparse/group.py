"""One mask over the parameters that it prunes together, and the choice of entries that stays exact in every row.

A mask has the first axes of its parameters: of shape ``[O, I, kh, kw]`` it masks single weights, of ``[O, I]`` whole
kernels, of ``[O]`` whole outputs. A member says how its parameter is seen so that the mask's axes come first, and no
rule knows which of them it serves.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter under a mask.

    Args:
        name: its name in the model.
        weight: the parameter.
        axis: which of its axes is the mask's first one.
        chunk: how many neighbours along that axis share an entry.
        inputs_last: see its input channels as the last axis, for patterns among inputs.
        redraw: draw it anew where it is regrown; else it starts from zero. A unit whose inputs and outputs are both
            zero would have no gradient, ever.
    """

    name: str
    weight: nn.Parameter = field(repr=False)
    axis: int = 0
    chunk: int = 1
    inputs_last: bool = False
    redraw: bool = False

    def view(self, value: Tensor) -> Tensor:
        """A tensor of the weight's shape with the axes of the mask in front; shares its memory."""
        if self.axis:
            value = value.transpose(0, self.axis)
        if self.inputs_last:
            value = value.movedim(1, -1)
        return value.unflatten(0, (-1, self.chunk)).movedim(1, -1) if self.chunk > 1 else value

    def spread(self, mask: Tensor) -> Tensor:
        """The mask with axes of length 1 behind it, so that it broadcasts to what :meth:`view` gives."""
        extra = self.weight.ndim + (self.chunk > 1) - mask.ndim
        return mask.view(*mask.shape, *(1,) * extra)

    @torch.no_grad()
    def keep(self, value: Tensor, mask: Tensor) -> None:
        """Set a tensor of the weight's shape to zero, in place, where the mask is not set; also what is not finite.

        On CPUs as a product of its bits with 0 or 1, which has vector instructions: filling takes 8 times as long.
        """
        seen, mask = self.view(value.detach()), self.spread(mask)
        bits = _BITS.get(seen.itemsize) if seen.device.type == "cpu" else None
        if bits is None:
            seen.masked_fill_(~mask, 0)
        else:
            seen.view(bits).mul_(mask.view(torch.int8))

    def sums(self, value: Tensor, ndim: int) -> Tensor:
        """What a tensor of the weight's shape sums up to for each entry of a mask of ``ndim`` axes."""
        seen = self.view(value)
        return seen if seen.ndim == ndim else seen.flatten(ndim).sum(-1)


class SparseGroup:
    """A mask, its members, and in which rows of it the number of active entries is fixed.

    Args:
        name: what reports call it.
        members: the parameters; the mask has the same shape for all.
        shape: of the mask.
        row: entries in each row; None for one row of all of them. Rows are runs of the flattened mask.
        fixed: active entries of each row, where the granularity prescribes them, as 2 in 2:4.
        paths: whether the members are parallel paths, which might have masks of their own.
    """

    def __init__(
        self,
        name: str,
        members: list[Member],
        shape: torch.Size,
        row: int | None = None,
        fixed: int | None = None,
        paths: bool = False,
    ):
        self.name, self.members, self.fixed, self.paths = name, members, fixed, paths
        self.shape, self.size = shape, shape.numel()
        self.row = row or self.size
        seen = members[0].view(members[0].weight.detach())
        like = seen if seen.shape == shape else seen.new_empty(shape)
        self._mask = torch.ones_like(like, dtype=torch.bool)  # laid out as the weights that it masks one by one
        self.explored = torch.zeros_like(self._mask)  # active in any mask that was set
        self.rested = torch.zeros_like(self._mask)  # not active in any of them
        self.reachable: Tensor | None = None  # which entries some output can read; None: all
        self.exchanged = 0  # entries, by the last update

    @property
    def mask(self) -> Tensor:
        """Which entries are active, a bool tensor; set it to change them."""
        return self._mask

    @mask.setter
    def mask(self, value: Tensor) -> None:
        self._mask.copy_(value.view(self.shape))
        self.explored |= self._mask
        self.rested |= ~self._mask

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.size // self.row

    @property
    def capacity(self) -> int:
        """How many entries can be active."""
        return self.size if self.reachable is None else int(self.reachable.sum())

    @property
    def active(self) -> int:
        """How many entries are active."""
        return int(self._mask.sum())

    @property
    def weights(self) -> int:
        """How many weights the mask masks."""
        return sum(member.weight.numel() for member in self.members)

    def apply(self) -> None:
        """Set every weight that is not active to zero."""
        for member in self.members:
            member.keep(member.weight, self._mask)

    def mask_gradients(self) -> None:
        """Set the gradient of every weight that is not active to zero."""
        for member in self.members:
            if member.weight.grad is not None:
                member.keep(member.weight.grad, self._mask)

    def apart(self) -> "list[SparseGroup]":
        """A group for each path, with this mask."""
        each = [SparseGroup(m.name, [m], self.shape, self.row, self.fixed) for m in self.members]
        for group in each:
            group.mask, group.reachable = self.mask, self.reachable
        return each

    def in_rows(self, value: Tensor) -> Tensor:
        """A tensor of the mask's shape as ``[rows, row]``."""
        return value.reshape(-1, self.row)

    def allowed(self) -> Tensor:
        """Which entries may be active, ``[rows, row]``."""
        if self.reachable is None:
            return torch.ones(self.rows, self.row, dtype=torch.bool, device=self._mask.device)
        return self.in_rows(self.reachable)


def highest(score: Tensor, candidates: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """The ``count`` candidates of each row with the highest score; chance decides between equal ones.

    Args:
        score: ``[R, L]``, no NaN.
        candidates: bool, ``[R, L]``.
        count: integers ``[R]``; rows with fewer candidates give all of them.
        generator: on the device of ``score``.

    Returns:
        bool, ``[R, L]``.
    """
    count = torch.minimum(count, candidates.sum(1))
    if len(score) == 1:
        return _highest_of_one(score[0], candidates[0], int(count), generator)[None]
    order = torch.rand(score.shape, generator=generator, device=score.device).argsort(1)
    for key in (score, candidates.to(torch.uint8)):  # by candidacy, then by score, then by chance
        order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))
    chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    return torch.zeros_like(candidates).scatter_(1, order, chosen)


def _highest_of_one(score: Tensor, candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The same for one long row, without sorting it."""
    where = candidates.nonzero()[:, 0]
    if count == len(where):
        return candidates.clone()
    chosen = torch.zeros_like(candidates)
    if count == 0:
        return chosen
    found = score[where]
    last = found.topk(count, sorted=False).values.min()
    above = found > last
    chosen[where[above]] = True
    ties = where[found == last]
    order = torch.randperm(len(ties), generator=generator, device=score.device)
    chosen[ties[order[: count - int(above.sum())]]] = True
    return chosen
