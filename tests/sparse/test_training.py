"""Sparse training under attack: any optimiser, scalers, accumulation, loading, resuming, and what does not fit."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import timm.optim
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from shiftconv.sparse import RULES, Calibration, Granularity, Rule, Schedule, SparseTraining, groups
from shiftconv.sparse.rule import chance, gradient, magnitude

from .cases import (
    ALWAYS,
    Fours,
    Large,
    actives,
    backward,
    batch,
    calibration,
    counts,
    leaks,
    made,
    sgd,
    state_leaks,
    step,
)

GLOBAL = Rule(magnitude, gradient, scope="global")
ALLOCATIONS = ("uniform", "erk", "snip", "snip_layers", "grasp")
SIZES = {  # entries of Tiny by granularity, layer by layer
    "weight": [7 * 27, 7 * 15, 5 * 28, 55, 33],
    "kernel": [21, 7, 35, 55, 33],
    "channel": [7, 7, 5, 11, 3],
    "hidden": [7, 11],
    "fan_in": [7 * 27, 7 * 15, 5 * 28, 55, 33],
}


def adamw(model, **arguments):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **arguments)


def bare_lookahead(optimizer):
    """As timm's is before its first ``zero_grad``: torch has not given its class hooks yet."""

    class Lookahead(timm.optim.Lookahead):
        def step(self, closure=None):
            return super().step(closure)

    assert not hasattr(Lookahead.step, "hooked")
    return Lookahead(optimizer, k=2)


def hooked_lookahead(optimizer):
    result = timm.optim.Lookahead(optimizer, k=2)
    result.zero_grad()
    assert type(result).step.hooked
    return result


