"""Averages of sparse weights: as sparse as the weights, and what was regrown does not climb from zero.

Source: the update of SLaK's authors' ``ModelEma``, arXiv:2207.03620.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shiftconv.sparse.group import Member, SparseGroup

_WRAPPERS = ("module.", "_orig_mod.")


@contextmanager
def averaging(average: nn.Module, groups: Sequence[SparseGroup]) -> Generator[None]:
    """Around the update of an average: entries that came back take the weight itself, inactive ones are zero.

    Args:
        average: the averaged copy of the model, whose parameters have the same names.
        groups: the masks.

    Raises:
        ValueError: for a parameter that the average does not have.
    """
    exact = dict(average.named_parameters())
    found = {_bare(name): parameter for name, parameter in exact.items()} | exact
    pairs: list[tuple[SparseGroup, Member, Tensor, Tensor]] = []
    for group in groups:
        for member in group.members:
            copy = found.get(member.name, found.get(_bare(member.name)))
            if copy is None or copy.shape != member.weight.shape:
                raise ValueError(f"the average has no parameter {member.name} {[*member.weight.shape]}")
            pairs.append((group, member, copy.detach(), copy.detach() == 0))
    yield
    with torch.no_grad():
        for group, member, copy, was_zero in pairs:
            rested = member.spread(group.rested).to(copy.device)
            returns = member.view(was_zero) & rested
            seen = member.view(copy)
            seen.copy_(torch.where(returns, member.view(member.weight).to(copy), seen))
            member.keep(copy, group.mask.to(copy.device))


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
