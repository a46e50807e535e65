"""Allocations against oracles in plain numpy: totals to the entry, and which entries come first."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shiftconv.sparse import Calibration, Schedule, SparseTraining, groups
from shiftconv.sparse.allocate import allocate, erk, quotas, uniform
from shiftconv.sparse.calibration import Probe

from .cases import Fours, calibration, made, sgd

often = settings(deadline=None, max_examples=60, derandomize=True)


def seeded(group=None):
    return torch.Generator().manual_seed(0)


def smooth(seed=0):
    """A network in float64 without norms, and its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    return model.double()


def data(count=1, size=5):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 2, 3, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def first_masks(model, density, by, batches=None, granularity="weight"):
    found = groups(model, granularity)
    probe = Probe(model, Calibration(batches)) if batches else None
    return {g.name: m.numpy() for g, m in zip(found, allocate(found, density, by, seeded, probe), strict=True)}


@often
@given(st.floats(0.001, 1.0), st.sampled_from(["uniform", "erk"]), st.sampled_from(["weight", "kernel", "channel"]))
def test_totals_are_the_nearest_whole_number(density, by, granularity):
    masks = first_masks(made(), density, by, granularity=granularity)
    total = sum(mask.size for mask in masks.values())
    assert sum(mask.sum() for mask in masks.values()) == max(round(density * total), len(masks))
    assert all(mask.any() for mask in masks.values())


@pytest.mark.parametrize("by", ["snip", "snip_layers", "grasp"])
def test_totals_of_those_that_look_at_data(by):
    for density in (1e-4, 0.013, 0.25, 0.5, 0.77, 1.0):
        masks = first_masks(smooth(), density, by, data())
        total = 24 + 48 + 12
        assert sum(mask.sum() for mask in masks.values()) == max(round(density * total), 3)
        assert all(mask.any() for mask in masks.values())


def test_uniform_is_uniform():
    masks = first_masks(made(), 0.3, "uniform")
    assert all(abs(mask.sum() - 0.3 * mask.size) < 1 for mask in masks.values())


@often
@given(st.floats(0.01, 0.999))
def test_erk_follows_its_formula(density):
    """All layers that are not dense have densities in proportion to (O + I + kh + kw) / (O I kh kw)."""
    found = groups(made(), "weight")
    sizes = np.array([group.size for group in found])
    raw = np.array([sum(g.members[0].weight.shape) / g.size for g in found])
    shares = np.array(erk(found, density))
    assert shares.sum() == pytest.approx(density * sizes.sum()) and (shares <= sizes * (1 + 1e-12)).all()
    each = shares / sizes / raw
    open_ = shares < sizes * (1 - 1e-9)
    if open_.any():
        np.testing.assert_allclose(each[open_], each[open_][0])
        assert (each[open_][0] * raw[~open_] >= 1 - 1e-9).all()
    assert uniform(found, density) == [density * size for size in sizes]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_snip_takes_the_most_sensitive(count, density):
    model, batches = smooth(), data(count)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    loss = sum(F.cross_entropy(model(x), y) for x, y in batches) / count
    slopes = torch.autograd.grad(loss, [*weights.values()])
    flat = np.concatenate(
        [np.abs(w.detach().numpy() * g.numpy()).ravel() for w, g in zip(weights.values(), slopes, strict=True)]
    )
    best = np.zeros(flat.size, bool)
    best[np.argsort(-flat)[: round(density * flat.size)]] = True
    masks = first_masks(model, density, "snip", batches)
    assert [*masks] == [*weights]
    assert (np.concatenate([mask.ravel() for mask in masks.values()]) == best).all()
    layers = first_masks(model, density, "snip_layers", batches)
    assert [m.sum() for m in layers.values()] == [m.sum() for m in masks.values()]
    assert any((layers[name] != masks[name]).any() for name in masks)


def test_snip_of_kernels_takes_the_mean_over_their_weights():
    model, batches = smooth(), data()
    found = groups(model, "kernel")
    x, y = batches[0]
    slopes = torch.autograd.grad(F.cross_entropy(model(x), y), [g.members[0].weight for g in found])
    scores = [np.abs((g.members[0].weight * s).detach().numpy()) for g, s in zip(found, slopes, strict=True)]
    flat = np.concatenate([s.reshape(*s.shape[:2], -1).mean(2).ravel() for s in scores])
    best = np.zeros(flat.size, bool)
    best[np.argsort(-flat)[: round(0.4 * flat.size)]] = True
    masks = first_masks(model, 0.4, "snip", batches, "kernel")
    assert (np.concatenate([mask.ravel() for mask in masks.values()]) == best).all()


