"""What the loop does in an update and after an epoch, against the same written out by hand."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from shiftconv.cli import main
from shiftconv.models import create_model
from shiftconv.nn import offset_parameters
from shiftconv.train import checkpoint as ck
from shiftconv.train.data import open_data
from shiftconv.train.device import Compute
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe
from shiftconv.train.seed import Stream, derive, seeded
from shiftconv.train.settings import Data, Mix, Optim
from shiftconv.train.trainer import Trainer

CPU = Compute(torch.device("cpu"))
NET = {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16], "patch_size": 2}
RECIPE = Recipe(
    model="convnext_atto",
    model_args=NET,
    data=Data("digits", augment=False),
    epochs=1,
    batch_size=400,
    optim=Optim("sgd", lr=0.05, momentum=0.0, weight_decay=0.0, schedule="constant"),
    tensorboard=False,
)


@pytest.fixture(scope="module")
def digits():
    return open_data(RECIPE.data)


def trainer(recipe, digits):
    with seeded(derive(recipe.seed, Stream.WEIGHTS)):
        return Trainer(recipe, digits, CPU)


def by_hand(start, made, averages=None, clip=None):
    """Plain gradient descent over the same images; the last one keeps its images."""
    average = copy.deepcopy(start)
    for images, labels, share, _ in made.loader.steps():
        assert share == 1
        loss = F.cross_entropy(start(images), labels)
        gradients = torch.autograd.grad(loss, [*start.parameters()])
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = 1.0 if clip is None else min(1.0, clip / float(norm))
        with torch.no_grad():
            for parameter, gradient in zip(start.parameters(), gradients, strict=True):
                parameter -= 0.05 * factor * gradient
            for mean, parameter in zip(average.parameters(), start.parameters(), strict=True):
                mean.lerp_(parameter, 1 - (averages or 0))
    return start, average


def close(one, two):
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_epoch_is_gradient_descent(digits, clip):
    made = trainer(replace(RECIPE, ema_decay=0.6, clip_grad=clip), digits)
    weights, average = by_hand(copy.deepcopy(made.model), made, 0.6, clip)
    row = made.run_epoch()
    close(made.model, weights)
    close(made.ema.module, average)
    logits = average.eval()(torch.cat([images for images, _ in digits.loader("val", 400)]))
    labels = torch.cat([labels for _, labels in digits.loader("val", 400)])
    assert row["ema_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.mark.parametrize("mix", [Mix(), Mix(mixup=0.8, cutmix=1.0), Mix(cutmix=1.0, prob=0.5)])
def test_accumulation_changes_no_number(digits, mix):
    made = [trainer(replace(RECIPE, mix=mix, micro_batch_size=size), digits) for size in (None, 64)]
    rows = [each.run_epoch() for each in made]
    close(made[0].model, made[1].model)
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-5)
    assert rows[1]["val_accuracy"] == pytest.approx(rows[0]["val_accuracy"], abs=0.006)


def test_mixing_is_on(digits):
    plain, mixed = (trainer(replace(RECIPE, mix=mix), digits).run_epoch() for mix in (Mix(), Mix(mixup=1.0)))
    assert plain["train_loss"] != mixed["train_loss"]


def test_offsets_learn_as_the_recipe_says():
    recipe = replace(
        RECIPE,
        model="asresnet20",
        model_args={"width": 8},
        batch_size=630,
        epochs=2,
        optim=replace(RECIPE.optim, offset_lr_scale=0.1, normalize_offsets=True, freeze_offsets_after=0.5),
    )
    made = trainer(recipe, open_data(recipe.data))
    before = [offset.detach().clone() for offset in offset_parameters(made.model)]
    made.run_epoch()
    updates = len(made.loader)
    middle = [offset.detach().clone() for offset in offset_parameters(made.model)]
    for old, new in zip(before, middle, strict=True):
        length = (new - old).norm(dim=1)
        assert length.max() <= updates * 0.05 * 0.1 * (1 + 1e-5)
        assert length.max() > 0
    made.run_epoch()
    assert all(torch.equal(old, new) for old, new in zip(middle, offset_parameters(made.model), strict=True))


def test_starting_from_a_file(tmp_path, digits):
    source = create_model("convnext_atto", num_classes=10, **NET)
    path = tmp_path / "a.pth"
    torch.save(source.state_dict(), path)
    made = trainer(replace(RECIPE, weights=str(path)), digits)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), source.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not fit"):
        trainer(replace(RECIPE, model_args={**NET, "dims": [8, 16, 16, 24]}, weights=str(path)), digits)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer(replace(RECIPE, weights=str(tmp_path / "b.pth")), digits)


def test_a_head_for_other_classes_stays_new(tmp_path, digits):
    recipe = replace(RECIPE, model="shiftresnet20", model_args={"expansion": 1})
    run = train(replace(recipe, epochs=1), tmp_path / "run", device="cpu")
    found = ck.load(run.checkpoint).model
    network = create_model("shiftresnet20", expansion=1, num_classes=3)
    head = network.get_classifier().weight.clone()
    from shiftconv.train.network import _start_from

    _start_from(network, run.checkpoint)
    assert torch.equal(network.get_classifier().weight, head)
    own = network.state_dict()
    assert all(torch.equal(own[name], found[name]) for name in own if own[name].shape == found[name].shape)


def test_head_scale(digits):
    one, two = (trainer(replace(RECIPE, head_scale=scale), digits).model for scale in (1.0, 0.1))
    torch.testing.assert_close(two.get_classifier().weight, 0.1 * one.get_classifier().weight)
    assert torch.equal(one.stem[0].weight, two.stem[0].weight)


def test_the_better_of_weights_and_average_is_tested(tmp_path, capsys):
    recipe = replace(RECIPE, model="shiftresnet20", model_args={"expansion": 1}, epochs=2, ema_decay=0.5)
    recipe = replace(recipe, optim=Optim("adamw", lr=0.02, schedule="constant"))
    result = train(recipe, tmp_path / "run", device="cpu")
    row = result.history[result.best_epoch - 1]
    assert result.averaged == ((row["ema_accuracy"], -row["ema_loss"]) > (row["val_accuracy"], -row["val_loss"]))
    assert result.val.loss == row["ema_loss" if result.averaged else "val_loss"]
    assert max(max(r["val_accuracy"], r["ema_accuracy"]) for r in result.history) == result.val.top1
    assert ("averaged weights" in str(result)) == result.averaged
    main(["eval", str(result.checkpoint), "--device", "cpu", *(["--ema", "true"] if result.averaged else [])])
    assert f"{result.test.top1:.2%}" in capsys.readouterr().out