OPTIMIZERS = {
    "sgd": sgd,
    "sgd nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda m: adamw(m, foreach=False),
    "adamw amsgrad": lambda m: adamw(m, amsgrad=True, foreach=False),
    "adamw foreach": lambda m: adamw(m, foreach=True),
    "adamw fused": lambda m: adamw(m, fused=True),
    "lion": lambda m: timm.optim.create_optimizer_v2(m, "lion", lr=0.01, weight_decay=0.1),
    "lamb": lambda m: timm.optim.create_optimizer_v2(m, "lamb", lr=0.01, weight_decay=0.1),
    "adafactor": lambda m: timm.optim.create_optimizer_v2(m, "adafactor", lr=0.01, weight_decay=0.1),
    "muon": lambda m: timm.optim.create_optimizer_v2(m, "muon", lr=0.01, weight_decay=0.1),
    "lookahead": lambda m: bare_lookahead(adamw(m)),
    "lookahead with hooks": lambda m: hooked_lookahead(adamw(m)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.mark.parametrize("granularity", ["weight", "kernel", "channel", "hidden"])
@pytest.mark.parametrize("rule", [*RULES, "global"])
def test_density_is_exact_after_every_update(rule, granularity):
    for number, allocate in enumerate(ALLOCATIONS):
        density = (0.37, 0.11, 0.5, 0.83, 0.2)[number]
        model = made()
        optimizer = sgd(model)
        chosen = GLOBAL if rule == "global" else rule
        sparse = SparseTraining(model, optimizer, density, allocate, chosen, granularity, ALWAYS, calibration(1))
        total = round(density * sum(SIZES[granularity]))
        assert [mask.numel() for mask in sparse.masks.values()] == SIZES[granularity]
        first, masks = counts(sparse), {name: mask.clone() for name, mask in sparse.masks.items()}
        assert sum(first.values()) == max(total, len(first)), allocate
        for seed in range(4):
            step(model, optimizer, seed)
            now = counts(sparse)
            assert sum(now.values()) == sum(first.values()) == sparse.active
            assert min(now.values()) >= 1
            assert rule == "global" or now == first
            assert not leaks(sparse)
        assert sparse.updates == (0 if rule == "static" else 4)
        moved = any(not torch.equal(masks[name], mask) for name, mask in sparse.masks.items())
        tight = rule == "global" and sparse.active == len(first)  # one in each layer: all of them stay
        assert moved == (rule != "static" and not tight)


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.floats(0.01, 1.0),
    st.sampled_from([*RULES]),
    st.sampled_from(["weight", "kernel", "channel", "fan_in"]),
    st.floats(0.0, 1.0),
    st.sampled_from(["uniform", "erk"]),
    st.integers(0, 3),
)
def test_density_is_exact_for_any_density_and_fraction(density, rule, granularity, fraction, allocate, seed):
    model = made(width=5, hidden=7)
    optimizer = sgd(model)
    schedule = Schedule(every_steps=1, prune_fraction=fraction, seed=seed)
    sparse = SparseTraining(model, optimizer, density, allocate, rule, granularity, schedule)
    first = counts(sparse)
    if granularity != "fan_in":
        entries = sum(mask.numel() for mask in sparse.masks.values())
        assert sum(first.values()) == max(round(density * entries), len(first))
    for i in range(3):
        step(model, optimizer, i)
        assert counts(sparse) == first and not leaks(sparse)


@pytest.mark.parametrize("rule", ["set", "set_signed", "rigl", "snfs", "mixed"])
@pytest.mark.parametrize("granularity", ["2:4", "1:4", "fan_in"])
def test_every_row_keeps_its_number(granularity, rule):
    for allocate in ("erk", "uniform", "snip", "grasp"):
        model = made(Fours)
        optimizer = sgd(model)
        density = {"2:4": 0.5, "1:4": 0.25, "fan_in": 0.3}[granularity]
        arguments = (density, allocate, rule, granularity, ALWAYS, calibration(1, 4))
        sparse = SparseTraining(model, optimizer, *arguments)
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        first = [alive.reshape(len(alive), -1).sum(1).tolist() for _, alive in actives(sparse)]
        for seed in range(3):
            step(model, optimizer, seed, 4)
            for weight, alive in actives(sparse):
                if granularity == "fan_in":
                    assert len({*alive.reshape(len(alive), -1).sum(1)}) == 1
                else:  # neighbours are inputs, of a depthwise kernel its taps
                    inputs = alive.reshape(-1, 4) if weight.shape[1] == 1 else np.moveaxis(alive, 1, -1).reshape(-1, 4)
                    assert {*inputs.sum(1)} == {int(granularity[0])}
            assert [alive.reshape(len(alive), -1).sum(1).tolist() for _, alive in actives(sparse)] == first
            assert not leaks(sparse)
        assert any(not torch.equal(before[name], mask) for name, mask in sparse.masks.items())


@pytest.mark.parametrize("granularity", ["weight", "kernel", Granularity("kernel", share_paths=False)], ids=str)
@pytest.mark.parametrize("share_every", [1, 2])
def test_paths_of_large_kernels_stay_exact(granularity, share_every):
    model = made(Large)
    optimizer = sgd(model)
    schedule = Schedule(every_steps=1, share_every=share_every)
    data = calibration(1, size=6)
    sparse = SparseTraining(model, optimizer, 0.4, "erk", "rigl", granularity, schedule, data)
    shared = not (isinstance(granularity, Granularity) or share_every > 1)
    assert ("1.weights.1" in sparse.masks) == (not shared)
    first = counts(sparse)
    for seed in range(4):
        step(model, optimizer, seed, size=6)
        assert counts(sparse) == first and not leaks(sparse)
        if share_every > 1 and granularity in ("weight", "kernel"):
            same = torch.equal(sparse.masks["1.weights.0"], sparse.masks["1.weights.1"])
            assert same == (sparse.updates % share_every == 0)


@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_hidden_units_of_layers_in_a_row(rule):
    """A layer that reads units and makes others is pruned from both sides."""
    model = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3))
    optimizer = OPTIMIZERS["adamw"](model)
    sparse = SparseTraining(model, optimizer, 0.5, "uniform", rule, "hidden", ALWAYS)
    first = counts(sparse)
    assert [*first.values()] in ([4, 4], [5, 4]) and len([*actives(sparse)]) == 6
    masks = []
    for seed in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        assert counts(sparse) == first and not leaks(sparse)
        assert state_leaks(sparse, optimizer.state) == 0
        masks.append([mask.clone() for mask in sparse.masks.values()])
        units = (model[0].weight != 0).any(1) | (model[0].bias != 0)
        assert not (units & ~masks[-1][0]).any() and int(units.sum()) == first["0 units"]  # drawn anew, not zero
    assert any(
        not torch.equal(*pair) for one, other in itertools.pairwise(masks) for pair in zip(one, other, strict=True)
    )


def test_a_chunk_of_kernels_lives_or_dies_together():
    model = made(Fours)
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.5, "erk", "set", "kernel:4", ALWAYS)
    for seed in range(3):
        step(model, optimizer, seed, 4)
        kernels = (model[0].weight != 0).flatten(2).any(2)  # [8, 4]
        assert torch.equal(kernels[:4], kernels[:1].expand(4, -1))
        assert torch.equal(kernels[4:], kernels[4:5].expand(4, -1))
        assert not leaks(sparse)
    assert sparse.masks["0.weight"].shape == (2, 4)


