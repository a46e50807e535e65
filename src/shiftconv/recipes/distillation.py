"""ConvNets of small kernels that learn from SLaK, on ImageNet-1k.

The command of each run, and the top-1 that its authors report (all *paper*; - where no source at hand has it).
Each also needs the teacher's weights, ``--distill.teacher_checkpoint slak_tiny.pth``, released or of a run of ours::

    shiftconv train convnext_tiny_300ep_from_slak_tiny --data.folder /path/to/imagenet      # 83.1
    shiftconv train convnext_small_300ep_from_slak_small --data.folder /path/to/imagenet    # 84.3
    shiftconv train convnext_tiny_120ep_from_slak_tiny --data.folder /path/to/imagenet      # -
    shiftconv train convnext_tiny_120ep_from_slak_tiny_fd --data.folder /path/to/imagenet   # -, by features
    shiftconv train resnet50_120ep_from_slak_tiny --data.folder /path/to/imagenet           # -

The students of NKD are the ConvNeXts of the authors' command, with batch norms; that of features is timm's.

Source: Huang et al., "Are Large Kernels Better Teachers than Transformers for ConvNets?", ICML 2023, arXiv:2305.19412;
the commands and tables in the README of SLaK's code, and its ``scripts_dis_NKD/test.sh``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from shiftconv.recipes.slak import convnext
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Distillation

# What `--kernel_size 7 7 7 7 100` makes of SLaK's code.
_BATCH_NORM_CONVNEXT: dict[str, Any] = {
    "kernel_sizes": [7, 7, 7, 7],
    "small_kernel_size": 0,
    "decomposed": False,
    "width": 1.0,
}
# Their `--T 3.0` does nothing to NKD: its temperature and weight are 1.
_NKD = Distillation(logits="nkd", temperature=1.0, alpha=1.0, keep_task_loss=False)


def distilled_convnext(size: Literal["tiny", "small"], epochs: int = 300) -> Recipe:
    """By NKD alone: the labels enter through its target part. The weights' average is nowhere looked at."""
    return replace(
        convnext(size, epochs),
        model=f"slak_{size}",
        model_args={"drop_path_rate": 0.1, **_BATCH_NORM_CONVNEXT},
        batch_size=2048 if size == "tiny" else 4096,
        micro_batch_size=64,
        distill=replace(_NKD, teacher=f"slak_{size}"),
        sync_batch_norm=True,
        ema_decay=None,
    )


def convnext_by_features() -> Recipe:
    """The last feature maps are compared, beside the usual loss."""
    recipe = distilled_convnext("tiny", 120)
    return replace(
        recipe,
        model="convnext_tiny",
        model_args={"drop_path_rate": 0.1},
        distill=replace(recipe.distill, logits="none", features="smooth_l1", feature_weight=3e-5, keep_task_loss=True),
        sync_batch_norm=False,
    )


def distilled_resnet50() -> Recipe:
    """By KD at temperature 3: 10 % of the loss, the usual one has the rest."""
    return replace(
        distilled_convnext("tiny", 120),
        model="resnet50",
        model_args={},
        batch_size=1024,
        distill=Distillation(teacher="slak_tiny", logits="kd", temperature=3.0, alpha=0.1),
        sync_batch_norm=False,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "convnext_tiny_300ep_from_slak_tiny": partial(distilled_convnext, "tiny"),
    "convnext_small_300ep_from_slak_small": partial(distilled_convnext, "small"),
    "convnext_tiny_120ep_from_slak_tiny": partial(distilled_convnext, "tiny", 120),
    "convnext_tiny_120ep_from_slak_tiny_fd": convnext_by_features,
    "resnet50_120ep_from_slak_tiny": distilled_resnet50,
}
