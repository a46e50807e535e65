import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from shiftconv.models import create_model
from shiftconv.recipes import get
from shiftconv.train.optim import Schedules, create_optimizer, create_scheduler
from shiftconv.train.settings import Optim


def rates(optim, epochs, updates_per_epoch):
    """The rate of each update."""
    optimizer = create_optimizer(nn.Linear(2, 2), optim)
    scheduler = create_scheduler(optimizer, optim, epochs, updates_per_epoch)
    found = []
    for update in range(epochs * updates_per_epoch):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_shiftresnet_rates():
    by_epoch = rates(get("shiftresnet20_cifar10").optim, 164, 3)
    for epoch in range(164):
        expected = 0.1 if epoch <= 81 else 0.01 if epoch <= 122 else 0.001
        assert by_epoch[3 * epoch : 3 * epoch + 3] == pytest.approx([expected] * 3)


def test_cosine_with_warmup():
    found = rates(Optim(lr=1.0, schedule="cosine", warmup_epochs=2, warmup_lr=0.2, min_lr=0.1), 10, 4)
    assert found[:9] == pytest.approx([0.2 + 0.8 * min(update, 7) / 7 for update in range(9)])
    assert found[8:] == sorted(found[8:], reverse=True)
    assert 0.1 < found[-1] < 0.11


def test_constant():
    assert rates(Optim(lr=0.3, schedule="constant"), 3, 2) == [0.3] * 6


@pytest.mark.parametrize(
    ("optim", "cls"),
    [(Optim(), torch.optim.SGD), (Optim(nesterov=True), torch.optim.SGD), (Optim("adamw"), torch.optim.AdamW)],
)
def test_optimizer(optim, cls):
    optimizer = create_optimizer(nn.Linear(2, 2), optim)
    assert type(optimizer) is cls
    assert optimizer.defaults.get("nesterov", False) == optim.nesterov
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}


@pytest.mark.parametrize("name", ["adam", "lamb", "lion"])
def test_other_optimizers(name):
    model = nn.Linear(2, 2)
    optimizer = create_optimizer(model, Optim(name, lr=1e-3))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_no_decay_of_biases():
    optimizer = create_optimizer(nn.Linear(2, 2), Optim(decay_norms=False))
    decays = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert decays == {5e-4: [2], 0.0: [1]}


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(1, 1), (2, 1.75), (1, 0.75)])
def test_warmup_that_covers_the_whole_run(epochs, warmup_epochs, caplog):
    found = rates(Optim(lr=0.8, schedule="cosine", warmup_epochs=warmup_epochs), epochs, 4)
    steps = round(4 * warmup_epochs)
    assert found == pytest.approx([0.8 * min(update / max(1, steps - 1), 1) for update in range(4 * epochs)])
    assert not caplog.records


@pytest.mark.parametrize("decay_norms", [True, False])
def test_the_offsets_of_learned_shifts_take_no_weight_decay(decay_norms):
    net = create_model("asresnet20", width=8)
    optimizer = create_optimizer(net, Optim(lr=0.1, weight_decay=0.5, decay_norms=decay_norms))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len([*net.parameters()])
    for name, parameter in net.named_parameters():
        if name.endswith("offset"):
            assert decay[id(parameter)] == 0
        elif parameter.ndim > 1 or decay_norms:
            assert decay[id(parameter)] == 0.5


GOLDEN = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
def test_the_authors_schedule_number_for_number(case):
    args = case["args"]
    epochs, updates = args["epochs"], args["niter_per_ep"]
    warmup = args.get("warmup_steps", -1)
    warmup_epochs = warmup / updates if warmup > 0 else args.get("warmup_epochs", 0)
    optim = Optim("adamw", lr=args["base_value"], min_lr=args["final_value"], warmup_epochs=warmup_epochs)
    optimizer = create_optimizer(nn.Linear(2, 2), optim)
    scheduler = create_scheduler(optimizer, optim, epochs, updates)
    for update, value in zip(case["index"], case["values"], strict=True):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(value, rel=1e-9, abs=1e-15)


def test_weight_decay_follows_a_cosine_and_leaves_what_has_none():
    optim = Optim("adamw", weight_decay=0.04, weight_decay_end=0.4, decay_norms=False)
    optimizer = create_optimizer(nn.Linear(2, 2), optim)
    schedules = Schedules(optimizer, optim, 2, 10)
    found = []
    for update in range(20):
        schedules.step_update(update)
        found.append([group["weight_decay"] for group in optimizer.param_groups])
    expected = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * update / 20)) / 2 for update in range(20)]
    assert [both[0] for both in found] == pytest.approx(expected)
    assert {both[1] for both in found} == {0.0}


def test_any_optimiser_of_timm():
    optim = Optim("lookahead_radam", lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    optimizer = create_optimizer(nn.Linear(2, 2), optim)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match="unknown optimiser 'sdg'; did you mean 'sgd'"):
        create_optimizer(nn.Linear(2, 2), Optim("sdg"))
    with pytest.raises(ValueError, match="the optimiser sgd does not take betas"):
        create_optimizer(nn.Linear(2, 2), Optim("sgd", betas=(0.8, 0.9)))