def test_taps_beyond_the_map_are_never_active():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, padding=3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    for rule in ("set", "rigl", "mixed"):
        optimizer = sgd(model)
        sparse = SparseTraining(
            model, optimizer, 0.5, "uniform", rule, schedule=ALWAYS, calibration=calibration(1, size=3)
        )
        total = round(0.5 * (3 * 4 * 25 + 12))  # of 7x7 taps only 5x5 meet a 3x3 map
        for seed in range(4):
            assert sparse.active == total
            beyond = sparse.masks["0.weight"].clone()
            beyond[:, :, 1:-1, 1:-1] = False
            assert not beyond.any()
            step(model, optimizer, seed, size=3)
        assert sparse.report().layers[0].unreachable == 3 * 4 * 24
        sparse.detach()


@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_slots_beyond_the_map_are_never_active(rule):
    """Where the map is small, most slots of a shift-wise convolution meet zeros only: what never matters is none."""
    model = made(Large)
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.5, "erk", rule, "weight", ALWAYS, calibration(1, size=4))
    group = next(group for group in sparse.groups if group.name == "1.weights.0")
    module, x = model[1], torch.randn(4, 6, 2, 2)
    idle = torch.ones_like(module.weights[0], dtype=torch.bool)
    y = module(x).detach()
    for index in range(idle.numel()):  # by brute force: does the tap change anything?
        with torch.no_grad():
            kept = module.weights[0].view(-1)[index].clone()
            module.weights[0].view(-1)[index] += 10
            idle.view(-1)[index] = torch.equal(module.train()(x), y)
            module.weights[0].view(-1)[index] = kept
    assert 0 < idle.sum() < idle.numel()
    assert torch.equal(~group.allowed().view(group.shape), idle)
    for seed in range(5):
        assert not (sparse.masks["1.weights.0"] & idle).any()
        step(model, optimizer, seed, size=4)


@every_optimizer
def test_masked_weights_are_zero_at_every_forward(name):
    model = made()
    optimizer = OPTIMIZERS[name](model)
    sparse = SparseTraining(model, optimizer, 0.3, "erk", "rigl", schedule=Schedule(every_steps=3))
    seen, regrown = [], 0
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(leaks(sparse)))
    state = getattr(optimizer, "_base_optimizer", optimizer).state
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for seed in range(7):
        before = {id(weight): alive.copy() for weight, alive in actives(sparse)}
        step(model, optimizer, seed)
        assert state_leaks(sparse, state) == 0
        after = {id(weight): alive.copy() for weight, alive in actives(sparse)}
        new = {key: after[key] & ~before[key] for key in after}
        regrown += sum(int(each.sum()) for each in new.values())
        assert state_leaks(sparse, state, lambda weight, new=new: new[id(weight)]) == 0
    assert sparse.steps == 7 and sparse.updates == 2 and regrown
    assert len(seen) > 7 and not any(seen)
    assert state and all(not torch.equal(start[f"{k}.weight"], getattr(model, k).weight) for k in ("stem", "fc1"))


@pytest.mark.parametrize("rule", ["static", "set", "rigl"])
def test_gradients_of_dead_weights_change_no_other(rule):
    """An optimiser that mixes a whole matrix sees zeros there: what is not a model's weight has no say."""
    results = []
    for poisoned in (False, True):
        model = made()
        optimizer = OPTIMIZERS["muon"](model)
        sparse = SparseTraining(model, optimizer, 0.5, "uniform", rule, schedule=Schedule(every_steps=2))
        for seed in range(2 if rule != "rigl" else 1):  # the second one's gradients decide what is regrown
            optimizer.zero_grad()
            backward(model, seed)
            if poisoned:
                for weight, alive in actives(sparse):
                    weight.grad[torch.from_numpy(~alive)] += 3.0
            optimizer.step()
        results.append([weight.detach().clone() for weight, _ in actives(sparse)])
    assert all(map(torch.equal, *results))


