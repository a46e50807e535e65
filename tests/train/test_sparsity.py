"""Sparse runs: any recipe by two options, and what survives of them."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

from shiftconv import recipes
from shiftconv.models import create_model
from shiftconv.sparse import RULES, groups, schedule
from shiftconv.sparse.allocate import NAMES
from shiftconv.train import checkpoint as ck
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Allocation, Decay, SparseRule, Sparsity
from shiftconv.train.sparsity import is_selected

from .test_kill import SCRIPT, numbers


@pytest.fixture(scope="module")
def sparse(recipe):
    """Nine steps, an update of the masks after each second one."""
    moves = Sparsity(density=0.5, rule="rigl", allocate="snip", every_steps=2, stop_fraction=1.0)
    return replace(recipe, sparse=moves, clip_grad=1.0)


@pytest.fixture(scope="module")
def run(sparse, tmp_path_factory):
    return train(sparse, tmp_path_factory.mktemp("sparse") / "run", device="cpu")


def active(path, state=None):
    """Weights that are not zero, and entries of the masks."""
    start = ck.load(path)
    model = create_model(start.model_name, **start.model_args)
    model.load_state_dict(start.model)
    masks = groups(model)
    return sum(int((g.members[0].weight != 0).sum()) for g in masks), sum(g.size for g in masks)


def test_keeps_its_density_to_the_single_weight(run):
    for path in (run.checkpoint, run.folder / "last.pt"):
        weights, entries = active(path)
        # a weight that was regrown after the last step is still zero
        assert 0.45 * entries < weights <= round(0.5 * entries)
    assert [row["density"] for row in run.history] == pytest.approx([0.5] * 3, abs=1e-4)
    explored = [row["explored"] for row in run.history]
    assert 0.5 < explored[0] < explored[1] < explored[2] < 1
    assert "layer1.0.conv1.weight" in (run.folder / "sparsity.txt").read_text()
    assert (run.folder / "sparsity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("moment", ["epoch", "write"])
def test_kill_9_and_resume(sparse, run, tmp_path, moment):
    arguments = [json.dumps(sparse.to_dict()), str(tmp_path / "run"), moment, str(torch.get_num_threads())]
    process = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = train(sparse, tmp_path / "run", resume="auto", device="cpu")
    assert numbers(resumed.history) == numbers(run.history)
    for name in ("last.pt", "best.pt"):
        one, two = ck.load(resumed.folder / name), ck.load(run.folder / name)
        assert all(torch.equal(one.model[key], two.model[key]) for key in two.model)
        assert one.sparse["steps"] == two.sparse["steps"] > 0
        for key, mask in two.sparse["groups"].items():
            assert torch.equal(one.sparse["groups"][key]["active"], mask["active"])


def test_another_granularity_does_not_go_on(sparse, run):
    other = replace(sparse, sparse=replace(sparse.sparse, granularity="channel"))
    with pytest.raises(ValueError, match=r"another recipe: sparse.granularity: weight / channel"):
        train(other, run.folder, resume="auto", device="cpu")


def test_a_granularity_that_is_none_leaves_no_folder(sparse, tmp_path):
    wrong = replace(sparse, sparse=replace(sparse.sparse, granularity="wieght"))
    with pytest.raises(ValueError, match="unknown granularity 'wieght'; did you mean 'weight'"):
        train(wrong, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity(density=0.0), "sparse.density must be above 0 and at most 1, got 0"),
        (lambda: Sparsity(density=1.5), "sparse.density must be above 0 and at most 1, got 1.5"),
        (lambda: Sparsity(rule="rigle"), "unknown sparse rule 'rigle'; did you mean 'rigl'"),
        (lambda: Sparsity(allocate="erc"), "unknown allocation 'erc'; did you mean 'erk'"),
        (lambda: Sparsity(every_steps=0), "sparse.every_steps must be at least 1, got 0"),
        (lambda: Sparsity(density_epochs=(3, 1)), "must be two rising numbers"),
        (lambda: Recipe("m", sparse={"density": 0.5}), "sparse must be of class Sparsity"),
    ],
)
def test_bad_settings_are_told(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_recipe_names_what_there_is():
    """It has the names a second time, since a command line reads recipes before torch."""
    assert set(get_args(SparseRule)) == set(RULES)
    assert set(get_args(Allocation)) == set(NAMES) - {"weights"}
    assert get_args(Decay) == get_args(schedule.Decay)


def test_every_recipe_can_be_sparse():
    networks = {}
    for name in recipes.names():
        recipe = recipes.get(name)
        sparse = replace(recipe, sparse=replace(recipe.sparse, density=0.6, rule="rigl"))
        assert Recipe.from_dict(sparse.to_dict()) == sparse
        networks[recipe.model, str(recipe.model_args)] = recipe
    for recipe in networks.values():
        with torch.device("meta"):
            assert groups(create_model(recipe.model, **recipe.model_args))


@pytest.mark.parametrize("name", [name for name in recipes.names() if recipes.get(name).sparse.density < 1])
def test_published_recipes_find_their_layers(name):
    recipe = recipes.get(name)
    with torch.device("meta"):
        model = create_model(recipe.model, **recipe.model_args)
    masks = groups(model, recipe.sparse.granularity, lambda module: is_selected(module, recipe.sparse.layers))
    kernels = recipe.model.startswith("shiftwise")
    assert recipe.sparse.density == (0.8 if name.endswith("density80") else 0.7 if kernels else 0.6)
    paths = recipe.model_args.get("num_paths", 2 if kernels else 1)
    assert {len(group.members) for group in masks} == ({paths} if kernels else {1, paths})
    blocks = sum(map(len, (stage.blocks for stage in model.stages)))
    # all paths of each block; or its kernels and matrices (five, of slak_weighted four), four convolutions and the head
    each = 4 if recipe.model.startswith("slak_weighted") else 5
    assert len(masks) == (blocks if kernels else each * blocks + 5)
