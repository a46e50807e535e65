"""What a few batches of data tell about a model: which weights matter, and which no output can ever reach.

The model itself runs, in training mode, on copies of its buffers; neither it nor its gradients nor a random generator
changes.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import cross_entropy
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  # all convolutions, no public name

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
        if count == 0:
            raise ValueError("the calibration has no batch; a loader that was used up has none left")
        if not all(total.isfinite().all() for total in totals):
            raise ValueError("the gradients on the calibration's batches are not finite; are inputs and targets right?")
        return ranks.average(totals)


def snip_scores(probe: Probe, groups: Sequence[SparseGroup]) -> list[Tensor]:
    """How sensitive the loss is to each entry: the mean of ``|w * dL/dw|`` over its weights."""
    return _per_entry(groups, probe.gradients(_weights(groups)), lambda weight, g: (weight * g).abs())


def grasp_scores(probe: Probe, groups: Sequence[SparseGroup]) -> list[Tensor]:
    """How much each entry adds to the gradient's norm: the mean of ``w * (H g)`` over its weights."""
    return _per_entry(groups, probe.gradients(_weights(groups), second=True), lambda weight, hg: weight * hg)


@torch.no_grad()
def find_reachable(model: nn.Module, groups: Sequence[SparseGroup], inputs: Tensor) -> list[Tensor | None]:
    """Which entries some output can read, for inputs of this size; None where all can be, or it cannot be told.

    A tap beyond the map has a gradient of exactly zero, whatever the input is. So the model is shown noise. Taps of
    torch's convolutions are the same for all channels; a parameter without any gradient tells nothing.
    """
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    weights = _weights(groups)
    generator = torch.Generator().manual_seed(0)
    shape = (max(min(len(inputs), 4), 2), *inputs.shape[1:])
    seen = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    for _ in range(2):
        noise = torch.randn(shape, generator=generator).to(inputs)
        with apart(model) as run, torch.enable_grad():
            outputs = run(noise)
            target = torch.randn(outputs.shape, generator=generator).to(outputs)
            found = torch.autograd.grad((outputs * target).sum(), weights, materialize_grads=True)
        for total, gradient in zip(seen, found, strict=True):
            total |= gradient != 0
    for i, weight in enumerate(weights):
        if weight.ndim < 3 or not seen[i].any():
            seen[i].fill_(True)
        elif isinstance(owners[id(weight)], _ConvNd):
            seen[i] |= seen[i].flatten(0, 1).any(0)
    each = iter(seen)
    results: list[Tensor | None] = []
    for group in groups:
        parts = [member.sums(next(each).long(), len(group.shape)) for member in group.members]
        reached = torch.stack(parts).sum(0) > 0
        results.append(None if reached.all() else reached)
    return results


@contextmanager
def apart(model: nn.Module) -> Generator[Callable[[Tensor], Tensor]]:
    """The model in training mode, as a function that leaves its buffers, its modes and torch's generators alone."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [torch.device(d) for d in {str(p.device) for p in model.parameters()} if not d.startswith("cpu")]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            model.train()
            yield lambda inputs: functional_call(model, buffers, (inputs,))
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