def test_grasp_keeps_what_keeps_the_gradient_up():
    """Against finite differences: the score of a weight is w (H g), H g that of the gradient along itself."""
    model, batches = smooth(), data()
    x, y = batches[0]
    weights = [p for p in model.parameters() if p.ndim > 1]

    def slopes():
        return torch.autograd.grad(F.cross_entropy(model(x), y), weights)

    g, step = slopes(), 1e-5
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, each in zip(weights, g, strict=True):
                weight.add_(each, alpha=sign * step)
        sides.append(slopes())
        with torch.no_grad():
            for weight, each in zip(weights, g, strict=True):
                weight.sub_(each, alpha=sign * step)
    scores = [w.detach() * (a - b) / (2 * step) for w, a, b in zip(weights, *sides, strict=True)]
    flat = np.concatenate([score.numpy().ravel() for score in scores])
    best = np.zeros(flat.size, bool)
    best[np.argsort(-flat)[: round(0.45 * flat.size)]] = True
    masks = first_masks(model, 0.45, "grasp", batches)
    assert (np.concatenate([mask.ravel() for mask in masks.values()]) == best).all()


def test_equal_scores_are_shared_out():
    """Dead weights have no sensitivity; a density that needs them takes as much from each layer."""
    model = smooth()
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[3].weight.fill_(0)
    masks = first_masks(model, 0.7, "snip", data())
    assert sum(mask.sum() for mask in masks.values()) == round(0.7 * 84)
    assert masks["0.weight"][0].all() or masks["0.weight"].sum() > 12
    assert 20 < masks["3.weight"].sum() < 40


def test_chance_differs_between_layers_and_seeds_only():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    runs = [
        {
            n: m.clone()
            for n, m in SparseTraining(model, sgd(model), 0.5, "uniform", schedule=Schedule(seed=s)).masks.items()
        }
        for s in (0, 0, 1)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    for one, other in ((runs[0]["0.weight"], runs[2]["0.weight"]), (runs[0]["0.weight"], runs[0]["1.weight"])):
        assert 0.4 < (one == other).float().mean() < 0.6


def test_rows_have_their_quota():
    for density in (0.05, 0.3, 0.6):
        found = groups(made(), "fan_in")
        for group, counts in zip(found, quotas(found, uniform(found, density), density), strict=True):
            assert counts.tolist() == [max(round(density * group.row), 1)] * group.rows
    found = groups(made(Fours), "2:4")
    assert all(each.unique().tolist() == [2] for each in quotas(found, uniform(found, 0.5), 0.5))


def test_weights_that_are_not_zero():
    model = made()
    with torch.no_grad():
        model.fc1.weight[:, 2:] = 0
    assert (first_masks(model, 0.1, "weights")["fc1.weight"] == (model.fc1.weight.detach().numpy() != 0)).all()
    kernels = first_masks(model, 0.1, "weights", granularity="channel")
    assert kernels["fc1.weight"].all()


@pytest.mark.parametrize("granularity", ["2:4", "fan_in"])
def test_weights_with_another_pattern_are_refused(granularity):
    """Dense weights have no pattern; neither may masks that are given."""
    model = made(Fours)
    ragged = {g.name: torch.arange(g.size).view(g.shape) % 3 == 0 for g in groups(model, granularity)}
    for by in ("weights", ragged):
        if by == "weights" and granularity == "fan_in":
            with torch.no_grad():
                model[6].weight[0, 1:] = 0
        with pytest.raises(ValueError, match=r"\.weight"):
            SparseTraining(model, sgd(model), 0.5, by, "static", granularity)


@pytest.mark.parametrize("by", ["weights", "masks"])
def test_what_cannot_be_reached_is_not_active_whoever_says_so(by):
    model = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    given = {"0.weight": torch.ones(4, 3, 7, 7, dtype=torch.bool)}
    chosen = "weights" if by == "weights" else given
    sparse = SparseTraining(model, sgd(model), 0.5, chosen, "static", calibration=calibration(1, size=3))
    assert int(sparse.masks["0.weight"].sum()) == 4 * 3 * 25


def test_given_masks_are_taken_as_they_are():
    model = made()
    given = {g.name: torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.4 for g in groups(model)}
    sparse = SparseTraining(model, sgd(model), 0.4, given, "static")
    assert all(torch.equal(given[name], mask) and given[name] is not mask for name, mask in sparse.masks.items())
    assert sparse.density == sparse.report().density != 0.4  # theirs, whatever was asked for
    sparse.detach()
    given = {name: mask.double() for name, mask in given.items()}
    again = SparseTraining(model, sgd(model), 0.4, given, "static")
    assert all(torch.equal(given[name] != 0, mask) for name, mask in again.masks.items())


def test_names():
    for name in ("snip", "grasp"):
        with pytest.raises(ValueError, match=f"{name}' needs data"):
            first_masks(made(), 0.5, name)