def test_momentum_may_be_dense_where_the_rule_asks_for_it():
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.3, "erk", "snfs", schedule=Schedule(every_steps=3))
    for seed in range(7):
        step(model, optimizer, seed)
        assert state_leaks(sparse, optimizer.state) > 0 and not leaks(sparse)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_leaves_out_do_not_count(fused):
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    sparse = SparseTraining(model, optimizer, 0.3, "erk", "rigl", schedule=Schedule(every_steps=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = 0
    for seed in range(9):
        optimizer.zero_grad()
        x, y = batch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        broken = seed in (1, 3, 4, 7)
        if broken:
            model.fc1.weight.grad[0, 0] = math.inf
        masks = {name: mask.clone() for name, mask in sparse.masks.items()}
        weights = [p.detach().clone() for p in model.parameters()]
        updates = sparse.updates
        scaler.step(optimizer)
        scaler.update()
        taken += not broken
        same = all(torch.equal(masks[name], mask) for name, mask in sparse.masks.items())
        assert sparse.steps == taken and sparse.updates == taken // 2 and not leaks(sparse)
        assert same == (sparse.updates == updates)
        assert all(map(torch.equal, weights, model.parameters())) == broken
        assert state_leaks(sparse, optimizer.state) == 0
    assert taken == 5


@pytest.mark.parametrize("name", ["lookahead", "lookahead with hooks"])
def test_a_lookahead_counts_as_a_scaler_says(name):
    model = made()
    optimizer = OPTIMIZERS[name](model)
    sparse = SparseTraining(model, optimizer, 0.3, schedule=ALWAYS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed in range(3):
        optimizer.zero_grad()
        x, y = batch(seed)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if seed == 1:
            model.fc1.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert sparse.steps == 2


def test_an_update_waits_for_finite_gradients():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = SparseTraining(model, optimizer, 0.3, "erk", "rigl", schedule=Schedule(every_steps=3))
    for seed in range(5):
        optimizer.zero_grad()
        backward(model, seed)
        if seed in (2, 3):
            dead = ~sparse.masks["fc1.weight"]
            model.fc1.weight.grad[dead] = math.nan if seed == 2 else math.inf
        masks = {name: mask.clone() for name, mask in sparse.masks.items()}
        optimizer.step()
        same = all(torch.equal(masks[name], mask) for name, mask in sparse.masks.items())
        assert same == (seed != 4) and not leaks(sparse)
        assert all(p.isfinite().all() for p in model.parameters())
        assert sparse.updates == (seed == 4)
        assert sparse.state_dict()["postponed"] == (seed in (2, 3))
    step(model, optimizer, 6)
    assert sparse.updates == 2  # step 6, as planned


def test_an_update_that_waits_is_saved_as_such():
    def make():
        model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return model, optimizer, SparseTraining(model, optimizer, 0.3, rule="rigl", schedule=Schedule(every_steps=2))

    model, optimizer, sparse = make()
    step(model, optimizer, 0)
    optimizer.zero_grad()
    backward(model, 1)
    model.fc1.weight.grad[~sparse.masks["fc1.weight"]] = math.inf
    optimizer.step()
    other, second, again = make()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(sparse.state_dict())
    for one, its in ((model, optimizer), (other, second)):
        step(one, its, 2)
    assert sparse.updates == again.updates == 1 and again.steps == 3
    assert _same(sparse.masks, again.masks)


def test_gradients_may_be_accumulated():
    """Two halves of a batch are the same as the whole: no norm here depends on a batch."""
    results = []
    for parts in (1, 2):
        model = made().eval().double()
        optimizer = sgd(model)
        sparse = SparseTraining(model, optimizer, 0.3, "uniform", "rigl", schedule=Schedule(every_steps=2))
        for seed in range(4):
            optimizer.zero_grad()
            x, y = batch(seed)
            for half in range(parts):
                each = slice(half * 6 // parts, (half + 1) * 6 // parts)
                (F.cross_entropy(model(x[each].double()), y[each]) / parts).backward()
            optimizer.step()
        assert sparse.steps == 4 and sparse.updates == 2
        results.append((sparse.masks, [p.detach() for p in model.parameters()]))
    assert all(torch.equal(mask, results[1][0][name]) for name, mask in results[0][0].items())
    assert all(map(torch.allclose, results[0][1], results[1][1]))


@pytest.mark.parametrize("rule", ["static", "set", "rigl"])
def test_dead_weights_do_not_count_in_a_clipped_norm(rule):
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = SparseTraining(model, optimizer, 0.2, "uniform", rule, schedule=Schedule(every_steps=4))
    for seed in range(3 if rule == "rigl" else 4):
        optimizer.zero_grad()
        backward(model, seed)
        alive = {id(weight): mask for weight, mask in actives(sparse)}
        squares = [
            (p.grad.double().numpy() ** 2 * alive.get(id(p), 1.0)).sum()
            for p in model.parameters()
            if p.grad is not None
        ]
        sparse.mask_gradients()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert float(norm) == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
        optimizer.step()
        assert not leaks(sparse)


def test_what_is_added_to_masked_gradients_is_masked_too():
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.3, rule="static")
    backward(model, 0)
    sparse.mask_gradients()
    backward(model, 1)
    optimizer.step()
    assert state_leaks(sparse, optimizer.state) == 0


@pytest.mark.parametrize("rule", ["static", "rigl"])
def test_a_closure_makes_gradients_late(rule):
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.3, rule=rule, schedule=ALWAYS)

    def closure():
        optimizer.zero_grad()
        return backward(model)

    for _ in range(2):
        optimizer.step(closure)
    assert sparse.steps == 2 and not leaks(sparse)
    assert (sparse.report().explored > sparse.report().density) == (rule == "rigl")
    assert state_leaks(sparse, optimizer.state) == 0


def test_an_optimizer_with_a_past_forgets_the_dead():
    model = made()
    optimizer = sgd(model)
    step(model, optimizer)
    sparse = SparseTraining(model, optimizer, 0.3, rule="static")
    assert state_leaks(sparse, optimizer.state) == 0
    step(model, optimizer)
    assert state_leaks(sparse, optimizer.state) == 0


def test_loaded_weights_are_masked_before_they_are_used():
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.3)
    seen = []
    model.stem.register_forward_hook(lambda *_: seen.append(leaks(sparse)))
    for use in (lambda: model(batch()[0]), lambda: optimizer.step(), lambda: model.stem(batch()[0])):
        backward(model)
        model.load_state_dict(made(seed=5).state_dict())
        use()
        assert not leaks(sparse)
    assert len(seen) == 5 and not any(seen)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lookahead", "muon"])
def test_under_autocast(name):
    model = made()
    optimizer = OPTIMIZERS[name](model)
    sparse = SparseTraining(model, optimizer, 0.3, schedule=Schedule(every_steps=2))
    first = counts(sparse)
    for seed in range(4):
        optimizer.zero_grad()
        x, y = batch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        assert not leaks(sparse) and counts(sparse) == first
    assert sparse.updates == 2


RUNS = {
    "set": dict(rule="set"),
    "rigl kernel": dict(rule="rigl", granularity="kernel", allocate="snip"),
    "snfs": dict(rule="snfs"),
    "signed channel": dict(rule="set_signed", granularity="channel"),
    "mixed hidden": dict(rule="mixed", granularity="hidden"),
    "fan_in": dict(rule="rigl", granularity="fan_in"),
    "global": dict(rule=GLOBAL),
    "random times": dict(rule="mixed", schedule=Schedule(every_steps=2, timing="random", seed=3)),
    "falling": dict(rule="rigl", schedule=Schedule(every_steps=2, start_density=0.9, density_steps=(1, 8))),
}


def _resumed(make, feed, steps):
    """States of a run at once, and of one that another process takes over in the middle."""
    whole, first, second = make(0), make(0), make(7)
    for seed in range(2 * steps):
        feed(*whole[:2], seed)
    for seed in range(steps):
        feed(*first[:2], seed)
    saved = io.BytesIO()
    torch.save([each.state_dict() for each in first], saved)
    saved.seek(0)
    for each, state in zip(second, torch.load(saved, weights_only=True), strict=True):
        each.load_state_dict(state)
    assert torch.equal(second[2].report().explored * torch.ones(1), first[2].report().explored * torch.ones(1))
    for seed in range(steps, 2 * steps):
        feed(*second[:2], seed)
    return whole, second


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("optimizer", ["adamw", "lookahead"])
def test_a_resumed_run_is_the_same_bit_for_bit(name, optimizer):
    def make(seed):
        model = made(seed=seed)
        held = OPTIMIZERS[optimizer](model)
        schedule = Schedule(every_steps=2, steps=14, prune_fraction=0.4)
        arguments = dict(density=0.4, schedule=schedule, calibration=calibration(1)) | RUNS[name]
        return model, held, SparseTraining(model, held, **arguments)

    whole, second = _resumed(make, step, 5)
    assert whole[2].updates > 2
    for one, other in zip(whole, second, strict=True):
        assert _same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("share_every", [1, 2, 3])
@pytest.mark.parametrize("calibrated", [True, False])
def test_resumed_paths_are_the_same(share_every, calibrated):
    """What can be reached is saved too: the run that goes on needs no data to find it again."""

    def make(seed):
        model = made(Large, seed=seed)
        optimizer = sgd(model)
        data = calibration(1, size=4) if calibrated or seed == 0 else None
        schedule = Schedule(every_steps=1, share_every=share_every)
        return model, optimizer, SparseTraining(model, optimizer, 0.4, "erk", "set", "weight", schedule, data)

    whole, second = _resumed(make, lambda m, o, s: step(m, o, s, size=4), 4)
    for one, other in zip(whole, second, strict=True):
        assert _same(one.state_dict(), other.state_dict())
    assert [g.capacity for g in whole[2].groups] == [g.capacity for g in second[2].groups]


def test_the_first_update_moves_as_many_as_the_others():
    """What comes back by chance has nothing to do with the chance that chose the first masks."""
    for seed in range(3):
        model = made()
        optimizer = sgd(model)
        schedule = Schedule(every_steps=1, seed=seed)
        sparse = SparseTraining(model, optimizer, 0.3, "uniform", "set", schedule=schedule)
        before = sparse.masks["stem.weight"].clone()
        step(model, optimizer)
        left = int((before & ~sparse.masks["stem.weight"]).sum())
        pruned = math.ceil(0.3 * int(before.sum()))
        assert left > 0.4 * pruned  # of 189 entries 57 are active: 17 leave, about 2 of them come back


def _attributes(model, optimizer):
    hooks = [len(h) for m in model.modules() for h in (m._forward_pre_hooks, m._load_state_dict_post_hooks)]
    own = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks), sorted(vars(optimizer)))
    modes = [m.training for m in model.modules()]
    return copy.deepcopy((model.state_dict(), hooks, own, modes, [p.grad for p in model.parameters()]))


