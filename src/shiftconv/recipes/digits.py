"""What a teacher is good for, offline: digits of which 40 % have a wrong label in training.

    shiftconv train digits_noisy                    # a small network from the labels alone
    shiftconv train digits_noisy_teacher            # a larger one, from the same labels
    shiftconv train digits_noisy_distilled --teacher-checkpoint runs/digits_noisy_teacher/best.pt

The labels of the validation and test images are right. Figures: ``docs/distillation.md``.
"""

from collections.abc import Callable
from dataclasses import replace

from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Distillation, Mix, Optim

LABEL_NOISE = 0.4


def digits_noisy() -> Recipe:
    """A ConvNeXt of four blocks, 62642 parameters."""
    return Recipe(
        model="convnext_atto",
        model_args={"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
        data=Data(name="digits", label_noise=LABEL_NOISE),
        epochs=30,
        batch_size=64,
        optim=Optim(name="adamw", lr=3e-3, weight_decay=0.05, decay_norms=False, schedule="cosine", warmup_epochs=1),
        channels_last=True,
    )


def digits_noisy_teacher() -> Recipe:
    """A residual network with five times as many parameters; it trains with mixed images."""
    return replace(
        digits_noisy(),
        model="resnet18",
        model_args={"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]},
        mix=Mix(mixup=1.0),
    )


def digits_noisy_distilled() -> Recipe:
    """The small network again; nine tenths of its loss come from the teacher."""
    teacher = digits_noisy_teacher()
    distill = Distillation(
        teacher=teacher.model, teacher_args=teacher.model_args, logits="kd", temperature=4.0, alpha=0.9
    )
    return replace(digits_noisy(), distill=distill)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (digits_noisy, digits_noisy_teacher, digits_noisy_distilled)
}
