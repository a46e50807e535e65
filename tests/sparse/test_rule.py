"""Rules and their exchange against an oracle in plain numpy, which shares no code with them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shiftconv.sparse import RULES, Evidence, Rule, Schedule, SparseTraining
from shiftconv.sparse.group import Member, SparseGroup
from shiftconv.sparse.rule import chance, gradient, magnitude, momentum, signed
from shiftconv.sparse.update import exchange, exchange_all, score_all, score_entries

from .cases import made, sgd, step

often = settings(deadline=None, max_examples=60, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(shape, mask, seed=0, name="weight"):
    """A group of one parameter with distinct weights and gradients."""
    rng = np.random.default_rng(seed)
    parameter = nn.Parameter(torch.from_numpy(rng.standard_normal(shape)))
    parameter.grad = torch.from_numpy(rng.standard_normal(shape))
    group = SparseGroup(name, [Member(name, parameter)], torch.Size(mask.shape))
    group.mask = torch.from_numpy(mask)
    group.apply()
    return group


def look(seed=0, state=None):
    def of(member):
        return Evidence(member.name, member.weight, member.weight.grad, state or {}, seeded(seed))

    return of


def exchanged(groups, rule, fraction=0.3, targets=None, seed=0):
    """The new masks, as numpy has them."""
    targets = targets or [group.in_rows(group.mask).sum(1) for group in groups]
    scores = score_all(groups, rule, look(seed))
    masks = exchange_all(groups, targets, fraction, rule, scores, lambda group: seeded(seed + 99))
    return [mask.view(group.shape).numpy() for mask, group in zip(masks, groups, strict=True)]


def drawn_mask(seed, shape, density=0.5):
    mask = np.random.default_rng(seed).random(shape) < density
    mask.flat[0] = True
    return mask


@often
@given(st.integers(0, 9999), st.floats(0, 1), st.floats(0.05, 1))
def test_the_smallest_leave_and_the_steepest_come_back(seed, fraction, density):
    group = layer((5, 7), drawn_mask(seed, (5, 7), density), seed)
    weight, steep = group.members[0].weight.detach().numpy().ravel(), group.members[0].weight.grad.numpy().ravel()
    active = group.mask.numpy().ravel().copy()
    count = math.ceil(fraction * active.sum())
    order = sorted(np.flatnonzero(active), key=lambda i: abs(weight[i]))
    kept = active.copy()
    kept[order[:count]] = False
    back = sorted(np.flatnonzero(~kept), key=lambda i: -abs(steep[i]))[:count]
    kept[back] = True
    (mask,) = exchanged([group], RULES["rigl"], fraction)
    assert (mask.ravel() == kept).all() and mask.sum() == active.sum()


def test_whole_kernels_are_judged_by_their_mean():
    mask = drawn_mask(3, (5, 6))
    group = layer((5, 6, 3, 2), mask, 3)
    weight, steep = (t.detach().numpy() for t in (group.members[0].weight, group.members[0].weight.grad))
    scores = score_all([group], RULES["rigl"], look())[0]
    np.testing.assert_allclose(scores[0].numpy().reshape(5, 6), np.abs(weight).mean((2, 3)))
    np.testing.assert_allclose(scores[1].numpy().reshape(5, 6), np.abs(steep).mean((2, 3)))
    kept = mask.copy()
    strength = np.abs(weight).mean((2, 3))
    for i, j in sorted(np.argwhere(mask).tolist(), key=lambda at: strength[at[0], at[1]])[
        : math.ceil(0.3 * mask.sum())
    ]:
        kept[i, j] = False
    (after,) = exchanged([group], RULES["rigl"])
    assert (after & mask >= kept).all() and after.sum() == mask.sum()


def test_members_of_any_shape_are_judged_by_the_mean_of_their_weights():
    rows, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    columns = nn.Parameter(torch.randn(5, 4))
    group = SparseGroup("units", [Member("a", rows), Member("b", bias), Member("c", columns, axis=1)], torch.Size([4]))
    each = rows.abs().sum(1) + bias.abs() + columns.abs().sum(0)
    torch.testing.assert_close(score_entries(group, magnitude, look())[0], (each / 9).detach())


@often
@given(st.integers(0, 9999), st.floats(0, 1))
def test_positive_and_negative_weights_leave_apart(seed, fraction):
    """As in SET: the same share of both, as near as whole numbers allow."""
    group = layer((6, 7), drawn_mask(seed, (6, 7), 0.8), seed)
    weight = group.members[0].weight.detach().numpy().ravel()
    active = group.mask.numpy().ravel()
    scores = score_all([group], Rule(signed, gradient), look())[0]
    kept = exchange(
        group.in_rows(group.mask),
        group.allowed(),
        torch.tensor([active.sum()]),
        fraction,
        scores,
        Rule(signed, chance),
        seeded(),
    )
    count = math.ceil(fraction * active.sum())
    leaving = exchange(
        group.in_rows(group.mask),
        torch.zeros(1, 42, dtype=torch.bool),  # nothing may come back
        torch.tensor([active.sum()]),
        fraction,
        scores,
        Rule(signed, chance),
        seeded(),
    )
    assert kept.sum() == active.sum()
    gone = active & ~leaving.numpy().ravel()
    assert gone.sum() == count
    for side in (weight > 0, weight < 0):
        sizes = np.abs(weight)
        if gone[side].any() and (~gone)[side].any():
            assert sizes[side & gone].max() < sizes[side & ~gone & active].min()
        assert abs(gone[side].sum() - fraction * side.sum()) <= 2


def test_chance_is_exact_and_fair():
    """Each entry that is not active comes back as often as any other."""
    mask = np.zeros((6, 5), bool)
    mask.flat[:9] = True
    group = layer((6, 5), mask, 1)
    weight = np.abs(group.members[0].weight.detach().numpy())
    times, runs = np.zeros((6, 5)), 1500
    for seed in range(runs):
        (after,) = exchanged([group], RULES["set"], 0.3, seed=7 * seed)
        assert after.sum() == 9
        times += after
    pruned = np.argsort(np.where(mask, weight, np.inf).ravel())[:3]
    stay = mask.copy()
    stay.flat[pruned] = False
    assert (times[stay] == runs).all()
    expected = 3 / 24 * runs
    statistic = ((times[~stay] - expected) ** 2 / (expected * (1 - 3 / 24))).sum()
    assert statistic < 23 + 6 * math.sqrt(2 * 23)
    assert statistic > 23 - 4 * math.sqrt(2 * 23)


def test_half_by_chance():
    mask = np.zeros((8, 9), bool)
    mask.flat[:40] = True
    group = layer((8, 9), mask, 2)
    steep = np.abs(group.members[0].weight.grad.numpy()).ravel()
    weight = np.abs(group.members[0].weight.detach().numpy()).ravel()
    kept = mask.ravel().copy()
    kept[np.argsort(np.where(kept, weight, np.inf))[:12]] = False
    best = [i for i in np.argsort(-steep) if not kept[i]][:6]
    others = set()
    for seed in range(20):
        (after,) = exchanged([group], RULES["mixed"], 0.3, seed=seed)
        after = after.ravel()
        assert after.sum() == 40 and after[kept].all() and after[best].all()
        others.add(tuple(i for i in np.flatnonzero(after) if not kept[i] and i not in best))
    assert len(others) > 10 and {len(each) for each in others} == {6}


def test_only_what_is_below_the_threshold_leaves():
    mask = np.ones((6, 6), bool)
    mask[:, 4:] = False
    group = layer((6, 6), mask, 5)
    weight = np.abs(group.members[0].weight.detach().numpy())
    for threshold, fraction in ((0.3, 1.0), (0.3, 0.1), (1e-9, 1.0), (1.0, 0.4)):
        rule = Rule(magnitude, lambda of: (of.weight == 0).to(of.weight), threshold=threshold)
        (after,) = exchanged([group], rule, fraction)
        small = int((weight[mask] < threshold).sum())
        leave = min(small, math.ceil(fraction * 24))
        assert leave < 12
        assert (mask & ~after).sum() == leave and after.sum() == 24
        if leave:
            assert weight[mask & ~after].max() < min(threshold, weight[mask & after].min())


@often
@given(st.integers(0, 9999), st.floats(0, 1), st.integers(0, 5))
def test_in_global_scope_all_layers_compete(seed, fraction, fall):
    shapes = [(3, 4), (5,), (2, 3, 2)]
    groups = [layer(shape, drawn_mask(seed + i, shape), seed + 10 * i, f"layer {i}") for i, shape in enumerate(shapes)]
    active = np.concatenate([g.mask.numpy().ravel() for g in groups])
    weight = np.abs(np.concatenate([g.members[0].weight.detach().numpy().ravel() for g in groups]))
    steep = np.abs(np.concatenate([g.members[0].weight.grad.numpy().ravel() for g in groups]))
    target = max(int(active.sum()) - fall, 3)
    targets = [torch.tensor([n]) for n in (target - 2, 1, 1)]
    safe, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        each = [i for i in range(start, start + size) if active[i]]
        safe.append(max(each, key=lambda i: weight[i]))
        start += size
    leave = active.sum() - target + math.ceil(fraction * target)
    kept = active.copy()
    kept[[i for i in sorted(np.flatnonzero(active), key=lambda i: weight[i]) if i not in safe][:leave]] = False
    kept[sorted(np.flatnonzero(~kept), key=lambda i: -steep[i])[: target - kept.sum()]] = True
    masks = exchanged(groups, Rule(magnitude, gradient, scope="global"), fraction, targets)
    assert (np.concatenate([mask.ravel() for mask in masks]) == kept).all()
    assert kept.sum() == target and all(mask.any() for mask in masks)


@often
@given(st.integers(0, 9999), st.floats(0, 1), st.integers(1, 30))
def test_the_number_after_an_exchange_is_the_one_asked_for(seed, fraction, target):
    group = layer((5, 6), drawn_mask(seed, (5, 6)), seed)
    for name in ("static", "set", "set_signed", "rigl", "mixed"):
        (mask,) = exchanged([group], RULES[name], fraction, [torch.tensor([target])], seed)
        assert mask.sum() == target


def test_nothing_comes_where_it_may_not():
    group = layer((4, 5), drawn_mask(0, (4, 5), 0.3), 0)
    group.reachable = torch.from_numpy(drawn_mask(8, (4, 5), 0.5)) | group.mask
    for name in ("set", "rigl", "mixed"):
        for seed in range(10):
            (mask,) = exchanged([group], RULES[name], 0.5, seed=seed)
            assert not (mask & ~group.reachable.numpy()).any() and mask.sum() == group.active


def test_momentum_is_the_average_over_its_deviation():
    weight = nn.Parameter(torch.randn(3, 4))
    first, second = torch.randn(3, 4), torch.rand(3, 4)

    def score(**state):
        return momentum(Evidence("w", weight, None, state, seeded()))

    torch.testing.assert_close(score(exp_avg=first, exp_avg_sq=second), (first / (second.sqrt() + 1e-8)).abs())
    assert torch.equal(score(exp_avg=first), first.abs()) and torch.equal(score(momentum_buffer=first), first.abs())
    with pytest.raises(RuntimeError, match="averages gradients; of w it keeps none"):
        score(momentum_buffer=None, step=3)
    with pytest.raises(RuntimeError, match="needs the gradient of w"):
        gradient(Evidence("w", weight, None, {}, seeded()))


def test_whole_updates_follow_the_oracle():
    """Through an optimiser's step: masks move by the weights after it and the gradients before it."""
    model = made()
    optimizer = sgd(model)
    schedule = Schedule(every_steps=1, prune_fraction=0.25, seed=1)
    sparse = SparseTraining(model, optimizer, 0.4, "uniform", "rigl", schedule=schedule)
    for seed in range(3):
        before = sparse.masks["fc1.weight"].numpy().ravel().copy()
        grown_from = {}
        hook = optimizer.register_step_post_hook(
            lambda *_, kept=grown_from: kept.setdefault("weight", model.fc1.weight.detach().numpy().ravel().copy())
        )
        step(model, optimizer, seed)
        hook.remove()
        after, steep = sparse.masks["fc1.weight"].numpy().ravel(), np.abs(model.fc1.weight.grad.numpy().ravel())
        weight = np.abs(model.fc1.weight.detach().numpy().ravel())
        count = math.ceil(0.25 * before.sum())
        left, came = before & ~after, after & ~before
        assert left.sum() == came.sum() <= count
        assert steep[came].min() >= steep[~before & ~came].max()
        assert (weight[left] == 0).all() and (weight[came] == 0).all() and (weight[before & after] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(explore=1.5), r"explore must be in \[0, 1\], got 1.5"),
        (dict(explore=math.nan), r"explore must be in \[0, 1\], got nan"),
        (dict(scope="all"), "scope must be 'layer' or 'global', got 'all'"),
        (dict(threshold=0.0), "threshold must be above 0, got 0.0"),
        (dict(threshold=math.nan), "threshold must be above 0, got nan"),
    ],
)
def test_rules_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(magnitude, gradient, **arguments)


def test_a_rule_of_ones_own():
    """A new one is a function."""
    model = made()
    optimizer = sgd(model)
    oldest = Rule(magnitude, lambda of: torch.arange(of.weight.numel(), dtype=torch.float32).view(of.weight.shape))
    schedule = Schedule(every_steps=1, prune_fraction=0.5)
    sparse = SparseTraining(model, optimizer, 0.3, "uniform", oldest, schedule=schedule)
    first = int(sparse.masks["fc1.weight"].sum())
    before = sparse.masks["fc1.weight"].flatten().clone()
    step(model, optimizer)
    mask = sparse.masks["fc1.weight"].flatten()
    came = (mask & ~before).nonzero().flatten().tolist()
    assert int(mask.sum()) == first and came and not (~mask[came[0] :]).any()
