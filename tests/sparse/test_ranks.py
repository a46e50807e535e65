"""Two processes: the same masks whatever each of them has seen."""

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shiftconv.sparse import Calibration, Rule, Schedule, SparseTraining, ranks
from shiftconv.sparse.rule import gradient, magnitude

from .cases import Large, batch, calibration, leaks, made, sgd, step

RUNS = {
    "set": dict(rule="set", allocate="uniform"),
    "rigl": dict(rule="rigl", allocate="erk"),
    "snip": dict(rule="rigl", allocate="snip"),
    "grasp": dict(rule="mixed", allocate="grasp"),
    "hidden": dict(rule="set", granularity="hidden"),
    "fan_in": dict(rule="set_signed", granularity="fan_in"),
    "global": dict(rule=Rule(magnitude, gradient, scope="global")),
    "momentum": dict(rule="snfs"),
    "falling": dict(rule="rigl", schedule=Schedule(every_steps=1, start_density=0.9, density_steps=(0, 4))),
}
ALONE = {"set": dict(rule="set"), "rigl": dict(rule="rigl"), "snip": dict(rule="rigl", allocate="snip")}


def _together(rank, name):
    """Data of its own on each process, gradients of all."""
    model = DistributedDataParallel(made())
    optimizer = sgd(model.module)
    data = Calibration([batch(1000 + rank)])
    schedule = Schedule(every_steps=1)
    sparse = SparseTraining(model, optimizer, **(dict(density=0.35, schedule=schedule, calibration=data) | RUNS[name]))
    masks = [{n: m.clone() for n, m in sparse.masks.items()}]
    for seed in range(5):
        step(model, optimizer, 10 * seed + rank)
        assert not leaks(sparse)
        masks.append({n: m.clone() for n, m in sparse.masks.items()})
    assert sparse.updates == 5
    return masks, model.module.state_dict(), optimizer.state_dict()


def _alone(rank, name):
    """Without DDP nobody adds gradients up, and the weights of each process go their own way; the masks do not."""
    model = made(seed=rank)
    optimizer = sgd(model)
    schedule = Schedule(every_steps=1)
    data = Calibration([batch(1000 + rank)])
    sparse = SparseTraining(model, optimizer, 0.35, schedule=schedule, calibration=data, **ALONE[name])
    masks = [{n: m.clone() for n, m in sparse.masks.items()}]
    for seed in range(3):
        step(model, optimizer, 10 * seed + rank)
        masks.append({n: m.clone() for n, m in sparse.masks.items()})
        assert not leaks(sparse)
    return masks, model.state_dict(), {}


def _paths(rank, name):
    model = DistributedDataParallel(made(Large))
    optimizer = sgd(model.module)
    schedule = Schedule(every_steps=1, share_every=2)
    sparse = SparseTraining(model, optimizer, 0.35, schedule=schedule, calibration=calibration(1 + rank, size=4))
    for seed in range(4):
        step(model, optimizer, 10 * seed + rank, size=4)
    return [sparse.masks], model.module.state_dict(), {}


def _not_finite(rank, name):
    """One process alone has seen an infinite gradient: all wait."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = SparseTraining(model, optimizer, 0.35, rule="rigl", schedule=Schedule(every_steps=1))
    masks, updates = [{n: m.clone() for n, m in sparse.masks.items()}], []
    for seed in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()
        if seed == 0 and rank == 1:
            model.fc1.weight.grad[~sparse.masks["fc1.weight"]] = float("inf")
        optimizer.step()
        updates.append(sparse.updates)
        masks.append({n: m.clone() for n, m in sparse.masks.items()})
    assert updates == [0, 1, 2]
    return masks, {}, {}


def _means(rank, name):
    """What is decided on is the mean of what the processes have, and messages keep shapes and types."""
    (mean, other) = ranks.average([torch.full((2, 3), float(rank)), torch.tensor(3.0 + rank, dtype=torch.float64)])
    assert (mean == 0.5).all() and mean.shape == (2, 3) and float(other) == 3.5
    masks = [
        torch.arange(7) % 2 == rank,
        torch.ones(2, 2, dtype=torch.bool) if rank else torch.zeros(4, dtype=torch.bool),
    ]
    first, second = ranks.broadcast(masks)
    assert first.tolist() == [True, False] * 3 + [True] and not second.any() and second.shape == masks[1].shape
    assert ranks.size() == 2 and ranks.decides() == (rank == 0)
    return [{}], {}, {}


KINDS = {"together": _together, "alone": _alone, "paths": _paths, "not finite": _not_finite, "means": _means}
CASES = [("together", n) for n in RUNS] + [("alone", n) for n in ALONE]
CASES += [("paths", ""), ("not finite", ""), ("means", "")]


def _process(rank, port, path):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for kind, name in CASES:
            result = KINDS[kind](rank, name)
            dist.barrier()
            torch.save(result, f"{path}/{kind} {name} {rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes have, by case; all run in one pair of processes, whose start takes the most time."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = None
    try:
        torch.multiprocessing.spawn(_process, (port, str(path)), nprocs=2)
    except Exception as caught:
        error = caught

    def result(kind, name=""):
        files = [path / f"{kind} {name} {rank}" for rank in (0, 1)]
        if not all(file.exists() for file in files):
            pytest.fail(f"no results: {error}")
        return [torch.load(file) for file in files]

    return result


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", RUNS)
def test_with_ddp_masks_and_weights_are_the_same(results, name):
    (masks, weights, state), (others, other_weights, other_state) = results("together", name)
    assert len(masks) == 6 and all(map(same, masks, others))
    parameters = {key for key, _ in made().named_parameters()}  # statistics of norms are each process's own
    for key in parameters:
        assert torch.equal(weights[key], other_weights[key]), key
    for key, kept in state["state"].items():
        assert same(kept, other_state["state"][key])
    assert any(not same(one, other) for one, other in itertools.pairwise(masks))


@pytest.mark.parametrize("name", ALONE)
def test_who_would_decide_otherwise_is_overruled(results, name):
    (masks, weights, _), (others, other_weights, _) = results("alone", name)
    assert len(masks) == 4 and all(map(same, masks, others))
    assert not torch.equal(weights["fc1.weight"], other_weights["fc1.weight"])


def test_paths_are_shared_on_all_processes_at_once(results):
    (masks, weights, _), (others, other_weights, _) = results("paths")
    assert same(masks[0], others[0])
    assert torch.equal(masks[0]["1.weights.0"], masks[0]["1.weights.1"])
    for key in (k for k, _ in made(Large).named_parameters()):
        assert torch.equal(weights[key], other_weights[key]), key


def test_all_wait_for_one(results):
    (masks, *_), (others, *_) = results("not finite")
    assert all(map(same, masks, others))
    assert same(masks[0], masks[1]) and not same(masks[1], masks[2])


def test_messages(results):
    assert results("means")


def test_one_process_needs_no_messages():
    value = [torch.ones(2)]
    assert ranks.average(value)[0] is value[0] is ranks.broadcast(value)[0]
    assert ranks.size() == 1 and ranks.decides() and isinstance(made(), nn.Module)
