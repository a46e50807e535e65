"""What a few batches of data tell about a model: which weights matter, and which no output can ever reach.

The model itself runs, in training mode, on copies of its buffers; neither it nor its gradients nor a random generator
changes.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import cross_entropy
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  # all convolutions, no public name
from torch.utils._pytree import tree_leaves

from shiftconv.sparse import ranks
from shiftconv.sparse.group import SparseGroup

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Calibration:
    """A few batches, and what is minimised on them.

    Args:
        batches: pairs of inputs and targets, such as ``[next(iter(loader))]``; on the device of the model.
        loss: from outputs and targets to a number.
    """

    batches: Iterable[tuple[Tensor, Tensor]]
    loss: Loss = cross_entropy


@dataclass(frozen=True)
class Probe:
    """A model and the data that it is tried on."""

    model: nn.Module
    calibration: Calibration

    def gradients(self, weights: Sequence[nn.Parameter], second: bool = False) -> list[Tensor]:
        """The gradient of the summed loss for each weight, or if ``second`` that of its squared norm, halved.

        Of several processes, each of which has batches of its own, the mean.
        """
        totals = [torch.zeros_like(weight) for weight in weights]
        count = 0
        for inputs, targets in self.calibration.batches:
            with apart(self.model) as run, torch.enable_grad():
                loss = self.calibration.loss(run(inputs), targets)
                found = torch.autograd.grad(loss, weights, create_graph=second, materialize_grads=True)
                if second:
                    norm = torch.stack([(g.detach() * g).sum() for g in found]).sum()
                    found = torch.autograd.grad(norm, weights, materialize_grads=True)
            for total, gradient in zip(totals, found, strict=True):
                total += gradient.detach()
            count += 1
        *means, counted = ranks.average([*totals, totals[0].new_tensor(float(count))])
        if not counted:
            raise ValueError("the calibration has no batch; a loader that was used up has none left")
        if not all(mean.isfinite().all() for mean in means):
            raise ValueError("the gradients on the calibration's batches are not finite; are inputs and targets right?")
        return means


def snip_scores(probe: Probe, groups: Sequence[SparseGroup]) -> list[Tensor]:
    """How sensitive the loss is to each entry: the mean of ``|w * dL/dw|`` over its weights."""
    return _per_entry(groups, probe.gradients(_weights(groups)), lambda weight, g: (weight * g).abs())


def grasp_scores(probe: Probe, groups: Sequence[SparseGroup]) -> list[Tensor]:
    """How much each entry adds to the gradient's norm: the mean of ``w * (H g)`` over its weights."""
    return _per_entry(groups, probe.gradients(_weights(groups), second=True), lambda weight, hg: weight * hg)


@torch.no_grad()
def find_reachable(model: nn.Module, groups: Sequence[SparseGroup], inputs: Tensor) -> list[Tensor | None]:
    """Which entries some output can read, for inputs of this size; None where all can be, or it cannot be told.

    A tap beyond the map has a gradient of exactly zero, whatever the input and all weights are. So a model with random
    weights is shown noise. Taps of torch's convolutions are the same for all channels; a parameter without any gradient
    tells nothing.
    """
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    names = {id(p): name for name, p in model.named_parameters()}
    weights = _weights(groups)
    seen = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = {name: _draw(p, generator) for name, p in model.named_parameters()}
        with apart(model, drawn) as run, torch.enable_grad():
            outputs = [
                y for y in tree_leaves(run(_noise(inputs, generator))) if isinstance(y, Tensor) and y.requires_grad
            ]
            total = torch.stack([(y * _draw(y, generator).detach()).sum() for y in outputs]).sum()
            found = torch.autograd.grad(total, [drawn[names[id(w)]] for w in weights], materialize_grads=True)
        for each, gradient in zip(seen, found, strict=True):
            each |= gradient != 0
    for weight, each in zip(weights, seen, strict=True):
        if weight.ndim < 3 or not each.any():
            each.fill_(True)
        elif isinstance(owners[id(weight)], _ConvNd):
            each |= each.flatten(0, 1).any(0)
    parts = iter(seen)
    results: list[Tensor | None] = []
    for group in groups:
        counts = [member.sums(next(parts).long(), len(group.shape)) for member in group.members]
        reached = torch.stack(counts).sum(0) > 0
        results.append(None if reached.all() else reached)
    return results


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of a size at which signals neither vanish nor explode, for a gradient."""
    inputs = like[0].numel() if like.ndim > 1 else 1
    return (torch.randn(like.shape, generator=generator) * inputs**-0.5).to(like).requires_grad_()


def _noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Two to four random inputs like the given ones; these themselves if they are no real numbers."""
    if not inputs.is_floating_point():
        return inputs
    return torch.randn((max(min(len(inputs), 4), 2), *inputs.shape[1:]), generator=generator).to(inputs)


@contextmanager
def apart(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> Generator[Callable[[Tensor], Any]]:
    """The model in training mode, as a function that leaves its buffers, its modes and torch's generators alone.

    Args:
        model: the model.
        parameters: to be used in the place of its own.
    """
    modes = {module: module.training for module in model.modules()}
    tensors = {name: buffer.clone() for name, buffer in model.named_buffers()} | dict(parameters or {})
    devices = [torch.device(d) for d in {str(p.device) for p in model.parameters()} if not d.startswith("cpu")]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            model.train()
            yield lambda inputs: functional_call(model, tensors, (inputs,))
        finally:
            for module, mode in modes.items():
                module.training = mode


def _weights(groups: Sequence[SparseGroup]) -> list[nn.Parameter]:
    return [member.weight for group in groups for member in group.members]


def _per_entry(
    groups: Sequence[SparseGroup], gradients: Sequence[Tensor], score: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    each = iter(gradients)
    results: list[Tensor] = []
    for group in groups:
        parts = [member.sums(score(member.weight.detach(), next(each)), len(group.shape)) for member in group.members]
        results.append(torch.stack(parts).sum(0) * (group.size / group.weights))
    return results
