"""SLaK, and its relatives whose stripes are made of small kernels.

    slak             51x5 + 5x51 + 5x5, or 51x51 + 5x5        decomposed, small_kernel_size
    slak_split       the stripes cut into 5x5 kernels         (SLaK_reg)
    slak_weighted    both stripes of the same 5x5 kernels     (SLaK_pww: each weighted, "pw weight")
    slak_shuffled    the same, the tall one in random order   (SLaK_gr_swsf_se: ghosts, squeeze-and-excitation)

Each in tiny, small, base and large, registered with timm. The published 30, 55 and 95 million parameters are those that
are not zero at a sparsity of 40 %; see docs/models.md.

Sources: Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR 2023,
arXiv:2207.03620; Li et al., "Shift-wise Conv", arXiv:2401.12736v1, and the code released with it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from timm.models import generate_default_cfgs

from shiftconv.models.large_kernel_block import CONVNEXT, BlockStyle
from shiftconv.models.large_kernel_net import Depths, LargeKernelNet, NetArgs, imagenet_cfg, network, per_stage
from shiftconv.models.registry import register
from shiftconv.nn import LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.nn.arrangement import VARIANTS, Border

SIZES: dict[str, tuple[Depths, Depths]] = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
"""Depths and channels, before they are multiplied by the width."""


def slak(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int] = (51, 49, 47, 13),
    small_kernel_size: int | None = 5,
    decomposed: bool = True,
    width: float = 1.3,
    branch_norm: bool = True,
    **trunk: Unpack[NetArgs],
) -> LargeKernelNet:
    """Large kernels beside a small one, whole or ``decomposed`` into two stripes; see ``nn.LargeKernelConv2d``.

    ``kernel_sizes``, one for each stage, ``small_kernel_size`` and ``branch_norm`` are its arguments. ``width``
    multiplies all channels. The ConvNeXt of the authors, with batch norms, is ``kernel_sizes=(7, 7, 7, 7),
    small_kernel_size=None, decomposed=False, width=1``; 0 means None as well, which ``timm.create_model`` drops.
    """
    sizes = per_stage("kernel_sizes", kernel_sizes, len(depths))

    def mix(stage: int, index: int, dim: int) -> LargeKernelConv2d:
        return LargeKernelConv2d(dim, sizes[stage], small_kernel_size or None, decomposed, branch_norm)

    return network(depths, dims, mix, width, **trunk)


def slak_split(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int] = (51, 49, 47, 13),
    small_kernel_size: int = 5,
    width: float = 1.3,
    branch_norm: bool = True,
    border: Border = "full",
    **trunk: Unpack[NetArgs],
) -> LargeKernelNet:
    """SLaK with stripes of ``small_kernel_size`` kernels side by side: 11 of 5x5 for 51x5, four rows more than it has.

    Weights of a :func:`slak` load into it, exactly. ``border`` says what of the small kernels counts at the border:
    ``full`` (padding k - 1) or ``same`` (padding k // 2, slow); see ``nn.ShiftwiseVariant``.
    """
    return _of_small_kernels("split", depths, dims, kernel_sizes, small_kernel_size, width, branch_norm, border, trunk)


def slak_weighted(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int] = (51, 49, 45, 13),
    small_kernel_size: int = 5,
    width: float = 1.3,
    branch_norm: bool = True,
    border: Border = "full",
    num_paths: int = 1,
    **trunk: Unpack[NetArgs],
) -> LargeKernelNet:
    """Both stripes of the same small kernels, each with a learned weight in either; arguments as of :func:`slak_split`.

    ``num_paths`` sets of small kernels are added.
    """
    each = (depths, dims, kernel_sizes, small_kernel_size, width, branch_norm, border)
    return _of_small_kernels("weighted", *each, trunk, num_paths=num_paths)


def slak_shuffled(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int] = (51, 49, 47, 13),
    small_kernel_size: int = 5,
    width: float = 1.3,
    branch_norm: bool = True,
    border: Border = "full",
    num_paths: int = 4,
    ghost_ratio: float = 0.3,
    **trunk: Unpack[NetArgs],
) -> LargeKernelNet:
    """Both stripes of the same small kernels, in order in the wide one, in a random order in the tall one.

    The ancestor of ShiftwiseConv, with squeeze-and-excitation in each block. ``num_paths`` sets of small kernels are
    added; ``ghost_ratio`` of the channels pass unchanged. Other arguments as of :func:`slak_split`.
    """
    each = (depths, dims, kernel_sizes, small_kernel_size, width, branch_norm, border)
    style = replace(CONVNEXT, squeeze=True)
    return _of_small_kernels("shuffled", *each, trunk, style, num_paths=num_paths, ghost_ratio=ghost_ratio)


def _of_small_kernels(
    name: str,
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int],
    small_kernel_size: int,
    width: float,
    branch_norm: bool,
    border: Border,
    trunk: NetArgs,
    style: BlockStyle = CONVNEXT,
    **arguments: Any,
) -> LargeKernelNet:
    sizes = per_stage("kernel_sizes", kernel_sizes, len(depths))
    variant = replace(VARIANTS[name], border=border)

    def mix(stage: int, index: int, dim: int) -> ShiftwiseConv2d:
        return ShiftwiseConv2d(
            dim, sizes[stage], small_kernel_size, variant=variant, branch_norm=branch_norm, **arguments
        )

    return network(depths, dims, mix, width, style, **trunk)


FAMILIES = {family.__name__: family for family in (slak, slak_split, slak_weighted, slak_shuffled)}
_SOURCES = {
    "slak": ("arXiv:2207.03620", "https://github.com/VITA-Group/SLaK"),
    "other": ("arXiv:2401.12736v1", "https://github.com/lidc54/shift-wiseConv"),
}
default_cfgs = generate_default_cfgs(
    {
        f"{family}_{size}.untrained": imagenet_cfg(*_SOURCES.get(family, _SOURCES["other"]))
        for family in FAMILIES
        for size in SIZES
    }
)
globals().update(
    {
        f"{name}_{size}": register(
            f"{name}_{size}", family, (0, 1, 2, 3), dict(depths=depths, dims=dims), FAMILIES, "getter"
        )
        for name, family in FAMILIES.items()
        for size, (depths, dims) in SIZES.items()
    }
)
