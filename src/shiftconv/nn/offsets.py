"""The offsets of a whole model, for a training loop: their penalty, their rate, their gradients, when they stop.

Sources: the recipes of the papers in :mod:`shiftconv.nn.learned_shift`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shiftconv.nn.learned_shift import LearnedShift, unit_rows


def offset_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The offsets ``[C, D]`` of all learned shifts in ``model``, each parameter once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, LearnedShift) and id(module.offset) not in seen:
            seen.add(id(module.offset))
            yield module.offset


def offset_penalty(model: nn.Module) -> Tensor:
    """The sum of ``|offset|`` over all learned shifts in ``model``, a scalar that trains; zero if there are none.

    Source: the loss of the Sparse Shift paper, arXiv:1903.05285, section 3.2.
    """
    return _total(offset.abs() for offset in offset_parameters(model))


def lattice_penalty(model: nn.Module) -> Tensor:
    """Half the squared distance of all offsets from whole numbers, a scalar: its gradient is that distance.

    It draws the offsets of active shifts to whole pixels, where a plain integer shift can take over. Source: the
    lattice decay of the Active Shift authors' code.
    """
    return _total((offset - offset.detach().round()).square() / 2 for offset in offset_parameters(model))


def _total(terms: Iterator[Tensor]) -> Tensor:
    sums = [term.sum(dtype=torch.promote_types(term.dtype, torch.float32)) for term in terms]
    return sum(sums[1:], start=sums[0]) if sums else torch.zeros(())


def offset_groups(
    model: nn.Module, lr: float, offset_lr_scale: float = 0.01, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: the offsets learn at their own, lower rate and without weight decay.

    Args:
        model: its parameters that require a gradient are grouped.
        lr: rate of all but the offsets.
        offset_lr_scale: the offsets' part of it; the Active Shift paper uses 0.01 or 0.001, with normalised gradients.
        weight_decay: of all but the offsets.

    Returns:
        A group for the weights and, if there are any, one for the offsets, each with ``params``, ``lr`` and
        ``weight_decay``: ``torch.optim.SGD(offset_groups(model, lr=0.1, weight_decay=5e-4), momentum=0.9)``.

    Raises:
        ValueError: a rate, scale or weight decay below 0.
    """
    for name, value in (("lr", lr), ("offset_lr_scale", offset_lr_scale), ("weight_decay", weight_decay)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    offsets = [offset for offset in offset_parameters(model) if offset.requires_grad]
    apart = {id(offset) for offset in offsets}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [dict(params=others, lr=lr, weight_decay=weight_decay)] if others else []
    if offsets:
        groups.append(dict(params=offsets, lr=lr * offset_lr_scale, weight_decay=0.0))
    return groups


@torch.no_grad()
def normalize_offset_gradients(model: nn.Module, max_norm: float | None = None) -> None:
    """Scale the gradient of each channel's offset to unit length, or to at most ``max_norm``; zero stays zero.

    Call it between ``backward()`` and the optimiser's ``step()``: after all accumulated micro-batches, after DDP has
    averaged, after a ``GradScaler`` has unscaled. Unlike ``normalize_gradient`` of the modules it counts them as one.

    Args:
        model: the gradients of all its learned shifts change in place.
        max_norm: clip to this length instead, gradients below it stay.

    Raises:
        ValueError: ``max_norm`` is not above 0.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    for offset in offset_parameters(model):
        grad = offset.grad
        if grad is None:
            continue
        unit = unit_rows(grad)
        if max_norm is not None:
            length = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
            unit = torch.where(length > max_norm, unit * max_norm, grad)
        grad.copy_(unit)


def freeze_offsets(model: nn.Module) -> None:
    """Stop the offsets of all learned shifts in ``model`` where they are; the backward pass no longer pays for them.

    Their gradients become none, so that no optimiser moves them on, by momentum or weight decay. Wrap the model in
    DistributedDataParallel anew, or wrap it with ``find_unused_parameters=True``: DDP counts on every gradient.
    """
    for offset in offset_parameters(model):
        offset.requires_grad_(False)
        offset.grad = None


class FreezeOffsets:
    """The schedule of the Sparse Shift authors: learn the offsets in the first half of training, then freeze them.

        freeze = FreezeOffsets(model)
        for epoch in range(epochs):
            freeze.step(epoch / epochs)
            ...

    It holds no state: a resumed run that calls :meth:`step` again is where it was.

    Args:
        model: whose offsets to freeze.
        at: the part of the training after which they stop, from 0 to 1.

    Raises:
        ValueError: ``at`` is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, at: float = 0.5):
        if not 0 <= at <= 1:
            raise ValueError(f"at must be from 0 to 1, got {at}")
        self.model = model
        self.at = at

    def step(self, progress: float) -> bool:
        """Freeze the offsets if ``progress``, the part of the training that is done, has come to ``at``.

        Returns:
            Whether they are frozen from here on.
        """
        if progress < self.at:
            return False
        freeze_offsets(self.model)
        return True