BAD = {
    "density 0": (dict(density=0), ValueError, r"density must be in \(0, 1\], got 0"),
    "density 1.5": (dict(density=1.5), ValueError, r"density must be in \(0, 1\], got 1.5"),
    "density nan": (dict(density=math.nan), ValueError, r"density must be in \(0, 1\], got nan"),
    "density True": (dict(density=True), TypeError, "density must be a number, got True"),
    "density x": (dict(density="x"), TypeError, "density must be a number, got 'x'"),
    "rule": (dict(rule="rigel"), ValueError, "unknown rule 'rigel'; did you mean 'rigl'"),
    "rule kind": (dict(rule=3), TypeError, "rule must be a name or a Rule, got int"),
    "allocation": (dict(allocate="snap"), ValueError, "unknown allocation 'snap'; did you mean 'snip'"),
    "allocation kind": (dict(allocate=None), TypeError, "allocat"),
    "granularity": (dict(granularity="kernels"), ValueError, "unknown granularity 'kernels'; did you mean 'kernel'"),
    "granularity kind": (dict(granularity=5), TypeError, "granularity"),
    "pattern": (dict(granularity="5:4"), ValueError, "0 < n <= m"),
    "no multiple": (dict(granularity="2:4"), ValueError, r"stem.weight \[7, 3, 3, 3\] has no multiple of 4 inputs"),
    "pattern's density": (dict(granularity="1:1"), ValueError, "1:1 is a density of 1, got density=0.5"),
    "no groups": (dict(granularity=[]), ValueError, "no layer is selected"),
    "no groups' kind": (dict(granularity=["weight"]), TypeError, "granularity|group"),
    "no data": (dict(allocate="snip"), ValueError, "'snip' needs data: give calibration"),
    "empty": (dict(allocate="snip", calibration=Calibration([])), ValueError, "the calibration has no batch"),
    "a list": (dict(allocate="snip", calibration=[batch()]), TypeError, "[Cc]alibration"),
    "nan": (
        dict(allocate="snip", calibration=Calibration([(batch()[0] * math.nan, batch()[1])])),
        ValueError,
        "not finite",
    ),
    "schedule kind": (dict(schedule={}), TypeError, "schedule"),
    "missing mask": (dict(allocate={}), ValueError, "no mask for stem.weight"),
    "global rows": (dict(granularity="fan_in", rule=GLOBAL), ValueError, "global scope needs masks without rows"),
    "falling pattern": (
        dict(granularity="1:1", density=1.0, schedule=Schedule(start_density=1.0, density_steps=(0, 9))),
        ValueError,
        "cannot fall",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(name):
    arguments, kind, message = BAD[name]
    model = made().eval()
    optimizer = sgd(model)
    before = _attributes(model, optimizer)
    with pytest.raises(kind, match=message):
        SparseTraining(model, optimizer, **(dict(density=0.5) | arguments))
    assert _same(before, _attributes(model, optimizer))


def test_groups_that_are_refused_stay_as_they_were():
    model = made()
    optimizer = sgd(model)
    own = groups(model)
    with pytest.raises(ValueError, match="unknown allocation"):
        SparseTraining(model, optimizer, 0.5, "nothing", granularity=own, calibration=calibration(1, size=2))
    assert all(group.reachable is None and group.mask.all() and not group.explored.any() for group in own)


def test_a_group_that_is_given_twice_is_refused():
    model = made()
    with pytest.raises(ValueError, match=r"weight"):
        SparseTraining(model, sgd(model), 0.5, granularity=[*groups(model), *groups(model)])


def test_masks_that_do_not_fit():
    model = made()
    full = {group.name: group.mask for group in groups(model)}
    wrong = full | {"fc1.weight": torch.ones(11, 6)}
    with pytest.raises(ValueError, match=r"mask of fc1.weight must be \[11, 5\], got \[11, 6\]"):
        SparseTraining(model, sgd(model), 0.5, wrong)
    with pytest.raises(ValueError, match=r"typo"):
        SparseTraining(model, sgd(model), 0.5, full | {"typo.weight": torch.ones(3)})
    assert (model.fc1.weight != 0).all()


def test_wrong_kinds():
    model = made()
    with pytest.raises(TypeError, match="model must be a module, got list"):
        SparseTraining([], sgd(model))
    with pytest.raises(TypeError, match="optimizer must be an optimizer of torch's kind, got float"):
        SparseTraining(model, 0.1)


def test_an_optimizer_that_lacks_a_parameter():
    model = made()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "mix.weight"], lr=0.1)
    before = _attributes(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer does not hold mix\.weight"):
        SparseTraining(model, optimizer, 0.5)
    assert _same(before, _attributes(model, optimizer))
    SparseTraining(model, optimizer, 0.5, granularity=groups(model, select=nn.Linear))


def test_a_rule_that_misses_gradients_says_so_and_changes_nothing():
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.5, rule="rigl", schedule=Schedule(every_steps=2))
    masks, weights = {n: m.clone() for n, m in sparse.masks.items()}, copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"needs the gradient of stem\.weight"):
        sparse.update()
    assert _same(masks, sparse.masks) and _same(weights, model.state_dict()) and sparse.updates == 0
    sparse.detach()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = SparseTraining(model, plain, 0.5, rule="snfs", schedule=ALWAYS)
    masks = {n: m.clone() for n, m in averages.masks.items()}
    with pytest.raises(RuntimeError, match=r"needs an optimiser that averages gradients; of stem\.weight"):
        step(model, plain)
    assert _same(masks, averages.masks) and averages.updates == 0


