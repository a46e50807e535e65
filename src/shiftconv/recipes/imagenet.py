"""SLaK and ShiftwiseConv on ImageNet-1k, trained sparse as their authors train them.

The command of each run, and the top-1 its authors report (all *paper*)::

    shiftconv train slak_tiny_300ep --data.folder /path/to/imagenet          # 82.5
    shiftconv train slak_tiny_120ep --data.folder /path/to/imagenet          # 81.6
    shiftconv train slak_small_300ep --data.folder /path/to/imagenet         # 83.8
    shiftconv train slak_base_300ep --data.folder /path/to/imagenet          # 84.0
    shiftconv train shiftwise_tiny_300ep --data.folder /path/to/imagenet     # 83.39

The folder holds ``train/`` and ``val/``. ``--sparse.density 1`` trains any of them dense, ``--sparse.rule rigl`` by
another rule. Sources: Liu et al., "More ConvNets in the 2020s", ICLR 2023, arXiv:2207.03620; Li et al.,
"ShiftwiseConv", CVPR 2025, arXiv:2401.12736; the commands in their READMEs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Optim, Sparsity

Size = Literal["tiny", "small", "base"]
_DROP_PATH: dict[Size, float] = {"tiny": 0.1, "small": 0.4, "base": 0.5}


def slak(size: Size, epochs: int = 300) -> Recipe:
    """60 % of all weights are active; SNIP on the first images says how many in each layer, chance which.

    SLaK-T moves half of them every 2000 updates, at first, the larger ones 30 % every 100.
    """
    often = Sparsity(
        density=0.6,
        rule="set",
        allocate="snip_layers",
        prune_fraction=0.3,
        final_fraction=0.005,
        every_steps=100,
        stop_fraction=1.0,
    )
    return Recipe(
        model=f"slak_{size}",
        model_args={"drop_path_rate": _DROP_PATH[size]},
        data=Data(name="folder", folder="data/imagenet", image_size=224),
        epochs=epochs,
        batch_size=4096,
        optim=Optim("adamw", lr=4e-3, weight_decay=0.05, decay_norms=False, min_lr=1e-6, warmup_epochs=20),
        sparse=replace(often, prune_fraction=0.5, every_steps=2000) if size == "tiny" else often,
        label_smoothing=0.1,
    )


def shiftwise(size: Size) -> Recipe:
    """70 % of the small kernels are active, whole ones, and paths share their choice at every 131st update."""
    recipe = slak(size)
    return replace(
        recipe,
        model=f"shiftwise_{size}",
        model_args={"drop_path_rate": 0.2 if size == "tiny" else 0.4},
        optim=replace(recipe.optim, warmup_epochs=5),
        sparse=replace(
            recipe.sparse,
            density=0.7,
            granularity="kernel",
            layers="large_kernels",
            prune_fraction=0.3,
            every_steps=100,
            share_every=131,
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"slak_{size}_300ep": partial(slak, size) for size in _DROP_PATH},
    "slak_tiny_120ep": partial(slak, "tiny", 120),
    **{f"shiftwise_{size}_300ep": partial(shiftwise, size) for size in _DROP_PATH},
}
