"""The ShiftResNet authors' own cost figures, wrong in known ways, for comparison with their published tables.

Their utility counts parameters rightly. Its "FLOPs" are multiply-accumulates of convolutions and of the classifier, for
one 3 x 32 x 32 image, except that

* the first convolution is charged for the width of the last stage: 9 * 32 * 32 * width in the version that made the
  tables of their README (``readme``), three times that in their newest version (``head``);
* the depthwise convolution of a ``depthwiseresnet`` is charged at the size of the block's output, not at its own;
* in a ``shuffleresnet`` the 1x1 convolutions are charged as if they had no groups, the depthwise one not at all;
* a ``mobileresnet`` is charged as if ``reduction`` were 1.

:func:`shiftconv.count` counts what is computed.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shiftconv.models import create_model
from shiftconv.models.shiftresnet import DEPTHS, FAMILIES, CifarNet
from shiftconv.models.shiftresnet_blocks import DepthwiseBlock, ShuffleBlock
from shiftconv.names import unknown

Convention = Literal["readme", "head"]

_FIRST_CONV = {"readme": 9 * 32 * 32, "head": 9 * 32 * 32 * 3}


@dataclass(frozen=True)
class LegacyCount:
    """Parameters and "FLOPs" as the authors' utility gives them, beside those of the plain ResNet of equal depth."""

    model: str
    params: int
    flops: int
    original_params: int
    original_flops: int
    reduction: float = 1.0
    """The network's argument of this name."""

    def lines(self) -> list[str]:
        """What the authors' utility prints, line by line."""
        heading = [f"==> {self.model} with reduction {self.reduction:.2f}"] if self.reduction != 1 else []
        rows = (("Parameters", self.params, self.original_params), ("FLOPs", self.flops, self.original_flops))
        ratios = [f"{name}: (new) {new} (original) {old} (reduction) {old / new:.2f}" for name, new, old in rows]
        return [*heading, *ratios]


def readme_count(model_name: str, convention: Convention = "readme", **arguments: Any) -> LegacyCount:
    """The authors' figures for one of their networks.

    Args:
        model_name: such as ``shiftresnet20``; any family of :mod:`shiftconv.models.shiftresnet`.
        convention: ``readme`` for the published tables, ``head`` for what their newest version prints.
        arguments: those of the network, such as ``expansion``, ``reduction``, ``reduction_mode``, ``num_classes``.

    Raises:
        ValueError: an unknown convention, a network that is not theirs, or images that have not three channels.
        TypeError: an argument that the network does not have.

    >>> print(*readme_count("shiftresnet20", expansion=3).lines(), sep="\\n")
    Parameters: (new) 95642 (original) 272474 (reduction) 2.85
    FLOPs: (new) 16581248 (original) 40960640 (reduction) 2.47
    """
    if convention not in get_args(Convention):
        raise unknown("convention", convention, get_args(Convention))
    depths = {f"{family}{depth}": depth for family in FAMILIES for depth in DEPTHS}
    if model_name not in depths:
        raise unknown("model of the ShiftResNet study", model_name, depths)
    params, flops = _cost(model_name, convention, arguments)
    original = _cost(f"resnet{depths[model_name]}", convention, {})
    return LegacyCount(model_name, params, flops, *original, reduction=arguments.get("reduction") or 1.0)


def _cost(model_name: str, convention: Convention, arguments: dict[str, Any]) -> tuple[int, int]:
    model = _without_weights(model_name, arguments)
    params = sum(p.numel() for p in model.parameters())
    if model_name.startswith("mobileresnet"):
        model = _without_weights(model_name, {**arguments, "reduction": 1.0})
    macs = _conv_macs(model)
    flops = _FIRST_CONV[convention] * model.num_features + model.num_features * model.num_classes
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            flops += sum(macs[conv] * _charged(block, conv) for conv in _convs(block))
    return params, int(flops)


def _without_weights(model_name: str, arguments: dict[str, Any]) -> CifarNet:
    with torch.device("meta"):
        model = create_model(model_name, **arguments)
    if not isinstance(model, CifarNet) or model.in_chans != 3:
        raise ValueError(f"readme_count takes a whole network for images of three channels, got {arguments}")
    return model


def _convs(block: nn.Module) -> list[nn.Conv2d]:
    return [m for m in block.modules() if isinstance(m, nn.Conv2d)]


def _charged(block: nn.Module, conv: nn.Conv2d) -> float:
    """The authors' charge for one convolution of a block, as a multiple of what it computes."""
    if isinstance(block, DepthwiseBlock) and conv is block.depth:
        return 1 / block.conv3.stride[0] ** 2
    if isinstance(block, ShuffleBlock):
        return 0 if conv is block.depth else conv.groups
    return 1


def _conv_macs(model: CifarNet) -> dict[nn.Conv2d, int]:
    """What each convolution computes for one 32 x 32 image."""
    macs: dict[nn.Conv2d, int] = {}

    def note(conv: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(conv, nn.Conv2d):
            macs[conv] = output[0, 0].numel() * conv.weight.numel()

    for conv in _convs(model):
        conv.register_forward_hook(note)
    model.eval()(torch.empty(1, 3, 32, 32, device="meta"))
    return macs
