"""Saved masks: every bit comes back, and what does not fit is refused and changes nothing."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shiftconv.sparse import Schedule, SparseTraining
from shiftconv.sparse.group import Member, SparseGroup
from shiftconv.sparse.saved import pack, unpack

from .cases import ALWAYS, Fours, made, sgd, step

often = settings(deadline=None, max_examples=60, derandomize=True)


def group(size, seed=0, name="w"):
    made = SparseGroup(name, [Member(name, nn.Parameter(torch.ones(size)))], torch.Size([size]))
    rng = np.random.default_rng(seed)
    made.mask = torch.from_numpy(rng.random(size) < 0.5)
    made.reachable = torch.from_numpy(rng.random(size) < 0.5) | made.mask if seed % 2 else None
    return made


@often
@given(st.integers(1, 70), st.integers(0, 999))
def test_every_bit_comes_back(size, seed):
    one = group(size, seed)
    saved = pack(one)
    bits = np.unpackbits(saved["active"].numpy(), bitorder="little", count=size).astype(bool)
    assert (bits == one.mask.numpy()).all() and saved["active"].numel() == (size + 7) // 8
    state = {"version": 1, "steps": 1, "updates": 1, "postponed": False, "density": 0.5, "groups": {"w": saved}}
    (back,) = unpack(state, [group(size, seed + 2)])
    assert torch.equal(back.active, one.mask) and torch.equal(back.explored, one.explored)
    assert torch.equal(back.rested, one.rested) and back.exchanged == one.exchanged
    assert (back.reachable is None) == (one.reachable is None)
    assert back.reachable is None or torch.equal(back.reachable, one.reachable)


def trained(density=0.4, kind=None, **arguments):
    model = made(kind) if kind else made()
    optimizer = sgd(model)
    sparse = SparseTraining(model, optimizer, density, schedule=ALWAYS, **arguments)
    for seed in range(2):
        step(model, optimizer, seed, 4 if kind else 3)
    return model, sparse


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_states_are_plain_and_small():
    model, sparse = trained()
    state = through_file(sparse.state_dict())
    assert state["version"] == 1 and state["steps"] == 2 == state["updates"]
    assert sum(one["active"].numel() for one in state["groups"].values()) < sparse.report().layers[0].entries
    before = copy.deepcopy(state)
    step(model, sparse.optimizer, 5)
    assert all(torch.equal(one["active"], before["groups"][name]["active"]) for name, one in state["groups"].items())


def test_all_that_was_known_comes_back():
    first, sparse = trained(rule="set")
    model = made(seed=4)
    again = SparseTraining(model, sgd(model), 0.4, schedule=ALWAYS)
    model.load_state_dict(first.state_dict())
    again.load_state_dict(through_file(sparse.state_dict()))
    assert again.report() == sparse.report()
    assert all(torch.equal(mask, sparse.masks[name]) for name, mask in again.masks.items())
    assert not model.fc1.weight[~sparse.masks["fc1.weight"]].any()


def test_weights_that_the_first_masks_have_wiped_out_are_told():
    """In the wrong order, the model before the sparse training, they would be lost without a word."""
    first, sparse = trained(rule="set")
    model = made(seed=4)
    model.load_state_dict(first.state_dict())
    again = SparseTraining(model, sgd(model), 0.4, schedule=Schedule(seed=5))
    masks = {name: mask.clone() for name, mask in again.masks.items()}
    with pytest.raises(ValueError, match="make SparseTraining first, then load the model"):
        again.load_state_dict(sparse.state_dict())
    assert again.steps == 0 and all(torch.equal(mask, masks[name]) for name, mask in again.masks.items())


def damaged(change):
    def damage(state):
        change(state)
        return state

    return damage


def flip(state):
    state["groups"]["fc1.weight"]["active"][0] ^= 255


def beyond(state):
    """One more in one byte, one less in another: only the layer's count is right."""
    bits = state["groups"]["fc1.weight"]["active"]
    bits[-1] |= 128  # the 56th of 55


