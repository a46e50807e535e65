"""What an optimiser keeps of parameters: found for any optimiser, and zero where weights are not active."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shiftconv.sparse.group import SparseGroup


def states(optimizer: Optimizer) -> dict[nn.Parameter, Mapping[str, Any]]:
    """The state of each parameter that has one; the tensors are the optimiser's own.

    By its state dict, whose tensors are no copies, since an optimiser around another one has no state itself.
    """
    saved = optimizer.state_dict()
    order = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_index = dict(zip(order, parameters, strict=True))
    return {by_index[index]: state for index, state in saved["state"].items() if index in by_index}


@torch.no_grad()
def clear(optimizer: Optimizer, groups: Sequence[SparseGroup], keep: Sequence[Tensor]) -> None:
    """Set what is kept of weights outside of ``keep``, a mask for each group, to zero.

    Averages over rows and columns, as those of Adafactor, hold no single weight, and stay.
    """
    found = states(optimizer)
    for group, mask in zip(groups, keep, strict=True):
        for member in group.members:
            for value in found.get(member.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == member.weight.shape:
                    member.keep(value, mask)