def test_masks_over_masks_are_refused():
    """Two would meet in fewer weights than either tells."""
    model = made()
    first = SparseTraining(model, sgd(model), 0.5)
    with pytest.raises(ValueError, match=r"stem\.weight has masks of another SparseTraining; detach"):
        SparseTraining(model, sgd(model), 0.3, granularity="channel")
    first.detach()
    again = SparseTraining(model, sgd(model), 0.3)
    del again, first  # as when a cell of a notebook runs once more
    SparseTraining(model, sgd(model), 0.3)


def test_masks_that_never_move_are_told():
    model = made()
    with pytest.warns(UserWarning, match="the masks never move: no update falls into 50 steps"):
        SparseTraining(model, sgd(model), 0.5, schedule=Schedule(every_steps=100, steps=50))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule("magnitude", chance), TypeError, "must be functions of Evidence, got 'magnitude'"),
        (lambda: Rule(magnitude, None), TypeError, "must be functions of Evidence"),
        (lambda: groups(made(), select="conv1"), TypeError, "select must be types of modules or a function"),
    ],
)
def test_what_is_no_function_is_told(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("score", [lambda of: of.weight.sum(), lambda of: 3.0])
def test_scores_of_another_shape_are_told(score):
    model = made()
    sparse = SparseTraining(model, sgd(model), 0.5, rule=Rule(score, chance))
    with pytest.raises(ValueError, match=r"a score of stem\.weight must be a tensor \[7, 3, 3, 3\]"):
        sparse.update()


def test_a_density_that_would_rise_is_refused():
    schedule = Schedule(start_density=0.3, density_steps=(0, 5))
    with pytest.raises(ValueError, match=r"the density falls, from start_density=0\.3 to 0\.5"):
        SparseTraining(made(), sgd(made()), 0.5, schedule=schedule)


def test_on_no_device():
    model = made().to("meta")
    with pytest.raises((TypeError, ValueError), match="meta"):
        SparseTraining(model, sgd(model), 0.5)


@pytest.mark.parametrize("rule", [*RULES, "global"])
def test_density_one(rule):
    model = made()
    optimizer = sgd(model)
    weights = copy.deepcopy(model.state_dict())
    sparse = SparseTraining(model, optimizer, 1.0, "erk", GLOBAL if rule == "global" else rule, schedule=ALWAYS)
    assert _same(weights, model.state_dict())
    dense = made()
    other = sgd(dense)
    for seed in range(3):
        step(model, optimizer, seed)
        step(dense, other, seed)
        assert sparse.active == sum(SIZES["weight"])
    assert _same(model.state_dict(), dense.state_dict())


@pytest.mark.parametrize("rule", [*RULES, "global"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "channel", "hidden"])
def test_one_entry_in_each_layer(rule, granularity):
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(
        model, optimizer, 1e-6, "erk", GLOBAL if rule == "global" else rule, granularity, ALWAYS, calibration(1)
    )
    for seed in range(4):
        assert {*counts(sparse).values()} == {1}
        step(model, optimizer, seed)
        assert all(p.isfinite().all() for p in model.parameters()) and not leaks(sparse)


def test_layers_of_one_weight():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3), nn.Linear(3, 1), nn.Linear(1, 1, bias=False))
    optimizer = sgd(model)
    for rule in RULES:
        sparse = SparseTraining(model, optimizer, 0.5, "erk", rule, schedule=ALWAYS)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 1)).square().mean().backward()
            optimizer.step()
            assert sparse.active == 4 and counts(sparse)["0.weight"] == 1  # of 8, one in each layer
        sparse.detach()


