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
    """Around the update of an average: entries that were zero take the weight itself, inactive ones become zero.

    Args:
        average: the averaged copy of the model, whose parameters have the same names.
        groups: the masks.

    Raises:
        ValueError: for a parameter that the average does not have.
    """
    found = {_bare(name): parameter for name, parameter in average.named_parameters()}
    pairs: list[tuple[SparseGroup, Member, Tensor, Tensor]] = []
    for group in groups:
        for member in group.members:
            copy = found.get(_bare(member.name))
            if copy is None or copy.shape != member.weight.shape:
                raise ValueError(f"the average has no parameter {member.name} {[*member.weight.shape]}")
            pairs.append((group, member, copy.detach(), copy.detach() == 0))
    yield
    with torch.no_grad():
        for group, member, copy, was_zero in pairs:
            copy.copy_(torch.where(was_zero, member.weight.to(copy), copy))
            member.keep(copy, group.mask.to(copy.device))


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