MISFITS = {
    "nothing": (lambda s: {}, "no state of sparse training"),
    "a list": (lambda s: [], "no state of sparse training"),
    "version": (lambda s: s | {"version": 2}, "no state of sparse training that this version reads"),
    "no version": (damaged(lambda s: s.pop("version")), "no state of sparse training"),
    "no groups": (damaged(lambda s: s.pop("groups")), "no state of sparse training"),
    "no steps": (damaged(lambda s: s.pop("steps")), "state|steps"),
    "no density": (damaged(lambda s: s.pop("density")), "state|density"),
    "no updates": (damaged(lambda s: s.pop("updates")), "state|updates"),
    "density": (lambda s: s | {"density": 0.3}, "has density 0.3, this one 0.4"),
    "a layer less": (damaged(lambda s: s["groups"].pop("fc1.weight")), r"missing \['fc1.weight'\]"),
    "a layer more": (damaged(lambda s: s["groups"].update(x=s["groups"]["fc1.weight"])), r"surplus \['x'\]"),
    "shape": (damaged(lambda s: s["groups"]["fc1.weight"].update(shape=[5, 11])), r"of fc1.weight is \[5, 11\]"),
    "rows": (damaged(lambda s: s["groups"]["fc1.weight"].update(row=5)), "of fc1.weight is .* in rows of 5"),
    "short": (damaged(lambda s: s["groups"]["fc1.weight"].update(active=torch.zeros(3, dtype=torch.uint8))), "damaged"),
    "type": (damaged(lambda s: s["groups"]["fc1.weight"].update(active=torch.zeros(7))), "fc1.weight is damaged"),
    "no bits": (damaged(lambda s: s["groups"]["fc1.weight"].pop("active")), "fc1.weight"),
    "explored": (damaged(lambda s: s["groups"]["fc2.weight"].update(explored=None)), "fc2.weight is damaged"),
    "flipped": (damaged(flip), "fc1.weight"),
    "no dict": (damaged(lambda s: s["groups"].update({"fc2.weight": 3})), "fc2.weight"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_and_changes_nothing(name):
    change, message = MISFITS[name]
    model, sparse = trained()
    state = copy.deepcopy(sparse.state_dict())
    own = copy.deepcopy((model.state_dict(), sparse.state_dict()))
    step(made(), sgd(made()))
    with pytest.raises(ValueError, match=message):
        sparse.load_state_dict(change(state))
    now = (model.state_dict(), sparse.state_dict())
    assert all(torch.equal(value, own[0][key]) for key, value in now[0].items())
    for key, one in now[1]["groups"].items():
        assert all(torch.equal(one[part], own[1]["groups"][key][part]) for part in ("active", "explored"))
    assert {k: v for k, v in now[1].items() if k != "groups"} == {k: v for k, v in own[1].items() if k != "groups"}


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (dict(granularity="weight"), dict(granularity="fan_in")),
        (dict(granularity="kernel"), dict(granularity="weight")),
        (dict(granularity="channel"), dict(granularity="hidden")),
        (dict(granularity="weight", density=0.4), dict(granularity="weight", density=0.41)),
    ],
)
def test_states_of_another_training_are_refused(saved, other):
    _, sparse = trained(**saved)
    model, here = trained(**other)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="saved"):
        here.load_state_dict(sparse.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_damaged_pattern_is_refused():
    _, sparse = trained(0.5, Fours, granularity="2:4")
    state = copy.deepcopy(sparse.state_dict())
    bits = state["groups"]["6.weight"]["active"]
    low = int(bits[0]) & 15
    bits[0] = (int(bits[0]) & 240) | (15 if low != 15 else 0)
    with pytest.raises(ValueError, match=r"6\.weight"):
        sparse.load_state_dict(state)


def test_a_falling_density_may_be_anywhere():
    """The masks of a state need not have the density that they will have in the end."""
    schedule = Schedule(every_steps=1, start_density=0.9, density_steps=(0, 20))
    model = made()
    sparse = SparseTraining(model, optimizer := sgd(model), 0.2, schedule=schedule)
    for seed in range(3):
        step(model, optimizer, seed)
    other = made(seed=2)
    again = SparseTraining(other, sgd(other), 0.2, schedule=schedule)
    again.load_state_dict(through_file(sparse.state_dict()))
    assert again.active == sparse.active > 0.5 * sum(mask.numel() for mask in again.masks.values())
