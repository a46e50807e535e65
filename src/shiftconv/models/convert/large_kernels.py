"""The networks with large kernels in a state dict under our keys: which one, and with which arguments, from shapes.

A file of the authors' does not say everything: not how many random arrangements are added, nor whether 17 kernels of
3x3 stand for 49, 50 or 51 pixels. Then the published setting is taken.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from shiftconv.models import replknet, shiftwise, slak, unireplknet

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
_PUBLISHED_KERNELS = ((51, 49, 47, 13), (51, 49, 45, 13), (61, 59, 57, 13), (31, 29, 27, 13))
_PUBLISHED_WIDTHS, _PUBLISHED_GHOSTS = (1.3, 1.0), (0.23, 0.3, 0.0)
_PUBLISHED_SHIFTS = 4
_WITH_GHOSTS = ("slak_shuffled", "shiftwise_v1", "shiftwise")


def identify(shapes: Shapes) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the network, or None if the keys are those of another family.

    The shapes that decide are looked at; the caller compares the others with a network that is built from the answer.

    Raises:
        ValueError: the keys are of this family, but no arguments give these shapes.
    """
    first = "stages.0.blocks.0.mix."
    if not any(key.startswith(first) for key in shapes) or not {"stem.0.weight", "stem.0.conv.weight"} & {*shapes}:
        return None
    if f"{first}merged.tall" in shapes:
        raise ValueError(
            "the weights of a reparameterized network, which do not say how it was built; make it, call its "
            "reparameterize(), and give it to load_checkpoint"
        )
    depths = tuple(len(_names(shapes, rf"stages\.{i}\.blocks\.(\d+)\.")) for i in range(4))
    if "stem.0.conv.weight" in shapes:
        name, arguments = _replknet(shapes, depths)
        return name, arguments | _shared(shapes, "stem.0.conv.weight")
    dims = tuple(_size(shapes, f"stages.{i}.blocks.0.fc1.weight", 1) for i in range(4))
    two_convs = "stem.3.weight" in shapes
    if f"{first}weights.0" in shapes:
        name, arguments = _of_small_kernels(shapes, depths, dims, two_convs)
    elif two_convs:
        name, arguments = _unireplknet(shapes, depths, dims)
    else:
        name, arguments = _slak(shapes, depths, dims)
    if "stages.0.blocks.0.gamma" not in shapes:
        arguments["layer_scale"] = 0
    return name, arguments | _shared(shapes, "stem.0.weight")


def identify_convnext(shapes: Shapes) -> tuple[str, dict[str, Any]] | None:
    """Timm's ConvNeXt with these shapes under timm's keys, or None; as :func:`identify`."""
    if "stages.0.blocks.0.conv_dw.bias" not in shapes:
        return None
    depths = tuple(len(_names(shapes, rf"stages\.{i}\.blocks\.(\d+)\.")) for i in range(4))
    known: dict[tuple[Shape, int], str] = {(depths, dims[0]): size for size, (depths, dims) in slak.SIZES.items()}
    known[(3, 3, 27, 3), 256] = "xlarge"
    channels = _size(shapes, "stem.0.weight", 0)
    if (depths, channels) not in known:
        raise ValueError(
            f"a ConvNeXt with {depths} blocks and {channels} channels in its first stage, a size without a name"
        )
    arguments = {"num_classes": _size(shapes, "head.fc.weight", 0) if "head.fc.weight" in shapes else 0}
    if (in_chans := _size(shapes, "stem.0.weight", 1)) != 3:
        arguments["in_chans"] = in_chans
    return f"convnext_{known[depths, channels]}", arguments


def _shared(shapes: Shapes, first: str) -> dict[str, Any]:
    """The arguments that all families have, where they differ from the usual; ``first`` is the first convolution."""
    arguments: dict[str, Any] = {}
    if (channels := _size(shapes, first, 1)) != 3:
        arguments["in_chans"] = channels
    if "feature_norms.0.weight" in shapes:
        arguments["feature_norm"] = True
    if "linear.weight" not in shapes and "norm.weight" not in shapes:
        return arguments | {"features_only": True}
    return arguments | {"num_classes": _size(shapes, "linear.weight", 0) if "linear.weight" in shapes else 0}