def test_frozen_weights_are_left_alone():
    model = made()
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sparse = SparseTraining(model, optimizer, 0.3, "snip", "rigl", schedule=ALWAYS, calibration=calibration(1))
    step(model, optimizer)
    assert "stem.weight" not in sparse.masks and torch.equal(before, model.stem.weight)


@pytest.mark.parametrize("rule", ["set", "mixed"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "channel", "fan_in"])
def test_layout_makes_no_difference(granularity, rule):
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = made().double().to(memory_format=layout)
        optimizer = OPTIMIZERS["adamw"](model)
        data = Calibration([(x.double(), y) for x, y in calibration(1).batches])
        sparse = SparseTraining(model, optimizer, 0.4, "snip", rule, granularity, ALWAYS, data)
        for seed in range(3):
            optimizer.zero_grad()
            x, y = batch(seed)
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            assert not leaks(sparse) and state_leaks(sparse, optimizer.state) == 0
        assert model.stem.weight.is_contiguous(memory_format=layout)
        results.append({name: mask.clone() for name, mask in sparse.masks.items()})
    assert _same(*results)


def test_a_parameter_in_two_places_has_one_mask():
    model = nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.4, "erk", "rigl", schedule=ALWAYS)
    assert [*sparse.masks] == ["0.weight"]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 5)).square().mean().backward()
        optimizer.step()
        assert sparse.active == 10
        assert not model[2].weight[~sparse.masks["0.weight"]].any()


