"""Several processes give the numbers of one: the images, their mixing and the gradients do not depend on who works."""

from dataclasses import replace

import pytest

from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Mix, Optim, Sparsity

from .processes import distance, rows, run

RECIPE = Recipe(
    model="shiftresnet20",
    model_args={"expansion": 1},
    data=Data("digits", val_share=0.05),
    epochs=2,
    batch_size=300,  # the last one of an epoch has 59 images
    optim=Optim("sgd", lr=0.01),
    sync_batch_norm=True,
    tensorboard=False,
)
ALL = replace(
    RECIPE,
    model="convnext_atto",
    model_args={"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16], "patch_size": 2},
    mix=Mix(mixup=0.8, cutmix=1.0),
    label_smoothing=0.1,
    ema_decay=0.9,
    clip_grad=1.0,
    micro_batch_size=40,
    optim=Optim("adamw", lr=1e-3, decay_norms=False, layer_decay=0.9, warmup_epochs=1),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, by recipe."""
    made = {}

    def get(recipe):
        key = str(recipe)
        if key not in made:
            made[key] = run(recipe, tmp_path_factory.mktemp("alone") / "run", 1)
        return made[key]

    return get


def same(one, two, limit):
    for first, second in zip(rows(one), rows(two), strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert second[name] == pytest.approx(first[name], abs=limit), name
    assert distance(one, two) < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [RECIPE, replace(ALL, mix=Mix()), ALL, replace(RECIPE, sparse=Sparsity(0.5, rule="set", every_steps=2))],
    ids=["synchronised norms", "averages and clipping", "mixing and accumulation", "sparse"],
)
def test_two_processes_are_as_one(alone, recipe, tmp_path):
    same(alone(recipe), run(recipe, tmp_path / "run", 2), 1e-6)


@pytest.mark.slow
def test_in_float32_too(tmp_path):
    """Up to rounding, over the few updates in which it does not grow."""
    recipe = replace(ALL, epochs=1, optim=Optim("sgd", lr=0.01), ema_decay=None)
    one, two = (run(recipe, tmp_path / str(world), world, "float32") for world in (1, 2))
    same(one, two, 1e-6)


@pytest.mark.slow
def test_pieces_are_as_whole_weights(alone, tmp_path):
    recipe = replace(ALL, parallel="fsdp")
    same(alone(ALL), run(recipe, tmp_path / "run", 2), 1e-6)
