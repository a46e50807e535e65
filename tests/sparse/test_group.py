"""Groups: how a mask lies on its parameters, and the exact choice of entries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shiftconv.sparse.group import Member, SparseGroup, highest

often = settings(deadline=None, max_examples=150, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@often
@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))
def test_highest_is_exact_whatever_is_equal(seed, rows, length, values):
    """Few values, so many are equal; also infinite ones."""
    rng = np.random.default_rng(seed)
    table = np.array([-np.inf, -1.0, 0.0, 2.0, np.inf])[:values] if seed % 2 else np.arange(values) * 1.0
    score = rng.choice(table, (rows, length))
    candidates = rng.random((rows, length)) < 0.6
    count = rng.integers(0, length + 2, rows)
    chosen = highest(
        torch.from_numpy(score), torch.from_numpy(candidates), torch.from_numpy(count), seeded(seed)
    ).numpy()
    assert not (chosen & ~candidates).any()
    assert (chosen.sum(1) == np.minimum(count, candidates.sum(1))).all()
    for row in range(rows):
        if chosen[row].any() and (candidates & ~chosen)[row].any():
            assert score[row][chosen[row]].min() >= score[row][(candidates & ~chosen)[row]].max()


@pytest.mark.parametrize("rows", [1, 3])
def test_of_equal_entries_each_is_chosen_as_often(rows):
    times, runs = np.zeros(8), 2000
    candidates = torch.ones(rows, 8, dtype=torch.bool)
    candidates[:, 5] = False
    score = torch.zeros(rows, 8)
    score[:, 2] = 1.0
    generator = seeded()
    for _ in range(runs):
        times += highest(score, candidates, torch.tensor([3] * rows), generator)[0].numpy()
    assert times[5] == 0 and times[2] == runs
    others = np.delete(times, [2, 5])
    assert (abs(others - runs / 3) < 4 * np.sqrt(runs * 2 / 9)).all() and others.sum() == 2 * runs


def test_a_mask_lies_on_its_members():
    mask = np.array([True, False, True, False])
    rows, bias, columns = (nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (4,), (5, 4, 1, 2)))
    group = SparseGroup("units", [Member("a", rows), Member("b", bias), Member("c", columns, axis=1)], torch.Size([4]))
    group.mask = torch.from_numpy(mask)
    for parameter in (rows, bias, columns):
        parameter.grad = torch.full_like(parameter, 2.0)
    group.apply()
    group.mask_gradients()
    for value, factor in ((lambda p: p.detach(), 1.0), (lambda p: p.grad, 2.0)):
        assert (value(rows).numpy() == factor * mask[:, None] * np.ones((4, 3))).all()
        assert (value(bias).numpy() == factor * mask).all()
        assert (value(columns).numpy() == factor * mask[None, :, None, None] * np.ones((5, 4, 1, 2))).all()
    assert group.active == 2 and group.weights == 12 + 4 + 40 and group.capacity == group.size == 4
    bias.grad = None
    group.mask_gradients()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_chunks_and_inputs_are_seen_where_they_are(layout):
    base = torch.arange(6 * 4 * 3 * 2.0).view(6, 4, 3, 2)
    if layout == "channels_last":
        base = base.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        base = torch.stack([base, base], -1)[..., 0]
    weight = nn.Parameter(base.clone(memory_format=torch.preserve_format) if layout != "sliced" else base)
    truth = base.numpy().copy()
    chunked = Member("w", weight, chunk=3)
    assert (chunked.sums(weight.detach(), 2).numpy() == truth.reshape(2, 3, 4, 6).sum((1, 3))).all()
    inputs = Member("w", weight, inputs_last=True)
    assert (inputs.view(weight.detach()).numpy() == np.moveaxis(truth, 1, -1)).all()
    group = SparseGroup("w", [chunked], torch.Size([2, 4]))
    mask = np.array([[True, False, False, True], [False, True, False, False]])
    group.mask = torch.from_numpy(mask)
    group.apply()
    assert (weight.detach().numpy() == truth * np.repeat(mask, 3, 0)[:, :, None, None]).all()


def test_what_was_ever_active_is_explored():
    group = SparseGroup("w", [Member("w", nn.Parameter(torch.ones(4)))], torch.Size([4]))
    assert group.active == 4 and not group.explored.any()
    group.mask = torch.tensor([True, False, False, False])
    own = group.mask
    group.mask = torch.tensor([False, False, True, False])
    assert group.mask is own and group.explored.tolist() == [True, False, True, False]


def test_rows():
    group = SparseGroup("w", [Member("w", nn.Parameter(torch.ones(2, 8)))], torch.Size([2, 8]), row=4, fixed=2)
    assert group.rows == 4 and group.in_rows(group.mask).shape == (4, 4) == group.allowed().shape
    group.reachable = torch.arange(16).view(2, 8) < 5
    assert group.allowed().sum(1).tolist() == [4, 1, 0, 0] and group.capacity == 5


def test_paths_go_apart_with_the_same_mask():
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    members = [Member(f"w.{i}", weight) for i, weight in enumerate(weights)]
    group = SparseGroup("w.0", members, torch.Size([3, 2]), paths=True)
    group.mask = torch.arange(6).view(3, 2) < 2
    group.reachable = torch.arange(6).view(3, 2) < 4
    one, other = group.apart()
    assert (one.name, other.name) == ("w.0", "w.1") and one.members == members[:1]
    one.mask = ~one.mask
    assert torch.equal(other.mask, group.mask) and not torch.equal(one.mask, group.mask)
    assert other.capacity == 4 and not other.paths
