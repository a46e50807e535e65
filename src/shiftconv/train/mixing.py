"""Mixup and CutMix of a recipe, by timm, with the same draws on however many processes."""

import numpy as np
from timm.data.mixup import Mixup
from torch import Tensor

from shiftconv.train.recipe import Recipe
from shiftconv.train.seed import Stream, derive


class Mixer:
    """Blends and pastes the images of a micro-batch, whose partners are dealt to it; see ``Share.mirrored``.

    Args:
        recipe: its ``mix``, ``label_smoothing`` and seed.
        classes: of the data.
        rank: of this process.
    """

    def __init__(self, recipe: Recipe, classes: int, rank: int) -> None:
        mix = recipe.mix
        self._seed, self._rank, self._alike = recipe.seed, rank, mix.mode == "batch"
        self._mixup = Mixup(
            mixup_alpha=mix.mixup,
            cutmix_alpha=mix.cutmix,
            cutmix_minmax=None if mix.cutmix_minmax is None else list(mix.cutmix_minmax),
            prob=mix.prob,
            switch_prob=mix.switch_prob,
            mode=mix.mode,
            label_smoothing=recipe.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, update: int, number: int) -> tuple[Tensor, Tensor]:
        """Mixed images, in the place of the given ones, and shares of the classes ``[B, K]``.

        One weight holds for all images of an update, on all processes, unless each pair or image has its own.

        Args:
            images: ``[B, C, H, W]``, an even number of them.
            labels: int64 ``[B]``.
            epoch: from 0.
            update: of the epoch, from 0.
            number: of the micro-batch in its update, from 0.
        """
        own = () if self._alike else (self._rank, number)
        np.random.seed(derive(self._seed, Stream.MIX, epoch, update, *own))  # noqa: NPY002 - timm draws from it
        return self._mixup(images, labels)