def _slak(shapes: Shapes, depths: Shape, dims: Shape) -> tuple[str, dict[str, Any]]:
    firsts = [f"stages.{i}.blocks.0.mix." for i in range(4)]
    decomposed = f"{firsts[0]}tall.weight" in shapes
    sizes = tuple(_size(shapes, f"{first}{'tall' if decomposed else 'large'}.weight", 2) for first in firsts)
    small = _size(shapes, f"{firsts[0]}tall.weight", 3) if decomposed else 0
    if not decomposed:
        sides = {_size(shapes, f"{first}small.weight", 2) for first in firsts if f"{first}small.weight" in shapes}
        small = min(sides) if sides else 0
    size, width = _scale("slak", slak.SIZES, depths, dims)
    arguments = {"kernel_sizes": sizes, "small_kernel_size": small, "decomposed": decomposed, "width": width}
    if f"{firsts[0]}{'tall' if decomposed else 'large'}.norm.weight" not in shapes:
        arguments["branch_norm"] = False
    return f"slak_{size}", _unusual(slak.slak, arguments)


def _of_small_kernels(shapes: Shapes, depths: Shape, dims: Shape, two_convs: bool) -> tuple[str, dict[str, Any]]:
    first = "stages.0.blocks.0.mix."
    if two_convs:
        family, sizes = "shiftwise", shiftwise.VERSIONS["shiftwise"][1]
    else:
        kinds = {"slak_split": f"{first}tall_weights.0", "slak_weighted": f"{first}wide_coefficient"}
        kinds["slak_shuffled"] = "stages.0.blocks.0.squeeze.fc1.weight"
        family, sizes = next((name for name, key in kinds.items() if key in shapes), "shiftwise_v1"), slak.SIZES
    size, width = _scale(family, sizes, depths, dims)
    small = _size(shapes, f"{first}weights.0", 2)
    ghosts = _ghost_ratio(shapes, dims, even=two_convs) if family in _WITH_GHOSTS else 0.0
    arguments: dict[str, Any] = {"small_kernel_size": small, "width": width}
    arguments["kernel_sizes"] = _kernel_sizes(shapes, dims, ghosts, small, even=two_convs)
    if family in _WITH_GHOSTS:
        arguments["ghost_ratio"] = ghosts
    if family != "slak_split":
        arguments["num_paths"] = len(_names(shapes, r"stages\.0\.blocks\.0\.mix\.weights\.(\d+)"))
    if family.startswith("shiftwise"):
        slots = shapes.get(f"{first}tall_slots", ())
        arguments["num_shifts"] = slots[2] if len(slots) == 3 else _PUBLISHED_SHIFTS
    if f"{first}wide_norm.weight" not in shapes:
        arguments["branch_norm"] = False
    if (family == "shiftwise" and small == 3) or (family == "shiftwise_v1" and small == 5):
        del arguments["small_kernel_size"]  # that of the version
    function = shiftwise.shiftwise if family.startswith("shiftwise") else slak.FAMILIES[family]
    return f"{family}_{size}", _unusual(function, arguments)


def _unireplknet(shapes: Shapes, depths: Shape, dims: Shape) -> tuple[str, dict[str, Any]]:
    size = next((name for name, known in unireplknet.SIZES.items() if known == (depths, dims)), None)
    if size is None:
        raise ValueError(f"a UniRepLKNet of {depths} blocks and {dims} channels, a size without a name")
    stages = enumerate(depths)
    kernels = tuple(tuple(_kernel(shapes, f"stages.{i}.blocks.{j}.mix.") for j in range(depth)) for i, depth in stages)
    published = kernels == unireplknet.published_kernels(depths)
    return f"unireplknet_{size}", {} if published else {"kernel_sizes": kernels}


