import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from jsonargparse import ArgumentParser

from shiftconv.train.recipe import Recipe, differences
from shiftconv.train.settings import Data, Optim

RECIPE = Recipe("shiftresnet20", {"expansion": 3}, optim=Optim(schedule="step", milestones=(81, 90)))


def test_needs_no_torch():
    code = "import sys, shiftconv.train.recipe; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'numpy')))"
    code = "import sys; sys.argv[0] = 'shiftconv'; " + code  # as the command line does, which waits with the models
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        RECIPE.epochs = 3  # pyright: ignore


@pytest.mark.parametrize("cls", [Recipe, Data, Optim])
def test_each_field_is_documented(cls):
    for f in fields(cls):
        assert f"        {f.name}: " in cls.__doc__


def test_first_line_is_a_title_of_the_help():
    assert [cls.__doc__.splitlines()[0] for cls in (Recipe, Data, Optim)] == [
        "The run.", "Which images a run learns from.", "How the weights change."
    ]  # fmt: skip


def test_goes_through_plain_values_and_back():
    assert Recipe.from_dict(RECIPE.to_dict()) == RECIPE
    assert RECIPE.to_dict()["optim"]["milestones"] == [81, 90]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Data(name="digit"), "unknown data set 'digit'; did you mean 'digits'"),
        (lambda: Data(name="folder"), "needs data.folder"),
        (lambda: Data(val_share=0.5), "data.val_share must be above 0 and below 0.5, got 0.5"),
        (lambda: Data(workers=-1), "data.workers must be at least 0, got -1"),
        (lambda: Optim(schedule="cosin"), "did you mean 'cosine'"),
        (lambda: Optim(lr=0.0), "optim.lr must be above 0, got 0.0"),
        (lambda: Optim(lr=float("nan")), "optim.lr must be above 0, got nan"),
        (lambda: Optim(schedule="step"), "needs optim.milestones"),
        (lambda: Optim(milestones=(3, 2)), "must rise"),
        (lambda: Optim(name="adamw", nesterov=True), "needs sgd"),
        (lambda: Recipe("m", amp="bf-16"), "unknown amp 'bf-16'; did you mean 'bf16'"),
        (lambda: Recipe("m", epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Recipe("m", seed=-1), "seed must be at least 0"),
        (lambda: Recipe("m", label_smoothing=1.0), "label_smoothing must be at least 0 and below 1"),
        (lambda: Recipe("m", epochs=1, optim=Optim(warmup_epochs=2)), "at most the number of epochs, 1, got 2"),
        (lambda: Recipe.from_dict({"model": "m", "epoch": 3}), "unknown recipe setting 'epoch'; did you mean 'epochs'"),
        (lambda: Recipe.from_dict({"model": "m", "optim": {"rl": 3}}), "unknown optim setting 'rl'"),
        (lambda: Recipe.from_dict({"epochs": 3}), "the recipe has no 'model'"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("m", epochs=2.5), "epochs must be a whole number, got 2.5"),
        (lambda: Recipe("m", epochs=True), "epochs must be a whole number, got True"),
        (lambda: Recipe("m", compile=1), "recipe.compile must be true or false, got 1"),
        (lambda: Recipe("m", data="digits"), "data must be of class Data, got 'digits'"),
        (lambda: Recipe(3), "model must be the name"),
        (lambda: Recipe("m", {"norm": print}).to_dict(), "model_args must hold numbers"),
        (lambda: Optim(lr="0.1"), "optim.lr must be a number, got '0.1'"),
    ],
)
def test_bad_kinds(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_differences():
    other = replace(RECIPE, seed=1, optim=replace(RECIPE.optim, lr=0.2), data=Data(folder="x", workers=3))
    assert differences(RECIPE, other) == ["optim.lr: 0.1 / 0.2", "seed: 0 / 1"]


def test_command_line_and_yaml(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    parser.set_defaults(RECIPE.to_dict())
    (tmp_path / "run.yaml").write_text("epochs: 95\noptim:\n  lr: 0.3\ndata:\n  name: cifar10\n")
    line = f"--config {tmp_path}/run.yaml --optim.lr 0.05 --data.folder X --model_args.expansion 6"
    parsed = parser.parse_args([*line.split(), "--optim.milestones", "[3, 4]"]).as_dict()
    del parsed["config"]
    data = Data(name="cifar10", folder="X")
    optim = replace(RECIPE.optim, lr=0.05, milestones=(3, 4))
    assert Recipe.from_dict(parsed) == replace(RECIPE, epochs=95, data=data, optim=optim, model_args={"expansion": 6})
