"""SLaK's stripes as small kernels side by side, and back: the weights of ``slak`` in ``slak_split``, exactly.

A stripe ``K x s`` is cut into ``ceil(K / s)`` kernels ``s x s``, the last one filled up with zeros. The authors' own
way (``reloc_w``) adds one kernel too many where ``s`` divides ``K``.

Source: Li et al., "Shift-wise Conv", arXiv:2401.12736v1, section 3, and the code released with it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.models.large_kernel_block import Block
from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d

_SAME = {f"{name}.norm.": f"{name}_norm." for name in ("tall", "wide", "small")} | {"small.weight": "small_weight"}
_STRIPES = {"tall.weight": ("tall_weights.0", 2), "wide.weight": ("weights.0", 3)}


def relocate(state_dict: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` of a ``slak`` as ``network`` needs it if that is a ``slak_split``, or the other way round.

    Anything else is returned as it is. Both are our keys.

    Raises:
        ValueError: split kernels with weights beyond the stripe, which no stripe of ``network`` can hold; both forms in
            one file.
    """
    weights = dict(state_dict)
    for name, block in network.named_modules():
        if not isinstance(block, Block):
            continue
        mix, prefix = block.mix, f"{name}.mix."
        if f"{prefix}tall.weight" in weights and f"{prefix}tall_weights.0" in weights:
            raise ValueError(f"{prefix}tall is there twice, as a stripe and as small kernels")
        if isinstance(mix, ShiftwiseConv2d) and mix.variant.separate and f"{prefix}tall.weight" in weights:
            _split(weights, prefix, mix.small_kernel_size)
        elif isinstance(mix, LargeKernelConv2d) and mix.tall is not None and f"{prefix}tall_weights.0" in weights:
            _join(weights, prefix, *mix.tall.weight.shape[2:])
    return weights


def _split(weights: dict[str, Tensor], prefix: str, small: int) -> None:
    channels = len(weights[f"{prefix}tall.weight"])
    for key, (pieces, axis) in _STRIPES.items():
        stripe = weights.pop(prefix + key)
        missing = -stripe.shape[axis] % small
        stripe = F.pad(stripe, (0, 0, 0, missing) if axis == 2 else (0, missing))
        parts = stripe.unflatten(axis, (-1, small)).movedim(axis, 1)  # [C, S, 1, s, s]
        weights[prefix + pieces] = parts.flatten(0, 1).contiguous()
    _rename(weights, prefix, _SAME)
    weights[f"{prefix}active"] = torch.arange(channels)
    weights[f"{prefix}ghosts"] = torch.empty(0, dtype=torch.int64)


def _join(weights: dict[str, Tensor], prefix: str, size: int, small: int) -> None:
    slots = -(-size // small)
    for key, (pieces, axis) in _STRIPES.items():
        parts = weights.pop(prefix + pieces).unflatten(0, (-1, slots))
        stripe = parts.movedim(1, axis).flatten(axis, axis + 1)
        stripe, beyond = stripe.split([size, slots * small - size], axis)
        if beyond.any():
            where = f"{prefix}{pieces} has weights beyond the {size} taps of a stripe"
            raise ValueError(f"{where}, which a network of stripes cannot hold")
        weights[prefix + key] = stripe.contiguous()
    _rename(weights, prefix, {ours: theirs for theirs, ours in _SAME.items()})
    for table in ("active", "ghosts"):
        weights.pop(prefix + table, None)


def _rename(weights: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    for key in [key for key in weights if key.startswith(prefix)]:
        for old, new in names.items():
            if key.startswith(prefix + old):
                weights[prefix + new + key.removeprefix(prefix + old)] = weights.pop(key)
