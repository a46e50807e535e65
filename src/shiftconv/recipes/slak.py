"""SLaK on ImageNet-1k, trained sparse as its authors train it, and the ConvNeXts that they compare it with.

The command of each run, and the top-1 that its authors report (all *paper*; - where no source at hand has it)::

    shiftconv train slak_tiny_300ep --data.folder /path/to/imagenet              # 82.5
    shiftconv train slak_small_300ep --data.folder /path/to/imagenet             # 83.8
    shiftconv train slak_base_300ep --data.folder /path/to/imagenet              # 84.0
    shiftconv train slak_tiny_120ep_k31 --data.folder /path/to/imagenet          # 81.5
    shiftconv train slak_tiny_120ep --data.folder /path/to/imagenet              # 81.6, kernels of 51x51
    shiftconv train slak_tiny_120ep_k61 --data.folder /path/to/imagenet          # 81.5
    shiftconv train slak_tiny_120ep_square_k31 --data.folder /path/to/imagenet   # -, whole kernels, as in RepLKNet
    shiftconv train slak_tiny_120ep_square_k51 --data.folder /path/to/imagenet   # -
    shiftconv train convnext_tiny_300ep --data.folder /path/to/imagenet          # 82.1
    shiftconv train convnext_small_300ep --data.folder /path/to/imagenet         # 83.1
    shiftconv train convnext_base_300ep --data.folder /path/to/imagenet          # 83.8
    shiftconv train convnext_tiny_120ep --data.folder /path/to/imagenet          # -

The folder holds ``train/`` and ``val/``. ``--sparse.density 1`` trains any of them dense, ``--sparse.rule rigl`` by
another rule. Source: Liu et al., "More ConvNets in the 2020s", ICLR 2023, arXiv:2207.03620; the commands and tables in
the README of its code.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from shiftconv.recipes.imagenet import imagenet
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Sparsity

Size = Literal["tiny", "small", "base"]
DROP_PATH: dict[Size, float] = {"tiny": 0.1, "small": 0.4, "base": 0.5}
MICRO_BATCH: dict[Size, int] = {"tiny": 128, "small": 64, "base": 32}
_KERNELS = {31: [31, 29, 27, 13], 51: [51, 49, 47, 13], 61: [61, 59, 57, 13]}

SPARSE = Sparsity(
    density=0.6,
    rule="set",
    allocate="snip_layers",
    prune_fraction=0.3,
    final_fraction=0.005,
    decay="cosine",
    every_steps=100,
    stop_fraction=1.0,
)
"""60 % of all weights are active; SNIP on the first images says how many in each layer, chance which."""


def convnext(size: Size, epochs: int = 300) -> Recipe:
    """Timm's ConvNeXt, dense."""
    return imagenet(f"convnext_{size}", {"drop_path_rate": DROP_PATH[size]}, epochs, MICRO_BATCH[size])


def slak(size: Size, epochs: int = 300) -> Recipe:
    """Sparse. SLaK-T moves half of its active weights every 2000 updates, at first, the larger ones 30 % every 100."""
    return replace(
        convnext(size, epochs),
        model=f"slak_{size}",
        sparse=replace(SPARSE, prune_fraction=0.5, every_steps=2000) if size == "tiny" else SPARSE,
        sync_batch_norm=True,
    )


def slak_kernels(kernel: int) -> Recipe:
    """SLaK-T for 120 epochs with other kernels, which shrink from stage to stage."""
    recipe = slak("tiny", 120)
    return replace(recipe, model_args={**recipe.model_args, "kernel_sizes": _KERNELS[kernel]})


def slak_square(kernel: int) -> Recipe:
    """Whole kernels beside 5x5 ones in the channels of ConvNeXt-T, dense: what the sparse stripes are compared with."""
    recipe = slak_kernels(kernel)
    arguments = {**recipe.model_args, "decomposed": False, "width": 1.0}
    return replace(recipe, model_args=arguments, sparse=Sparsity())


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"slak_{size}_300ep": partial(slak, size) for size in DROP_PATH},
    "slak_tiny_120ep": partial(slak, "tiny", 120),
    **{f"slak_tiny_120ep_k{kernel}": partial(slak_kernels, kernel) for kernel in (31, 61)},
    **{f"slak_tiny_120ep_square_k{kernel}": partial(slak_square, kernel) for kernel in (31, 51)},
    **{f"convnext_{size}_300ep": partial(convnext, size) for size in DROP_PATH},
    "convnext_tiny_120ep": partial(convnext, "tiny", 120),
}