def test_a_copy_of_the_model_goes_its_own_way():
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, 0.4, schedule=ALWAYS)
    twin = copy.deepcopy(model)
    weights = copy.deepcopy(model.state_dict())
    other = sgd(twin)
    step(twin, other)
    twin.load_state_dict(made(seed=3).state_dict())
    twin(batch()[0])
    assert sparse.steps == 0 and _same(weights, model.state_dict())
    assert _same(dict(twin.named_parameters()), dict(made(seed=3).named_parameters()))
    step(model, optimizer)
    assert sparse.steps == 1 and not leaks(sparse)


def test_a_model_can_be_pickled():
    model = made()
    SparseTraining(model, sgd(model), 0.4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert _same(torch.load(file, weights_only=False).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["sgd", "lookahead", "lookahead with hooks"])
def test_detached_it_follows_no_more(name):
    model = made()
    optimizer = OPTIMIZERS[name](model)
    before = len(model._load_state_dict_post_hooks)
    sparse = SparseTraining(model, optimizer, 0.3, "uniform", "static")
    model.load_state_dict(made(seed=1).state_dict())
    sparse.detach()
    step(model, optimizer)
    assert sparse.steps == 0 and leaks(sparse)
    assert not model._forward_pre_hooks and len(model._load_state_dict_post_hooks) == before
    assert "step" not in vars(optimizer)
    sparse.detach()


@pytest.mark.parametrize("name", ["sgd", "lookahead", "lookahead with hooks"])
def test_two_on_one_model_keep_to_their_own_layers(name):
    model = made()
    optimizer = OPTIMIZERS[name](model)
    linear = SparseTraining(model, optimizer, 0.3, schedule=ALWAYS, granularity=groups(model, select=nn.Linear))
    kernels = SparseTraining(model, optimizer, 0.5, granularity=groups(model, "kernel", select=nn.Conv2d))
    for seed in range(3):
        step(model, optimizer, seed)
        assert not leaks(linear) and not leaks(kernels)
    assert linear.updates == 3 and kernels.steps == 3
    linear.detach()
    step(model, optimizer)
    assert linear.steps == 3 and kernels.steps == 4 and not leaks(kernels)


@pytest.mark.parametrize("rule", ["static", "set", "rigl", "global"])
def test_density_falls_to_the_entry(rule):
    model = made()
    optimizer = sgd(model)
    schedule = Schedule(every_steps=2, start_density=1.0, density_steps=(2, 10))
    chosen = GLOBAL if rule == "global" else rule
    sparse = SparseTraining(model, optimizer, 0.15, "erk", chosen, schedule=schedule)
    entries = sum(SIZES["weight"])
    assert sparse.active == entries
    for number in range(1, 15):
        step(model, optimizer, number)
        done = min(max((number - number % 2 - 2) / 8, 0.0), 1.0)
        assert sparse.active == round((0.15 + 0.85 * (1 - done) ** 3) * entries), number
        assert not leaks(sparse) and min(counts(sparse).values()) >= 1
    assert sparse.active == round(0.15 * entries)
