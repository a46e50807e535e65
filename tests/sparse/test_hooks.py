"""Following an optimiser: each real step once, and none after the end."""

import pytest
import timm.optim
import torch
from torch import nn

from shiftconv.sparse.hooks import follow


def recorded(optimizer):
    seen = []
    return seen, follow(optimizer, *(lambda word=word: seen.append(word) for word in ("before", "after", "made")))


def parameter():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight


def bare(weight):
    """Without torch's hooks, as Lookahead is before its first ``zero_grad``."""

    class Lookahead(timm.optim.Lookahead):
        def step(self, closure=None):
            return super().step(closure)

    return Lookahead(torch.optim.SGD([weight], lr=0.1), k=1)


MAKERS = {
    "torch": lambda w: torch.optim.SGD([w], lr=0.1),
    "timm": lambda w: timm.optim.create_optimizer_v2([w], "lamb", lr=0.1),
    "bare": bare,
}
every_maker = pytest.mark.parametrize("name", MAKERS)


@every_maker
def test_each_step_once(name):
    weight = parameter()
    optimizer = MAKERS[name](weight)
    values = []

    def look():
        values.append(weight[0].item())

    handle = follow(optimizer, look, look, look)
    for _ in range(2):
        optimizer.step()
    assert len(values) == 4 and values[0] == 1.0 and values[0] != values[1] == values[2] != values[3]
    handle.remove()
    optimizer.step()
    assert len(values) == 4
    handle.remove()


@every_maker
def test_a_closure_and_its_loss_pass_through(name):
    weight = parameter()
    optimizer = MAKERS[name](weight)
    seen, _ = recorded(optimizer)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    optimizer.step()
    assert seen == ["made", "after", "before", "after"]


@every_maker
def test_also_after_zero_grad(name):
    """Torch may give a class its hooks late."""
    weight = parameter()
    optimizer = MAKERS[name](weight)
    seen, handle = recorded(optimizer)
    optimizer.zero_grad()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert seen == ["before", "after"]
    handle.remove()
    optimizer.step()
    assert len(seen) == 2


@every_maker
def test_a_schedule_of_the_rate_does_not_mind(name):
    for first in (True, False):
        weight = parameter()
        optimizer = MAKERS[name](weight)
        inner = getattr(optimizer, "_base_optimizer", optimizer)

        def schedule(optimizer=optimizer, inner=inner):
            return torch.optim.lr_scheduler.StepLR(inner if optimizer is not inner else optimizer, 1)

        if first:
            rates = schedule()
        seen, handle = recorded(optimizer)
        if not first:
            rates = schedule()
        optimizer.step()
        rates.step()  # warns, so fails, if it missed the step
        handle.remove()
        optimizer.step()
        rates.step()
        assert seen == ["before", "after"]


@every_maker
def test_one_follower_may_leave_before_another(name):
    for order in ((0, 1), (1, 0)):
        optimizer = MAKERS[name](parameter())
        both = [recorded(optimizer) for _ in range(2)]
        optimizer.step()
        both[order[0]][1].remove()
        optimizer.step()
        both[order[1]][1].remove()
        optimizer.step()
        assert len(both[order[0]][0]) == 2 and len(both[order[1]][0]) == 4


def test_a_step_that_an_optimiser_leaves_out_itself():
    weight = parameter()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    seen, _ = recorded(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (True, False, True):
        scaler.scale(torch.ones(()))  # makes the scale
        weight.grad = torch.full((3,), float("inf") if bad else 1.0)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight) == bad
    assert seen == ["before", "after"]
