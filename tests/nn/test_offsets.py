"""What a training loop does with the offsets of a whole model."""

import itertools

import pytest
import torch
from torch import nn

from shiftconv.nn import (
    ActiveShift2d,
    FreezeOffsets,
    SparseShift2d,
    freeze_offsets,
    lattice_penalty,
    normalize_offset_gradients,
    offset_groups,
    offset_parameters,
    offset_penalty,
)


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    shared = ActiveShift2d(4, 2.0, generator=generator)
    sparse = SparseShift2d(4, 2.0, generator=generator)
    return nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.BatchNorm2d(4), nn.Sequential(sparse), shared)


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_penalty_is_the_sum_of_all_and_trains():
    model = network()
    one, two = model[1].offset, model[3][0].offset
    assert [id(offset) for offset in offset_parameters(model)] == [id(one), id(two)]
    penalty = offset_penalty(model)
    torch.testing.assert_close(penalty, one.abs().sum() + two.abs().sum())
    penalty.backward()
    assert torch.equal(grad_of(one), one.detach().sign()) and torch.equal(grad_of(two), two.detach().sign())
    model[3][0].offset = one  # one parameter in two modules counts once
    torch.testing.assert_close(offset_penalty(model), one.abs().sum())
    nothing = offset_penalty(nn.Conv2d(3, 4, 1))
    assert nothing.item() == 0 and nothing.shape == ()


def test_lattice_penalty_pulls_to_whole_pixels():
    model = network()
    lattice_penalty(model).backward()
    for offset in offset_parameters(model):
        torch.testing.assert_close(grad_of(offset), offset.detach() - offset.detach().round())


def test_groups_give_offsets_their_own_rate():
    model = network()
    model[2].weight.requires_grad_(False)
    weights, offsets = offset_groups(model, 0.1, 0.02, weight_decay=5e-4)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 5e-4)
    assert (offsets["lr"], offsets["weight_decay"]) == (pytest.approx(0.002), 0.0)
    assert {id(p) for p in offsets["params"]} == {id(p) for p in offset_parameters(model)}
    assert [id(p) for p in weights["params"]] == [id(p) for p in (*model[0].parameters(), model[2].bias)]
    torch.optim.SGD([weights, offsets], lr=1.0)
    assert len(offset_groups(nn.Conv2d(3, 4, 1), 0.1)) == 1 == len(offset_groups(SparseShift2d(3), 0.1))
    with pytest.raises(ValueError, match=r"offset_lr_scale must be at least 0, got -1"):
        offset_groups(model, 0.1, -1)


def test_normalize_gradients_after_accumulation():
    model = network()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    one, two = model[1].offset, model[3][0].offset
    grad_of(one)[0] = 0
    two.grad = None
    before = grad_of(model[0].weight).clone()
    normalize_offset_gradients(model)
    expected = torch.full((4, 2), 0.5**0.5)
    expected[0] = 0
    torch.testing.assert_close(grad_of(one), expected)
    assert two.grad is None and torch.equal(grad_of(model[0].weight), before)


def test_clip_gradients():
    model = network()
    offset = model[1].offset
    offset.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-30.0, 40.0]])
    normalize_offset_gradients(model, max_norm=1.0)
    torch.testing.assert_close(offset.grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [-0.6, 0.8]]))
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        normalize_offset_gradients(model, max_norm=0)


@pytest.mark.parametrize(("make", "more"), [(torch.optim.SGD, dict(momentum=0.9)), (torch.optim.AdamW, {})])
def test_frozen_offsets_stay_whatever_the_optimiser_remembers(make, more):
    model = network()
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1, **more)
    freeze = FreezeOffsets(model)
    history = []
    for step in range(6):
        assert freeze.step(step / 6) == (step >= 3)
        optimizer.zero_grad(set_to_none=False)
        model(torch.ones(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        history.append([p.detach().clone() for p in (*offset_parameters(model), model[0].weight)])
    for step, (before, after) in enumerate(itertools.pairwise(history), start=1):
        same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert same == ([True, True, False] if step >= 3 else [False] * 3)


def test_freeze_is_stateless_and_checked():
    model = network()
    assert not FreezeOffsets(model, 0.25).step(0.24) and model[1].offset.requires_grad
    assert FreezeOffsets(model, 0.25).step(0.9) and not model[1].offset.requires_grad
    freeze_offsets(model)
    assert offset_groups(model, 0.1)[-1]["lr"] == 0.1  # no group is left for them
    with pytest.raises(ValueError, match=r"at must be from 0 to 1, got 50"):
        FreezeOffsets(model, 50)
