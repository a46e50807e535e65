"""UniRepLKNet, whose blocks and stem ShiftwiseConv has: its baseline, and a teacher.

    unireplknet_a, f, p, n, t, s, b, l, xl    13x13 and 3x3 kernels

Source: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-
Series and Image Recognition", CVPR 2024, arXiv:2311.15599.
"""

from collections.abc import Sequence
from typing import Any, Unpack

from timm.models import generate_default_cfgs

from shiftconv.models.large_kernel_block import UNIREP
from shiftconv.models.large_kernel_net import CONVS, Depths, LargeKernelNet, NetArgs, imagenet_cfg, network, per_stage
from shiftconv.models.registry import register
from shiftconv.nn import DilatedReparamConv2d, LargeKernelConv2d

SIZES: dict[str, tuple[Depths, Depths]] = {
    "a": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "f": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "p": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "n": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "t": ((3, 3, 18, 3), (80, 160, 320, 640)),
    "s": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "b": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "l": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xl": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
_BIG, _SMALL = 13, 3
_STAGE = {  # kernels of the third stage's blocks, in turn
    6: (_BIG,),
    8: (_BIG,),
    18: (_BIG, _SMALL),
    27: (_BIG, _SMALL, _SMALL),
}


def unireplknet(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    **trunk: Unpack[NetArgs],
) -> LargeKernelNet:
    """Blocks of a large kernel with dilated ones beside it, or of a plain small kernel.

    ``kernel_sizes`` has the kernel of every block of each stage: those of 7 and more are a
    :class:`~shiftconv.nn.DilatedReparamConv2d`, smaller ones plain. None: the published ones, 3 in the first stage, 13
    in the others, where of the deeper networks' third stage every second or third block has it and the rest have 3.
    """
    given = published_kernels(depths) if kernel_sizes is None else per_stage("kernel_sizes", kernel_sizes, len(depths))
    if any(isinstance(sizes, int) for sizes in given):
        raise TypeError(f"kernel_sizes must have a sequence for each stage, one kernel for each block, got {[*given]}")
    for sizes, depth in zip(given, depths, strict=True):
        if len(sizes) != depth:
            raise ValueError(f"kernel_sizes must have {list(depths)} entries by stage, got {[*map(len, given)]}")

    def mix(stage: int, index: int, dim: int) -> DilatedReparamConv2d | LargeKernelConv2d:
        size = given[stage][index]
        if size >= 7:
            return DilatedReparamConv2d(dim, size)
        return LargeKernelConv2d(dim, size, None, decomposed=False, branch_norm=False)

    return network(depths, dims, mix, 1.0, UNIREP, CONVS, **trunk)


def published_kernels(depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The kernel of every block of each stage.

    Raises:
        ValueError: depths that are not published.
    """
    if len(depths) != 4 or depths[2] not in _STAGE:
        raise ValueError(f"give kernel_sizes: none are published for depths {list(depths)}")
    turns = _STAGE[depths[2]]
    third = tuple(turns[i % len(turns)] for i in range(depths[2]))
    return (_SMALL,) * depths[0], (_BIG,) * depths[1], third, (_BIG,) * depths[3]


_ORIGIN = ("arXiv:2311.15599", "https://github.com/AILab-CVC/UniRepLKNet")
_HUB = "DingXiaoH/UniRepLKNet"
_FILES = {  # by tag, as the authors published them
    "in1k": {"a": "acc77.03", "f": "acc78.58", "p": "acc80.23", "n": "acc81.64", "t": "acc83.21", "s": "acc83.91"},
    "in22k_ft_in1k_384": {"s": "acc86.44", "b": "acc87.40", "l": "acc87.88", "xl": "acc87.96"},
    "in22k": dict.fromkeys(("s", "b", "l", "xl"), ""),
}


def _cfgs() -> dict[str, Any]:
    cfgs: dict[str, Any] = {}
    for tag, files in _FILES.items():
        for size, accuracy in files.items():
            name = f"unireplknet_{size}"
            if tag == "in1k":
                more: dict[str, Any] = dict(hf_hub_filename=f"{name}_in1k_224_{accuracy}.pth")
            elif tag == "in22k":
                more = dict(hf_hub_filename=f"{name}_in22k_pretrain.pth", num_classes=21841)
            else:
                more = dict(hf_hub_filename=f"{name}_in22k_to_in1k_384_{accuracy}.pth", crop_pct=1.0)
                more |= dict(input_size=(3, 384, 384), pool_size=(12, 12))
            cfgs[f"{name}.{tag}"] = imagenet_cfg(*_ORIGIN) | dict(hf_hub_id=_HUB, license="apache-2.0") | more
    return cfgs


default_cfgs = generate_default_cfgs(_cfgs())
globals().update(
    {
        f"unireplknet_{size}": register(
            f"unireplknet_{size}", unireplknet, (0, 1, 2, 3), dict(depths=depths, dims=dims), feature_cls="getter"
        )
        for size, (depths, dims) in SIZES.items()
    }
)
