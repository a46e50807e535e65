"""Shift-wise convolution on ImageNet-1k: the first version's networks, which are SLaKs, and ShiftwiseConv.

The command of each run, and the top-1 that its authors report (all *paper*; - where they report none). The rows are
those of the first version's README::

    shiftconv train shiftwise_tiny_300ep --data.folder /path/to/imagenet              # 83.39
    shiftconv train shiftwise_tiny_300ep_density80 --data.folder /path/to/imagenet    # 83.46
    shiftconv train shiftwise_small_300ep --data.folder /path/to/imagenet             # -
    shiftconv train shiftwise_base_300ep --data.folder /path/to/imagenet              # -
    shiftconv train slak_split_tiny_300ep --data.folder /path/to/imagenet             # 82.482, row 3
    shiftconv train slak_weighted_tiny_300ep --data.folder /path/to/imagenet          # 82.27, row 4
    shiftconv train slak_shuffled_tiny_300ep --data.folder /path/to/imagenet          # 82.27 and 82.38, rows 5 and 6
    shiftconv train slak_shuffled_tiny_120ep_coarse --data.folder /path/to/imagenet   # 81.36, row 7
    shiftconv train slak_shuffled_tiny_120ep_coarse_same --data.folder /path/to/imagenet  # 81.26, row 8
    shiftconv train slak_shuffled_tiny_120ep_coarse_paths --data.folder /path/to/imagenet # 82.05, row 9

The networks of rows 5 to 9 are in no version of the authors' repository; ``slak_shuffled`` is the nearest that is. It
has squeeze-and-excitation in its blocks, which theirs need not have had. Row 3 is SLaK-T's released weights cut into
small kernels, not a training. ``docs/recipes.md`` says more.

Source: Li et al., "ShiftwiseConv", CVPR 2025, arXiv:2401.12736, and its first version, "Shift-ConvNets"; the commands
and tables in the READMEs of its code.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from shiftconv.recipes.slak import DROP_PATH, SPARSE, Size, slak
from shiftconv.train.recipe import Recipe

# Three GPUs of the authors, which accumulate gradients until nearly 4096 images have come.
_KERNELS_1 = {"slak_weighted": [51, 49, 45, 13], "slak_shuffled": [51, 49, 43, 13]}
_MICRO_BATCH_1 = {"slak_weighted": 48, "slak_shuffled": 64}


def shiftwise(size: Size, density: float = 0.7) -> Recipe:
    """Whole small kernels are active or not, and paths share their choice at every 131st update of the masks."""
    recipe = slak(size)
    return replace(
        recipe,
        model=f"shiftwise_{size}",
        model_args={"drop_path_rate": 0.2 if size == "tiny" else 0.4},
        micro_batch_size=64,
        optim=replace(recipe.optim, warmup_epochs=5),
        sparse=replace(SPARSE, density=density, granularity="kernel", layers="large_kernels", share_every=131),
        ema_decay=None,
    )


def split() -> Recipe:
    """SLaK-T's own training of the network into which its weights can be cut."""
    return replace(slak("tiny"), model="slak_split_tiny")


def shared(network: Literal["slak_weighted", "slak_shuffled"], epochs: int = 300) -> Recipe:
    """SLaK-T's training of a network whose two stripes share 5x5 kernels, in one path and without ghost channels."""
    recipe = slak("tiny", epochs)
    plain: dict[str, Any] = {"num_paths": 1, "ghost_ratio": 0.0} if network == "slak_shuffled" else {}
    return replace(
        recipe,
        model=f"{network}_tiny",
        model_args={**recipe.model_args, "kernel_sizes": _KERNELS_1[network], **plain},
        batch_size=4032,
        micro_batch_size=_MICRO_BATCH_1[network],
    )


def coarse(border: Literal["full", "same"] = "full", num_paths: int = 1) -> Recipe:
    """Whole small kernels are active or not, and of all other layers single weights.

    Args:
        border: what of the small kernels counts there: padding k - 1 is ``full``, k // 2 ``same``.
        num_paths: sets of small kernels that are added.
    """
    recipe = shared("slak_shuffled", 120)
    return replace(
        recipe,
        model_args={**recipe.model_args, "border": border, "num_paths": num_paths},
        sparse=replace(recipe.sparse, granularity="kernel"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"shiftwise_{size}_300ep": partial(shiftwise, size) for size in DROP_PATH},
    "shiftwise_tiny_300ep_density80": partial(shiftwise, "tiny", 0.8),
    "slak_split_tiny_300ep": split,
    "slak_weighted_tiny_300ep": partial(shared, "slak_weighted"),
    "slak_shuffled_tiny_300ep": partial(shared, "slak_shuffled"),
    "slak_shuffled_tiny_120ep_coarse": coarse,
    "slak_shuffled_tiny_120ep_coarse_same": partial(coarse, "same"),
    "slak_shuffled_tiny_120ep_coarse_paths": partial(coarse, num_paths=4),
}