def _replknet(shapes: Shapes, blocks: Shape) -> tuple[str, dict[str, Any]]:
    firsts = [f"stages.{i}.blocks.0." for i in range(4)]
    depths = tuple(number // 2 for number in blocks)
    dims = tuple(_size(shapes, f"{first}norm.weight", 0) for first in firsts)
    small = "stages.0.blocks.0.mix.small.weight"
    found: dict[str, Any] = {"kernel_sizes": tuple(_size(shapes, f"{first}mix.large.weight", 2) for first in firsts)}
    found["small_kernel_size"] = _size(shapes, small, 2) if small in shapes else 0
    found["dw_ratio"] = _size(shapes, f"{firsts[0]}pw1.conv.weight", 0) / dims[0]
    for size, fixed in replknet.SIZES.items():
        if (fixed["depths"], fixed["dims"]) == (depths, dims):
            arguments = _unusual(replknet.replknet, found)
            return f"replknet_{size}", {name: value for name, value in arguments.items() if name not in fixed}
    raise ValueError(f"a RepLKNet of {depths} pairs of blocks and {dims} channels, which has no name")


def _kernel(shapes: Shapes, mix: str) -> int:
    return _size(shapes, f"{mix}dense.weight" if f"{mix}dense.weight" in shapes else f"{mix}large.weight", 2)


def _kernel_sizes(shapes: Shapes, dims: Shape, ghosts: float, small: int, even: bool) -> tuple[int, ...]:
    """The published kernel sizes that have as many small kernels as the file."""
    rows = [_size(shapes, f"stages.{i}.blocks.0.mix.weights.0", 0) for i in range(4)]
    slots = [row // _active(dim, ghosts, even) for row, dim in zip(rows, dims, strict=True)]
    for sizes in _PUBLISHED_KERNELS:
        if [-(-size // small) for size in sizes] == slots:
            return sizes
    what = f"{slots} kernels of {small}x{small} side by side in its stages"
    raise ValueError(f"{what}, which may stand for several sizes; make the network and give it to load_checkpoint")


def _ghost_ratio(shapes: Shapes, dims: Shape, even: bool) -> float:
    """The published share of ghosts, or the shortest decimal, that leaves as many channels as the file has."""
    first = [f"stages.{i}.blocks.0.mix." for i in range(4)]
    if f"{first[0]}wide_norm.weight" in shapes:
        active = [_size(shapes, f"{mix}wide_norm.weight", 0) for mix in first]
    elif f"{first[0]}active" in shapes:
        active = [_size(shapes, f"{mix}active", 0) for mix in first]
    else:
        return _PUBLISHED_GHOSTS[0]
    for ratio in (*_PUBLISHED_GHOSTS, *(step / 1000 for step in range(1000))):
        if active == [_active(dim, ratio, even) for dim in dims]:
            return ratio
    raise ValueError(f"{active} of {list(dims)} channels are convolved, which no share of ghosts gives")


def _active(dim: int, ratio: float, even: bool) -> int:
    return int(dim * (1 - ratio)) // 2 * 2 if even else dim - int(dim * ratio)


def _scale(family: str, sizes: Mapping[str, tuple[Shape, Shape]], depths: Shape, dims: Shape) -> tuple[str, float]:
    """Which size, and times how much; the published widths first."""
    for width in (*_PUBLISHED_WIDTHS, *(step / 100 for step in range(5, 401))):
        for size, (deep, wide) in sizes.items():
            if deep == depths and tuple(int(dim * width) for dim in wide) == dims:
                return size, width
    raise ValueError(f"a {family} of {depths} blocks and {dims} channels, a size without a name")


def _unusual(family: Callable[..., object], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that are not the defaults of ``family``."""
    usual = inspect.signature(family).parameters
    return {name: value for name, value in arguments.items() if value != usual[name].default}


def _names(shapes: Shapes, pattern: str) -> set[str]:
    return {match[1] for key in shapes if (match := re.match(pattern, key))}


def _size(shapes: Shapes, key: str, axis: int) -> int:
    shape = shapes.get(key, ())
    if len(shape) <= axis or shape[axis] < 1:
        raise ValueError(f"{key} should be a weight of {axis + 1} axes or more, and is {list(shape) or 'missing'}")
    return shape[axis]
