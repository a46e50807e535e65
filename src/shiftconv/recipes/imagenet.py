"""What the ImageNet recipes of SLaK, ConvNeXt, ShiftwiseConv and their students share: ConvNeXt's training.

Source: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545, section 2.1; the defaults of ``main.py`` of SLaK, which
ShiftwiseConv took over.
"""

from typing import Any

from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Mix, Optim

FOLDER = "data/imagenet"
"""Where the images are unless ``--data.folder`` says otherwise."""


def imagenet(model: str, model_args: dict[str, Any], epochs: int, micro_batch_size: int) -> Recipe:
    """AdamW along a cosine, RandAugment, mixup and CutMix, erased rectangles, smoothed labels, an average of weights.

    Args:
        model: name of the network.
        model_args: its arguments.
        epochs: how often every image is seen.
        micro_batch_size: what one GPU of the authors computes at a time, of 4096 images per update.
    """
    return Recipe(
        model=model,
        model_args=model_args,
        data=Data(
            name="folder",
            folder=FOLDER,
            image_size=224,
            crop_share=0.875,
            interpolation="bicubic",
            color_jitter=0.4,
            auto_augment="rand-m9-mstd0.5-inc1",
            erase_prob=0.25,
            erase_mode="pixel",
        ),
        epochs=epochs,
        batch_size=4096,
        micro_batch_size=micro_batch_size,
        optim=Optim(
            "adamw",
            lr=4e-3,
            eps=1e-8,
            weight_decay=0.05,
            decay_norms=False,
            schedule="cosine",
            min_lr=1e-6,
            warmup_epochs=20,
        ),
        label_smoothing=0.1,
        mix=Mix(mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5, mode="batch"),
        ema_decay=0.9999,
    )
