"""The three recipes of noisy digits: one small network, its teacher, and what it learns from it."""

from dataclasses import replace

import torch

from shiftconv import recipes
from shiftconv.models import create_model
from shiftconv.models.convert import load_checkpoint
from shiftconv.train.data import open_data
from shiftconv.train.loop import train
from shiftconv.train.recipe import differences

STUDENT, TEACHER, DISTILLED = (recipes.get(f"digits_noisy{end}") for end in ("", "_teacher", "_distilled"))


def parts(one, other):
    return {line.split(".")[0].split(":")[0] for line in differences(one, other)}


def test_they_differ_in_the_teacher_and_its_training_only():
    assert parts(STUDENT, DISTILLED) == {"distill"}
    assert parts(STUDENT, TEACHER) == {"model", "model_args", "mix"}
    assert STUDENT.distill.teacher is TEACHER.distill.teacher is None
    assert (DISTILLED.distill.teacher, DISTILLED.distill.teacher_args) == (TEACHER.model, TEACHER.model_args)


def test_the_teacher_is_five_times_as_large():
    student, teacher = (
        sum(p.numel() for p in create_model(recipe.model, num_classes=10, **recipe.model_args).parameters())
        for recipe in (STUDENT, TEACHER)
    )
    assert student == 62642
    assert 4.5 < teacher / student < 5.5


def test_wrong_labels_are_in_the_training_part_only():
    noisy, right = open_data(STUDENT.data), open_data(replace(STUDENT.data, label_noise=0.0))
    assert (noisy.train.labels != right.train.labels).double().mean().item() == round(0.4 * 1259) / 1259
    assert torch.equal(noisy.val.labels, right.val.labels)
    assert torch.equal(noisy.test.labels, right.test.labels)


def test_one_epoch_with_a_teacher(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = create_model(TEACHER.model, num_classes=10, **TEACHER.model_args)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pt")
    distill = replace(DISTILLED.distill, teacher_checkpoint=str(tmp_path / "teacher.pt"))
    recipe = replace(DISTILLED, epochs=1, distill=distill, tensorboard=False)
    result = train(recipe, tmp_path / "run", device="cpu")
    alone = train(replace(STUDENT, epochs=1, tensorboard=False), tmp_path / "alone", device="cpu")
    found, without = (load_checkpoint(None, run.checkpoint).state_dict() for run in (result, alone))
    assert found.keys() == without.keys()  # nothing of the teacher is left in it
    assert any(not torch.equal(value, without[name]) for name, value in found.items())
