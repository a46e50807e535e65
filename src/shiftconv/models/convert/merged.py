"""The authors' merged forms and the form that trains, each from the other; all keys are the authors'.

    lkb_reparam                  one kernel with a bias for all branches           SLaK, RepLKNet
    LoRA                         one set of small kernels for all paths            ShiftWise_v1, ShiftWise_v2
    pwconv2 with a bias          no batch norm, layer scale and response bias      ShiftWise_v2 and UniRepLKNet, deploy
    dwconv with a bias           no norm after it                                  UniRepLKNet, deploy
    lk_origin with a bias        the same, and no dilated branches                 UniRepLKNet, deploy

In evaluation mode the outputs are the same. Unmerged, a bias is that of a batch norm which does nothing else, and the
branches that were merged away are 0. Sums are in float64.
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.nn.dilated import BRANCHES

_EPS = 1e-5  # of all batch norms here
Weights = dict[str, Tensor]


class _Form(NamedTuple):
    """A key of the merged form, one of the form that trains, and the way from each to the other for a block."""

    name: str
    merged: str
    trained: str
    unmerge: Callable[[Weights, str], None]
    merge: Callable[[Weights, str], None]


def unmerge(state_dict: Weights) -> tuple[Weights, list[str]]:
    """The same network in the form that trains, and the names of what was merged in it."""
    weights, found = dict(state_dict), []
    for form in _FORMS:
        if blocks := _blocks(weights, form.merged):
            found.append(form.name)
            for block in blocks:
                form.unmerge(weights, block)
    return weights, found


def merge(state_dict: Weights, forms: Collection[str]) -> Weights:
    """The same network with these parts merged, by the names of above.

    Raises:
        ValueError: an unknown name, or one that the network has no such part for.
    """
    weights = dict(state_dict)
    for name in forms:
        form = next((form for form in _FORMS if form.name == name), None)
        if form is None:
            raise unknown("merged form", name, [form.name for form in _FORMS])
        if not (blocks := _blocks(weights, form.trained)):
            raise ValueError(f"the network has nothing to merge into {name}")
        for block in blocks:
            form.merge(weights, block)
    dtype = next((value.dtype for value in state_dict.values() if value.is_floating_point()), torch.float32)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}


def _blocks(weights: Weights, key: str) -> list[str]:
    pattern = re.compile(rf"(.+)\.{key}")
    return [match[1] for each in weights if (match := pattern.fullmatch(each))]


def _split_large(weights: Weights, block: str) -> None:
    kernel = f"{block}.large_kernel."
    weights[f"{kernel}lkb_origin.conv.weight"] = weights.pop(f"{kernel}lkb_reparam.weight")
    weights.update(_identity(f"{kernel}lkb_origin.bn", weights.pop(f"{kernel}lkb_reparam.bias")))


def _join_large(weights: Weights, block: str) -> None:
    prefix = f"{block}.large_kernel."
    names = [
        name for name in ("lkb_origin", "LoRA1", "LoRA2", "small_conv") if f"{prefix}{name}.conv.weight" in weights
    ]
    folded = [_pop_folded(weights, f"{prefix}{name}.conv.weight", f"{prefix}{name}.bn") for name in names]
    size = max(kernel.shape[2] for kernel, _ in folded)
    room = [[(size - side) // 2 for side in kernel.shape[:1:-1] for _ in (0, 1)] for kernel, _ in folded]
    kernels = [F.pad(kernel, pads) for (kernel, _), pads in zip(folded, room, strict=True)]
    weights[f"{prefix}lkb_reparam.weight"] = torch.stack(kernels).sum(0)
    weights[f"{prefix}lkb_reparam.bias"] = torch.stack([bias for _, bias in folded]).sum(0)


def _split_paths(weights: Weights, block: str) -> None:
    weights[f"{block}.large_kernel.LoRAs.0.weight"] = weights.pop(f"{block}.large_kernel.LoRA.weight")


def _join_paths(weights: Weights, block: str) -> None:
    pattern = re.compile(rf"{re.escape(block)}\.large_kernel\.LoRAs\.\d+\.weight")
    paths = [weights.pop(key).double() for key in list(weights) if pattern.fullmatch(key)]
    weights[f"{block}.large_kernel.LoRA.weight"] = torch.stack(paths).sum(0)


def _split_mlp(weights: Weights, block: str) -> None:
    bias = weights.pop(f"{block}.pwconv2.0.bias")
    weights.update(_identity(f"{block}.pwconv2.2", bias))
    weights.setdefault(f"{block}.gamma", torch.ones_like(bias))
    if (gamma := weights.get(f"{block}.act.1.gamma")) is not None:
        weights.setdefault(f"{block}.act.1.beta", torch.zeros_like(gamma))


def _join_mlp(weights: Weights, block: str) -> None:
    linear = weights[f"{block}.pwconv2.0.weight"].double()
    bias = linear @ weights.pop(f"{block}.act.1.beta").double().flatten()
    scale, shift = _pop_norm(weights, f"{block}.pwconv2.2")
    if (gamma := weights.pop(f"{block}.gamma", None)) is not None:
        scale, shift = scale * gamma, shift * gamma
    weights[f"{block}.pwconv2.0.weight"] = linear * scale[:, None]
    weights[f"{block}.pwconv2.0.bias"] = bias * scale + shift


def _split_plain(weights: Weights, block: str) -> None:
    weights.update(_identity(f"{block}.norm", weights.pop(f"{block}.dwconv.bias")))


def _join_plain(weights: Weights, block: str) -> None:
    kernel, bias = _pop_folded(weights, f"{block}.dwconv.weight", f"{block}.norm")
    weights[f"{block}.dwconv.weight"], weights[f"{block}.dwconv.bias"] = kernel, bias


def _split_dilated(weights: Weights, block: str) -> None:
    prefix = f"{block}.dwconv."
    bias, kernel = weights.pop(f"{prefix}lk_origin.bias"), weights[f"{prefix}lk_origin.weight"]
    nothing = torch.zeros_like(bias)
    weights.update(_identity(f"{block}.norm", bias))
    weights.update(_identity(f"{prefix}origin_bn", nothing))
    for side, gap in BRANCHES.get(kernel.shape[-1], ()):
        weights[f"{prefix}dil_conv_k{side}_{gap}.weight"] = kernel.new_zeros(len(kernel), 1, side, side)
        weights.update(_identity(f"{prefix}dil_bn_k{side}_{gap}", nothing))


def _join_dilated(weights: Weights, block: str) -> None:
    prefix = f"{block}.dwconv."
    kernel, bias = _pop_folded(weights, f"{prefix}lk_origin.weight", f"{prefix}origin_bn")
    size = kernel.shape[-1]
    for side, gap in BRANCHES.get(size, ()):
        small, shift = _pop_folded(weights, f"{prefix}dil_conv_k{side}_{gap}.weight", f"{prefix}dil_bn_k{side}_{gap}")
        first, bias = (size - gap * (side - 1) - 1) // 2, bias + shift
        kernel[:, :, first : size - first : gap, first : size - first : gap] += small
    scale, shift = _pop_norm(weights, f"{block}.norm")
    weights[f"{prefix}lk_origin.weight"] = kernel * scale.view(-1, 1, 1, 1)
    weights[f"{prefix}lk_origin.bias"] = bias * scale + shift


_FORMS = (
    _Form("lkb_reparam", r"large_kernel\.lkb_reparam\.bias", r"large_kernel\.(?:lkb_origin|LoRA1)\.conv\.weight",
          _split_large, _join_large),
    _Form("LoRA", r"large_kernel\.LoRA\.weight", r"large_kernel\.LoRAs\.0\.weight", _split_paths, _join_paths),
    _Form("pwconv2", r"pwconv2\.0\.bias", r"pwconv2\.2\.running_var", _split_mlp, _join_mlp),
    _Form("dwconv", r"dwconv\.bias", r"dwconv\.weight", _split_plain, _join_plain),
    _Form("lk_origin", r"dwconv\.lk_origin\.bias", r"dwconv\.origin_bn\.running_var", _split_dilated, _join_dilated),
)  # fmt: skip


def _identity(norm: str, bias: Tensor) -> Weights:
    """A batch norm that adds ``bias`` by its running statistics; the variance makes up for eps."""
    ones, counter = torch.ones_like(bias), torch.zeros((), dtype=torch.int64)
    values = dict(weight=ones, bias=bias, running_mean=0 * ones, running_var=ones - _EPS, num_batches_tracked=counter)
    return {f"{norm}.{name}": value.clone() for name, value in values.items()}


def _pop_norm(weights: Weights, norm: str) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by, and then adds; it is taken out. Without one, 1 and 0 for any shape."""
    names = ("weight", "bias", "running_mean", "running_var")
    weights.pop(f"{norm}.num_batches_tracked", None)
    values = [weights.pop(f"{norm}.{name}", None) for name in names]
    if any(value is None for value in values):
        return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    weight, bias, mean, var = (value.double() for value in values if value is not None)
    scale = weight / (var + _EPS).sqrt()
    return scale, bias - mean * scale


def _pop_folded(weights: Weights, conv: str, norm: str) -> tuple[Tensor, Tensor]:
    kernel = weights.pop(conv).double()
    scale, shift = _pop_norm(weights, norm)
    return kernel * scale.view(-1, 1, 1, 1), shift.expand(len(kernel)).clone()
