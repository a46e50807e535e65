"""Averages of sparse weights: as sparse as the weights, and plain averages of what stays."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from shiftconv.sparse import Schedule, SparseTraining

from .cases import Large, actives, made, sgd, step


def timm_ema(model):
    average = ModelEmaV3(model, decay=0.9)
    return average, lambda: average.update(model)


def torch_ema(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return average, lambda: average.update_parameters(model)


def torch_single(model):
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    return average, lambda: average.update_parameters(model)


@pytest.mark.parametrize("kind", [timm_ema, torch_ema, torch_single])
@pytest.mark.parametrize("granularity", ["weight", "channel", "hidden"])
def test_an_average_is_as_sparse_as_the_weights(kind, granularity):
    model = made()
    optimizer = sgd(model)
    sparse = SparseTraining(
        model, optimizer, 0.4, rule="set", granularity=granularity, schedule=Schedule(every_steps=3)
    )
    average, update = kind(model)
    with sparse.averaging(average.module):
        update()  # torch's first one is a copy
    truth = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    alive = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    for weight, mask in actives(sparse):
        alive[names[id(weight)]] = torch.from_numpy(mask.copy())
    masked = {names[id(weight)] for weight, _ in actives(sparse)}
    jumped = 0
    for seed in range(10):
        step(model, optimizer, seed)
        before = {n: a.clone() for n, a in alive.items()}
        for weight, mask in actives(sparse):
            alive[names[id(weight)]] = torch.from_numpy(mask.copy())
        with sparse.averaging(average.module):
            update()
        for name, parameter in model.named_parameters():
            weight = parameter.detach().double()
            mean = 0.9 * truth[name] + 0.1 * weight
            grown = alive[name] & ~before[name]
            jumped += int((grown & (weight != 0)).sum())
            new = torch.where(grown, weight, mean) * alive[name]
            # What came back in the last update was zero then; its first step comes now.
            pending = alive[name] & (truth[name] == 0) & (weight != 0) & (name in masked)
            truth[name] = torch.where(pending, weight, new)
        found = dict(average.module.named_parameters())
        for name, expected in truth.items():
            torch.testing.assert_close(found[name].detach().double(), expected, rtol=1e-5, atol=1e-7)
            assert not found[name][~alive[name]].any(), name
    assert sparse.updates == 3
    if granularity == "weight":
        kept = sum(int((p != 0).sum()) for n, p in average.module.named_parameters() if n in sparse.masks)
        assert kept == sparse.active - sum(
            int(((dict(model.named_parameters())[n] == 0) & m).sum()) for n, m in sparse.masks.items()
        )


def test_what_starts_from_zero_is_averaged_as_ever():
    """A weight of zero that was always active has not come back."""
    for granularity, name in (("weight", "0.weight"), ("channel", "0.bias")):
        model = nn.Sequential(nn.Linear(4, 4))
        parameter = dict(model.named_parameters())[name]
        nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sparse = SparseTraining(model, optimizer, 1.0, rule="static", granularity=granularity)
        average = ModelEmaV3(model, decay=0.9)
        parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
        with sparse.averaging(average.module):
            average.update(model)
        found = dict(average.module.named_parameters())[name]
        torch.testing.assert_close(found, torch.full_like(found, 0.1))


def test_paths_and_other_types():
    model = made(Large)
    optimizer = sgd(model)
    schedule = Schedule(every_steps=1, share_every=2)
    sparse = SparseTraining(model, optimizer, 0.4, rule="rigl", schedule=schedule)
    average = copy.deepcopy(model).double()
    for seed in range(3):
        step(model, optimizer, seed)
        with sparse.averaging(average), torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight.double(), 0.1)
        for name, mask in sparse.masks.items():
            assert not dict(average.named_parameters())[name][~mask].any()


def test_wrappers_make_no_difference(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = made()
        parallel = DistributedDataParallel(model)
        sparse = SparseTraining(parallel, sgd(model), 0.4)
        assert next(iter(sparse.masks)) == "stem.weight"
        average = ModelEmaV3(parallel, decay=0.9)
        with torch.no_grad():
            average.module.module.fc1.weight.fill_(1.0)
        with sparse.averaging(average.module):
            average.update(parallel)
        assert torch.equal(average.module.module.fc1.weight != 0, sparse.masks["fc1.weight"])
    finally:
        torch.distributed.destroy_process_group()


def test_names_that_only_look_like_wrappers():
    """A layer that is called ``module`` is not the one it would be without that."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.full((4, 4), 7.0))

    model = Net()
    sparse = SparseTraining(model, sgd(model), 0.5)
    average = copy.deepcopy(model)
    with torch.no_grad():
        average.module.weight.fill_(1.0)
    with sparse.averaging(average):
        pass
    assert torch.equal(average.module.weight != 0, sparse.masks["module.weight"]) and (average.weight == 7).all()


def test_an_average_of_another_model_is_refused():
    model = made()
    sparse = SparseTraining(model, sgd(model), 0.5)
    for other in (nn.Linear(3, 3), made(hidden=4)):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="the average has no parameter"), sparse.averaging(other):
            pytest.fail("should not come here")
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
