"""What a teacher is good for, offline: digits of which 40 % have a wrong label in training.

    shiftconv train digits_noisy                    # a small network from the labels alone
    shiftconv train digits_noisy_teacher            # a larger one, from the same labels
    shiftconv train digits_noisy_distilled --distill.teacher_checkpoint runs/digits_noisy_teacher/best.pt

The labels of the validation and test images are right.
"""

from collections.abc import Callable
from dataclasses import replace

from shiftconv.recipes.shiftresnet import digits
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Distillation

LABEL_NOISE = 0.4


def digits_noisy() -> Recipe:
    """The shift network with one third of the usual expansion, 34906 parameters."""
    recipe = digits("shiftresnet", 20)
    return replace(
        recipe, model_args={"expansion": 1}, data=replace(recipe.data, label_noise=LABEL_NOISE), label_smoothing=0.0
    )


def digits_noisy_teacher() -> Recipe:
    """A residual network with eight times as many parameters."""
    return replace(digits_noisy(), model="resnet20", model_args={})


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
