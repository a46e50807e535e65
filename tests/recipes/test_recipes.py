"""Every recipe can be written down, read again, printed by the command line, and names a network that exists."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from shiftconv import recipes
from shiftconv.cli import main
from shiftconv.models import create_model
from shiftconv.recipes import distillation, learned_shifts, shiftwise, slak
from shiftconv.train.recipe import Recipe, differences

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
ALL = {name: recipes.get(name) for name in recipes.names()}


def test_needs_no_torch():
    code = "import sys; sys.argv[0] = 'shiftconv'; import shiftconv.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names():
    assert [*ALL] == sorted(ALL)
    with pytest.raises(ValueError, match="unknown recipe 'slak_tiny_300e'; did you mean 'slak_tiny_300ep'"):
        recipes.get("slak_tiny_300e")


@pytest.mark.parametrize("name", ALL)
def test_goes_through_plain_values_and_back(name):
    recipe = ALL[name]
    assert recipes.get(name) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_no_two_are_the_same_run():
    plain = [str(recipe.to_dict()) for recipe in ALL.values()]
    assert len({*plain}) == len(plain)


NETWORKS = {(recipe.model, str(recipe.model_args)): recipe for recipe in ALL.values()}


@pytest.mark.parametrize("model", sorted({model for model, _ in NETWORKS}))
def test_each_network_can_be_made(model):
    for (name, _), recipe in NETWORKS.items():
        if name == model:
            with torch.device("meta"):
                create_model(name, num_classes=10, **recipe.model_args)


@pytest.mark.parametrize("recipe", [r for r in ALL.values() if r.distill.teacher], ids=lambda recipe: recipe.model)
def test_each_teacher_can_be_made(recipe):
    with torch.device("meta"):
        create_model(recipe.distill.teacher, num_classes=10, **recipe.distill.teacher_args)


@pytest.mark.parametrize("name", ["slak_tiny_300ep", "convnext_tiny_300ep_from_slak_tiny", "fenet_100_480ep"])
def test_the_command_line_prints_it_whole(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", name, "--print_config"])
    assert end.value.code in (None, 0)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert Recipe.from_dict({key: printed[key] for key in ALL[name].to_dict()}) == ALL[name]


def test_options_change_a_printed_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "slak_tiny_120ep", "--sparse.density", "1", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["sparse"]["density"] == 1


def test_imagenet_runs_share_their_images():
    """Which images, and how they are resized for validation, must not differ between rows of one table."""
    runs = [recipe for recipe in ALL.values() if recipe.data.name == "folder"]
    assert {(r.data.folder, r.data.image_size, r.data.crop_share, r.data.mean) for r in runs} == {
        ("data/imagenet", 224, 0.875, "imagenet")
    }


def test_variants_differ_in_what_their_names_say():
    def between(one, other):
        return {line.split(":")[0] for line in differences(ALL[one], ALL[other])}

    assert between("slak_tiny_300ep", "slak_tiny_120ep") == {"epochs"}
    assert between("slak_tiny_120ep", "slak_tiny_120ep_k31") == {"model_args.kernel_sizes"}
    coarse = "slak_shuffled_tiny_120ep_coarse"
    assert between(coarse, f"{coarse}_same") == {"model_args.border"}
    assert between(coarse, f"{coarse}_paths") == {"model_args.num_paths"}
    assert between("shiftwise_tiny_300ep", "shiftwise_tiny_300ep_density80") == {"sparse.density"}
    assert between("fenet_100_480ep_released", "fenet_100_480ep_released_aa") == {"data.auto_augment"}


def test_noisy_digits_share_their_wrong_labels():
    runs = [ALL[f"digits_noisy{end}"] for end in ("", "_teacher", "_distilled")]
    assert len({(run.data, run.seed) for run in runs}) == 1
    student, teacher, distilled = runs
    assert replace(distilled, distill=student.distill) == student
    assert (distilled.distill.teacher, distilled.distill.teacher_args) == (teacher.model, teacher.model_args)


def test_the_page_names_every_recipe_and_no_other():
    named = {*re.findall(r"`([a-z]\w+(?:_\w+)+)`", PAGE)}
    of_grid = {name for name in ALL if re.fullmatch(r"(|shift|depthwise)resnet\d+_(cifar100?|digits)", name)}
    assert {*ALL} - of_grid - {"resnet20_reduced_digits"} <= named
    assert {name for name in named if re.search(r"_\d+ep|_cifar|_digits|digits_", name)} <= {*ALL}


def test_the_page_has_the_figures_of_the_docstrings():
    modules = (slak, shiftwise, distillation, learned_shifts)
    told = [pair for module in modules for pair in re.findall(r"shiftconv train (\w+) .*?# (-|[\d.]+)", module.__doc__)]
    ours = {name for module in modules for name in module.RECIPES}
    assert ours - {name for name, _ in told} <= {"asresnet20_cifar100"}
    for name, figure in told:
        assert re.search(rf"`{name}` \| {re.escape(figure)}[ ,]", PAGE), name
