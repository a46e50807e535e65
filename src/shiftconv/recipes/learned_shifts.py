"""Networks of learned shifts: AS-ResNet (active) and FE-Net (sparse).

The command of each run, and the top-1 that its authors report (all *paper*; - where they report none)::

    shiftconv train asresnet_w32_90ep --data.folder /path/to/imagenet            # 64.1
    shiftconv train asresnet_w50_90ep --data.folder /path/to/imagenet            # 69.9
    shiftconv train asresnet_w68_90ep --data.folder /path/to/imagenet            # 72.2
    shiftconv train fenet_100_480ep --data.folder /path/to/imagenet              # 72.9
    shiftconv train fenet_137_480ep --data.folder /path/to/imagenet              # 75.0
    shiftconv train fenet_100_480ep_released --data.folder /path/to/imagenet     # 73.6, wider than the paper's
    shiftconv train fenet_137_480ep_released --data.folder /path/to/imagenet     # 75.7
    shiftconv train fenet_100_480ep_released_aa --data.folder /path/to/imagenet  # 73.9, AutoAugment
    shiftconv train fenet_137_480ep_released_aa --data.folder /path/to/imagenet  # 76.6
    shiftconv train asresnet20_cifar10 --model_args.expansion 1                  # -

AS-ResNet's schedule on ImageNet is released nowhere: the name of its weights, ``iter_450360``, says 90 epochs of 256
images, and the rest here is the usual training of a ResNet, with the Nesterov momentum of the authors' CIFAR files.

Source: Jeon and Kim, NeurIPS 2018, arXiv:1806.07370; Chen et al., CVPR 2019, arXiv:1903.05285; the code of both.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from shiftconv.recipes.imagenet import FOLDER
from shiftconv.recipes.shiftresnet import cifar
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Optim

_IMAGENET = Data(name="folder", folder=FOLDER, image_size=224, interpolation="bilinear", color_jitter=0.0)


def asresnet(width: Literal[32, 50, 68]) -> Recipe:
    """Crops and mirrored images only, as for ResNet."""
    return Recipe(
        model=f"asresnet_w{width}",
        data=_IMAGENET,
        epochs=90,
        batch_size=256,
        optim=Optim(
            "sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, decay_norms=False,
            schedule="step", milestones=(30, 60), gamma=0.1, offset_lr_scale=0.01, normalize_offsets=True,
        ),
    )  # fmt: skip


def asresnet_cifar(classes: Literal[10, 100]) -> Recipe:
    """64000 updates of 128 images, the rate drops after 32000 and 48000: the epochs of ShiftResNet."""
    recipe = cifar("resnet", 20, classes)
    optim = replace(recipe.optim, nesterov=True, decay_norms=False, offset_lr_scale=0.01, normalize_offsets=True)
    return replace(recipe, model="asresnet20", model_args={"width": 16, "expansion": 3}, optim=optim)


def fenet(width: Literal[100, 137]) -> Recipe:
    """Crops and mirrored images only, and dropout before the classifier."""
    return Recipe(
        model=f"fenet_{width}",
        model_args={"drop_rate": 0.2},
        data=_IMAGENET,
        epochs=480,
        batch_size=1024,
        optim=Optim(
            "sgd",
            lr=0.6,
            momentum=0.9,
            nesterov=True,
            weight_decay=4e-5,
            schedule="cosine",
            min_lr=1e-5,
            offset_decay=4e-5,
            freeze_offsets_after=0.5,
        ),
    )


def fenet_released(width: Literal[100, 137], auto_augment: str | None = None) -> Recipe:
    """The network of the released code, whose logs show these accuracies."""
    recipe = fenet(width)
    return replace(
        recipe,
        model_args={**recipe.model_args, "expand": "output"},
        data=replace(recipe.data, auto_augment=auto_augment),
    )


_ASRESNETS: tuple[Literal[32, 50, 68], ...] = (32, 50, 68)
_FENETS: tuple[Literal[100, 137], ...] = (100, 137)
RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"asresnet_w{width}_90ep": partial(asresnet, width) for width in _ASRESNETS},
    "asresnet20_cifar10": partial(asresnet_cifar, 10),
    "asresnet20_cifar100": partial(asresnet_cifar, 100),
    **{f"fenet_{width}_480ep": partial(fenet, width) for width in _FENETS},
    **{f"fenet_{width}_480ep_released": partial(fenet_released, width) for width in _FENETS},
    **{f"fenet_{width}_480ep_released_aa": partial(fenet_released, width, "original") for width in _FENETS},
}
