"""ShiftResNet's family in a state dict: which of its networks, and with which arguments, from shapes alone.

The widths inside the blocks are rounded down, so that a range of reductions gives the same network: of these the
published one is named (section "Experiments" of github.com/alvinwan/shiftresnet-cifar), or the shortest decimal.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shiftconv.models.shiftresnet import DEPTHS

Shape = tuple[int, ...]
_WIDTHS = (16, 32, 64)
_REDUCTIONS = {  # of convolutions, depthwise convolutions and shuffled ones
    "resnet": {20: (7.2, 2.8, 1.5, 0.98), 56: (7.6, 2.9, 1.5, 0.98), 110: (7.8, 2.9, 1.5, 0.98, 0.95)},
    "depthwiseresnet": {20: (1.12, 0.38, 0.19, 0.125), 56: (1.12, 0.37, 0.19, 0.124), 110: (1.1, 0.37, 0.19, 0.123)},
    "shuffleresnet": {20: (0.38, 0.13, 0.065, 0.04), 56: (0.38, 0.128, 0.065, 0.04), 110: (0.37, 0.125, 0.065, 0.04)},
}
_REDUCTIONS["mobileresnet"] = _REDUCTIONS["depthwiseresnet"]
_GROUPS = 4  # of the shuffled convolutions


def identify(shapes: Mapping[str, Shape]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the network, or None if the keys are those of another family.

    The shapes that decide are looked at; the caller compares the others with a network that is built from the answer.

    Raises:
        ValueError: the keys are of this family, but no arguments give these shapes.
    """
    stages = [_stage(shapes, i) for i in (1, 2, 3)]
    if not all(stages) or len(shapes.get("conv1.weight", ())) != 4 or _stage(shapes, 4) or "fc.weight" in shapes:
        return None
    family = _family(shapes)
    if family is None:
        return None
    blocks = [len(stage) for stage in stages]
    depth = 6 * blocks[0] + 2
    if len(set(blocks)) > 1 or depth not in DEPTHS:
        raise ValueError(f"a {family} with {blocks} blocks; those of depth {DEPTHS} have (depth - 2) / 6 in each stage")
    return f"{family}{depth}", _arguments(shapes, family, depth)


def _stage(shapes: Mapping[str, Shape], index: int) -> set[str]:
    """The names of the blocks of a stage."""
    return {m[1] for key in shapes if (m := re.match(rf"layer{index}\.(\d{{1,4}})\.", key))}


def _family(shapes: Mapping[str, Shape]) -> str | None:
    conv = shapes.get("layer1.0.conv1.weight", ())
    if len(conv) != 4:
        return None
    if "layer1.0.depth1.weight" in shapes:
        return "mobileresnet"
    if "layer1.0.depth.weight" in shapes:
        return "depthwiseresnet" if conv[1] == shapes["conv1.weight"][0] else "shuffleresnet"
    return {1: "shiftresnet", 3: "resnet"}.get(conv[2]) if "layer1.0.conv3.weight" not in shapes else None


def _arguments(shapes: Mapping[str, Shape], family: str, depth: int) -> dict[str, Any]:
    last = "conv3" if family in ("depthwiseresnet", "shuffleresnet") else "conv2"
    widths = tuple(_outputs(shapes, f"layer{i}.0.{last}.weight") for i in (1, 2, 3))
    inside = tuple(_outputs(shapes, f"layer{i}.0.conv1.weight") for i in (1, 2, 3))
    if family == "resnet" and widths == inside:  # not reduced, or in all of the net
        arguments = _network_reduction(widths, depth)
    elif widths != _WIDTHS:
        raise ValueError(f"a {family}{depth} of widths {widths}, expected {_WIDTHS}")
    elif family == "shiftresnet":
        arguments = _expansion(inside)
    else:
        arguments = _block_reduction(inside, family, depth)
    shortcuts = {key.split(".shortcut.")[0] for key in shapes if ".shortcut." in key}
    if any(not block.endswith(".0") for block in shortcuts):
        arguments["project_shortcuts"] = True
    elif family == "depthwiseresnet" and not shortcuts:
        arguments["skip"] = False
    linear = shapes.get("linear.weight", ())
    if linear[1:] == (2 * widths[2],):
        arguments["global_pool"] = "catavgmax"
    if (channels := shapes["conv1.weight"][1]) != 3:
        arguments["in_chans"] = channels
    return arguments | {"num_classes": linear[0] if linear else 0}


def _outputs(shapes: Mapping[str, Shape], key: str) -> int:
    shape = shapes.get(key, ())
    if len(shape) != 4 or shape[0] < 1:
        raise ValueError(f"{key} should be the weight of a convolution, and is {shape or 'missing'}")
    return shape[0]


def _expansion(inside: tuple[int, ...]) -> dict[str, Any]:
    def fits(expansion: float) -> bool:
        return inside == tuple(int(expansion * width) for width in _WIDTHS)

    low = max(mid / width for mid, width in zip(inside, _WIDTHS, strict=True))
    return {"expansion": _simplest(fits, low, (), f"expansion gives widths {inside} inside the blocks")}


def _block_reduction(inside: tuple[int, ...], family: str, depth: int) -> dict[str, Any]:
    groups = _GROUPS if family == "shuffleresnet" else 1

    def fits(reduction: float) -> bool:
        return inside == tuple(int(1 / reduction * width // groups * groups) for width in _WIDTHS)

    low = max(width / (mid + groups) for mid, width in zip(inside, _WIDTHS, strict=True))
    published = _REDUCTIONS[family].get(depth, ())
    reduction = _simplest(fits, low, published, f"reduction gives widths {inside} inside the blocks")
    mode = {"reduction_mode": "block"} if family == "resnet" else {}
    return {"reduction": reduction, **mode} if reduction != 1 else {}


def _network_reduction(widths: tuple[int, ...], depth: int) -> dict[str, Any]:
    def fits(reduction: float) -> bool:
        return widths == tuple(int(width / reduction**0.5) for width in _WIDTHS)

    low = max((width / (reduced + 1)) ** 2 for reduced, width in zip(widths, _WIDTHS, strict=True))
    published = _REDUCTIONS["resnet"].get(depth, ())
    reduction = _simplest(fits, low, published, f"reduction of the whole net gives widths {widths}")
    return {"reduction": reduction, "reduction_mode": "net"} if reduction != 1 else {}


def _simplest(fits: Callable[[float], bool], low: float, published: Iterable[float], what: str) -> float:
    """1 or a published value where one ``fits``, else the shortest decimal from ``low`` on."""
    steps = (math.floor(low * 10**digits) + step for digits in range(7) for step in (0, 1, 2))
    scales = (10**digits for digits in range(7) for _ in range(3))
    decimals = (step / scale for step, scale in zip(steps, scales, strict=True) if step > 0)
    for value in (1.0, *published, *decimals):
        if fits(value):
            return value
    raise ValueError(f"no {what}")
