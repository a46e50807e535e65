"""ShiftwiseConv: large kernels made of small ones in random arrangements, in two versions of the network.

    shiftwise_v1    5x5 kernels in SLaK's blocks
    shiftwise       3x3 kernels in UniRepLKNet's blocks: SW-T, SW-S, SW-B and SW-L of the paper

Each in tiny, small, base and large, registered with timm. Channels keep their order in every block, while the authors'
networks put ghosts last: their checkpoints are reordered as they are loaded.

Source: Li et al., "ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect", CVPR 2025, arXiv:2401.12736.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack

from timm.models import generate_default_cfgs

from shiftconv.models.large_kernel_block import CONVNEXT, UNIREP
from shiftconv.models.large_kernel_net import (
    CONVS,
    PATCH,
    LargeKernelNet,
    NetArgs,
    imagenet_cfg,
    network,
    per_stage,
)
from shiftconv.models.registry import register
from shiftconv.models.slak import SIZES
from shiftconv.nn import ShiftwiseConv2d
from shiftconv.nn.arrangement import VARIANTS, Border


def shiftwise(
    depths: Sequence[int],
    dims: Sequence[int],
    version: Literal[1, 2],
    kernel_sizes: Sequence[int] = (51, 49, 47, 13),
    small_kernel_size: int | None = None,
    ghost_ratio: float = 0.23,
    num_paths: int = 2,
    num_shifts: int = 4,
    width: float = 1.0,
    branch_norm: bool = True,
    border: Border = "full",
    **trunk: Unpack[NetArgs],
) -> LargeKernelNet:
    """A network around :class:`~shiftconv.nn.ShiftwiseConv2d`, which explains the arguments.

    ``kernel_sizes`` has one for each stage. ``small_kernel_size`` is 5 in version 1 and 3 in version 2 unless given.
    ``width`` multiplies all channels. ``border`` is as in ``nn.ShiftwiseVariant``.
    """
    sizes = per_stage("kernel_sizes", kernel_sizes, len(depths))
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    small = small_kernel_size or (5 if version == 1 else 3)
    variant = replace(VARIANTS["plain"], border=border, even=version == 2)

    def mix(stage: int, index: int, dim: int) -> ShiftwiseConv2d:
        each = (sizes[stage], small, num_paths, num_shifts, ghost_ratio, variant, branch_norm)
        return ShiftwiseConv2d(dim, *each)

    style, entry = (CONVNEXT, PATCH) if version == 1 else (UNIREP, CONVS)
    return network(depths, dims, mix, width, style, entry, **trunk)


VERSIONS = {
    "shiftwise_v1": (1, SIZES),
    "shiftwise": (2, SIZES | {"tiny": ((3, 3, 18, 3), (80, 160, 320, 640))}),
}
_SOURCE = ("arXiv:2401.12736", "https://github.com/lidc54/shift-wiseConv")
default_cfgs = generate_default_cfgs(
    {f"{name}_{size}.untrained": imagenet_cfg(*_SOURCE) for name, (_, sizes) in VERSIONS.items() for size in sizes}
)
globals().update(
    {
        f"{name}_{size}": register(
            f"{name}_{size}",
            shiftwise,
            (0, 1, 2, 3),
            dict(depths=depths, dims=dims, version=version),
            feature_cls="getter",
        )
        for name, (version, sizes) in VERSIONS.items()
        for size, (depths, dims) in sizes.items()
    }
)
