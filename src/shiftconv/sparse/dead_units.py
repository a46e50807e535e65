"""Hidden units that contribute nothing, and layers without them."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # of SyncBatchNorm, too

from shiftconv.sparse.chains import Chain
from shiftconv.sparse.channelwise import (
    Conv,
    KeepChannels,
    Mixing,
    Step,
    is_depthwise,
    keeps_constants,
    pads_with_zeros,
)


@torch.no_grad()
def drop_dead_units(chain: Chain, multiple_of: int = 1) -> int:
    """Make the layers of a chain smaller by the units that contribute nothing; in place, exact in evaluation mode.

    A unit that is constant where it is read goes into the bias of its reader. At least one unit stays.

    Args:
        chain: as of :func:`~shiftconv.sparse.chains.chains`, its modules in evaluation mode.
        multiple_of: dead units stay, too, that make the number of units a multiple of it.

    Returns:
        How many units went.
    """
    dead, constant = _dead_units(chain)
    live = chain.units - int(dead.sum())
    count = min(chain.units, max(1, -(-live // multiple_of) * multiple_of))
    if count == chain.units:
        return 0
    spare = dead.nonzero()[:, 0]
    dead[spare[: count - live]] = False
    _move_into_bias(chain.consumer, torch.where(dead, constant, 0))
    kept = (~dead).nonzero()[:, 0]
    for layer in (chain.producer, *chain.middle):
        if isinstance(layer, nn.Module):
            _keep_outputs(layer, kept)
    chain.consumer.weight = _chosen(chain.consumer.weight, 1, kept)
    if isinstance(chain.consumer, nn.Linear):
        chain.consumer.in_features = count
    else:
        chain.consumer.in_channels = count
    return len(dead) - count


def _dead_units(chain: Chain) -> tuple[Tensor, Tensor]:
    """Which units may go, and what each of them is where it is read, 0 unless that is known; both ``[units]``."""
    producer, consumer = chain.producer, chain.consumer
    known = _is_zero(producer.weight, 0)
    value = producer.weight.new_zeros(len(known)) if producer.bias is None else producer.bias
    may_go = torch.ones_like(known)
    for step in chain.middle:
        value = torch.where(known, value, 0)  # a tensor of its own, as a step may work in place
        if isinstance(step, KeepChannels):
            known = may_go = may_go & known & (value == 0)
            value = step.output_of_zeros()
        else:
            known, value = _after(step, known, value)
    known = known & value.isfinite()
    if pads_with_zeros(consumer):
        known = known & (value == 0)
    return may_go & (known | _is_zero(consumer.weight, 1)), torch.where(known, value, 0)


def _after(step: Step, known: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Which units are constants after a step, and which, from the same before it, where unknown ones are 0."""
    if isinstance(step, nn.Module) and pads_with_zeros(step):
        known = known & (value == 0)
    if is_depthwise(step):
        value = step.weight.flatten(1).to(_exact(value)).sum(1).to(value.dtype) * value
        return known | _is_zero(step.weight, 0), value if step.bias is None else value + step.bias
    if isinstance(step, _BatchNorm):
        axes = 0 if isinstance(step, nn.BatchNorm1d) else 3 if isinstance(step, nn.BatchNorm3d) else 2
        after = cast("Tensor", step(value.view(1, -1, *(1,) * axes)))
        return known | (step.weight == 0) if step.affine else known, after.flatten()
    if isinstance(step, nn.Module) and keeps_constants(step):
        return known, value
    return known, cast("Tensor", step(value.view(1, -1, 1, 1))).flatten()


def _is_zero(weight: Tensor, axis: int) -> Tensor:
    """Where a weight is zero for an entry of an axis, ``[length of the axis]``."""
    return weight.transpose(0, axis).flatten(1).count_nonzero(1) == 0


def _exact(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _move_into_bias(layer: Mixing, constant: Tensor) -> None:
    """Let the bias of a layer do what inputs ``[units]`` do that are the same everywhere."""
    if not constant.count_nonzero():
        return
    exact = _exact(constant)
    added = layer.weight.flatten(2).sum(2, dtype=exact) if layer.weight.ndim > 2 else layer.weight.to(exact)
    added = added @ constant.to(exact)
    bias = added if layer.bias is None else added + layer.bias
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def _keep_outputs(layer: nn.Module, kept: Tensor) -> None:
    """Go without all output channels but ``kept``, and without the same inputs if a layer has its own for each."""
    if isinstance(layer, KeepChannels):
        layer.keep_channels(kept)
    elif isinstance(layer, nn.Linear | Conv):
        if is_depthwise(layer):
            layer.in_channels = layer.groups = len(kept)
        layer.weight = _chosen(layer.weight, 0, kept)
        if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            layer.bias = _chosen(layer.bias, 0, kept)
        if isinstance(layer, nn.Linear):
            layer.out_features = len(kept)
        else:
            layer.out_channels = len(kept)
    elif isinstance(layer, _BatchNorm):
        for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if value.ndim:
                setattr(layer, name, _chosen(value, 0, kept))
        layer.num_features = len(kept)
    elif isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        layer.weight = _chosen(layer.weight, 0, kept)
        layer.num_parameters = len(kept)


def _chosen(value: Tensor, axis: int, kept: Tensor) -> Any:
    """Some entries of an axis, as a parameter of the same kind and memory format, or as a buffer."""
    last = value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
    chosen = value.detach().index_select(axis, kept)
    chosen = chosen.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return nn.Parameter(chosen, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else chosen
