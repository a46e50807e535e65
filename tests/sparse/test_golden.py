"""Sparse training against numbers of the authors' own code: schedules, densities, scores, masks, a whole training.

Weights and data are functions of their names. What has the authors' names here, ``theirs``, is what their code saves.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shiftconv.models import shiftwise, slak
from shiftconv.models.convert.layouts import LAYOUTS
from shiftconv.models.convert.translate import recognise, to_ours, to_theirs
from shiftconv.nn import ShiftwiseConv2d
from shiftconv.nn.large_kernel import DepthwiseBranch
from shiftconv.sparse import Calibration, Granularity, Rule, Schedule, SparseTraining, groups
from shiftconv.sparse.allocate import erk
from shiftconv.sparse.calibration import Probe, snip_scores
from shiftconv.sparse.group import Member, SparseGroup
from shiftconv.sparse.rule import gradient, magnitude
from shiftconv.sparse.update import exchange

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = json.loads((GOLDEN / "sparse.json").read_text())
with np.load(GOLDEN / "sparse.npz") as arrays:
    ARRAYS = {name: arrays[name] for name in arrays.files}


def _generator(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _weight(key, shape, salt):
    n, leaf = _generator(salt + key).standard_normal(tuple(shape)), key.rpartition(".")[2]
    if leaf == "running_var":
        n = np.abs(n) + 0.5
    elif leaf == "gamma" and len(shape) == 1:
        n = 0.5 + 0.1 * n
    elif leaf == "weight" and len(shape) == 1:
        n = 1 + 0.1 * n
    elif leaf == "running_mean" or len(shape) == 1 or leaf in ("gamma", "beta"):
        n *= 0.1
    else:
        n *= (0.1 if ".LoRAs." in key else 1.0) / math.sqrt(math.prod(shape[1:]) if shape[0] > 1 else 1)
    return torch.from_numpy(n.astype(np.float32))


def _batch(name, size=64):
    images = torch.from_numpy(_generator(f"{name}/images").standard_normal((4, 3, size, size)))
    return images, torch.from_numpy(_generator(f"{name}/labels").integers(0, 10, size=4))


def _network(case, salt=""):
    """A small network of theirs with their weights, and the authors' key of each of our parameters."""
    if case.startswith("dstsw"):
        network = shiftwise.shiftwise(
            (1, 1, 2, 1), (8, 16, 24, 32), 2, kernel_sizes=(13, 11, 9, 7), num_paths=2, num_shifts=2, num_classes=10
        )
    else:
        sizes = (7, 5, 3, 3) if "noties" in case else (13, 11, 9, 7)
        network = slak.slak((1, 1, 2, 1), (8, 12, 16, 24), sizes, 3, width=1.0, num_classes=10)
    theirs = to_theirs(network.state_dict(), network)
    fill = {key: _weight(key, v.shape, salt) if v.is_floating_point() else v for key, v in theirs.items()}
    found = recognise(fill)
    network.load_state_dict(to_ours(found, network))
    return network, {ours: key for key, ours in LAYOUTS[found.layout].to_ours(theirs).items()}


def _masks(network, keys, names, packed):
    """Masks ``{our name: bool}`` of the authors' bits, each layer's in whole bytes."""
    parameters = {keys[name]: (name, p) for name, p in network.named_parameters() if name in keys}
    masks, at = {}, 0
    for key in names:
        name, parameter = parameters[key]
        shape = parameter.shape[:2] if ".LoRAs." in key else parameter.shape
        length = (shape.numel() + 7) // 8
        bits = np.unpackbits(packed[at : at + length])[: shape.numel()]
        masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        at += length
    assert at == len(packed)
    return masks


@pytest.mark.parametrize("golden", DOCUMENT["cosine"], ids=lambda golden: str(golden["T_max"]))
def test_the_prune_fraction_falls_as_theirs_and_then_stays(golden):
    schedule = Schedule(
        prune_fraction=golden["prune_rate"], steps=golden["T_max"], final_fraction=golden["eta_min"], stop_fraction=1
    )
    values = [schedule.fraction(step) for step in range(len(golden["values"]))]
    end = golden["T_max"] + 1
    assert values[:end] == pytest.approx(golden["values"][:end], abs=1e-12)
    assert values[end:] == [golden["eta_min"]] * len(values[end:])  # theirs would rise again


@pytest.mark.parametrize("golden", DOCUMENT["erk"], ids=lambda golden: f"{len(golden['shapes'])}, {golden['density']}")
def test_erk_densities_are_theirs(golden):
    layers = [nn.Parameter(torch.empty(shape, device="meta")) for shape in golden["shapes"]]
    masks = [SparseGroup(str(i), [Member(str(i), layer)], layer.shape) for i, layer in enumerate(layers)]
    found = [count / layer.numel() for count, layer in zip(erk(masks, golden["density"]), layers, strict=True)]
    assert found == pytest.approx(golden["values"], abs=1e-12)


def _is_stripe(module):
    return isinstance(module, DepthwiseBranch) and module.weight.shape[2] != module.weight.shape[3]


@pytest.mark.parametrize("golden", DOCUMENT["snip"], ids=lambda golden: golden["name"])
def test_snip_scores_and_layers_are_theirs(golden):
    network, keys = _network(golden["name"])
    network.double()
    if golden["name"].startswith("dstsw"):
        # the paths are scored one by one there
        masks = groups(network, Granularity("kernel", share_paths=False), ShiftwiseConv2d)
        data = _batch("snipsw")
    else:
        masks = groups(network, select=_is_stripe if "_L_" in golden["name"] else None)
        data = _batch("snip", 32)
    scores = snip_scores(Probe(network, Calibration([data])), masks)
    by_key = {}
    for group, score in zip(masks, scores, strict=True):
        key = keys[group.name].replace("LoRAs.1.", "LoRAs.0.")
        by_key[key] = torch.cat((by_key[key], score)) if key in by_key else score
    assert set(by_key) == set(golden["names"])
    ordered = [by_key[key] for key in golden["names"]]
    # theirs are rounded to float32 on the way
    assert [s.sum().item() for s in ordered] == pytest.approx(golden["total"], rel=1e-6)
    if "largest" in golden:
        assert [s.max().item() for s in ordered] == pytest.approx(golden["largest"], rel=1e-6)
    everything = torch.cat([s.flatten() for s in ordered])
    threshold = everything.topk(int(len(everything) * golden["keep"])).values[-1]
    assert threshold.item() == pytest.approx(golden["threshold"], rel=1e-7, abs=1e-12)
    assert [(s <= threshold).double().mean().item() for s in ordered] == pytest.approx(golden["sparsity"], abs=1e-12)


@pytest.mark.parametrize("golden", DOCUMENT["exchange"], ids=lambda golden: golden["name"])
def test_an_exchange_prunes_and_regrows_as_theirs(golden):
    network, keys = _network(golden["name"], golden["salt"])
    ours = {keys[name]: name for name, _ in network.named_parameters() if name in keys}
    coarse = golden["name"].startswith("dstsw")
    images, labels = _batch(f"grow{golden['salt']}", 64 if "noties" in golden["name"] or coarse else 32)
    F.cross_entropy(network.train()(images.float()), labels).backward()
    masks = groups(network, Granularity("kernel", share_paths=False), ShiftwiseConv2d) if coarse else groups(network)
    by_name = {group.name: group for group in masks}
    first = {}
    for key in golden["names"]:
        group = by_name[ours[key]]
        drawn = _generator(f"{golden['salt']}{key}/mask").random(tuple(group.shape))
        first[group.name] = torch.from_numpy(drawn < golden["density"])
    rule = Rule(magnitude, gradient)
    schedule = Schedule(prune_fraction=golden["prune_rate"])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    sparse = SparseTraining(network, optimizer, allocate=first, rule=rule, granularity=masks, schedule=schedule)
    pruned = _masks(network, keys, golden["names"], ARRAYS[f"{golden['name']}|pruned"])
    for key, removed in zip(golden["names"], golden["removed"], strict=True):
        group = by_name[ours[key]]
        assert removed == math.ceil(golden["prune_rate"] * group.active)
        score = group.in_rows(group.members[0].sums(group.members[0].weight.detach().abs(), len(group.shape)))
        active = group.in_rows(group.mask)
        left = exchange(active, group.allowed(), active.sum(1) - removed, 0.0, (score, score), rule, torch.Generator())
        assert torch.equal(left.view(group.shape), pruned[group.name]), key
    if coarse:
        return
    before = sparse.active
    sparse.update()
    assert sparse.active == before  # theirs lost some where gradients are zero
    grown = _masks(network, keys, golden["names"], ARRAYS[f"{golden['name']}|grown"])
    clear = [ours[key] for key, unique in zip(golden["names"], golden["growth_unique"], strict=True) if unique]
    assert len(clear) > 20
    for name in clear:
        assert torch.equal(sparse.masks[name], grown[name]), name


def test_a_training_goes_through_their_masks():
    """All of it: nine AdamW steps, an update after each third one, and their average of the weights."""
    golden = DOCUMENT["sequence"]
    network, keys = _network("noties", golden["salt"])
    first = _masks(network, keys, golden["names"], ARRAYS["sequence|init"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = Schedule(
        every_steps=golden["args"]["update_frequency"],
        prune_fraction=golden["args"]["prune_rate"],
        steps=golden["T_max"],
        final_fraction=0.005,
        stop_fraction=1.0,
    )
    # theirs lets AdamW average the gradients of dead weights
    rule = Rule(magnitude, gradient, dense_moments=True)
    sparse = SparseTraining(network, optimizer, allocate=first, rule=rule, schedule=schedule)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(network)  # the first one copies
    for record in golden["records"]:
        if record["step"] > 0:
            images, labels = _batch(f"seq{golden['salt']}{record['step']}")
            loss = F.cross_entropy(network.train()(images.float()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with sparse.averaging(ema.module):
                ema.update_parameters(network)
            assert loss.item() == pytest.approx(record["loss"], rel=1e-5)
            assert schedule.fraction(record["step"]) == pytest.approx(record["prune_rate"])
        assert sparse.active == record["total"]
    final = _masks(network, keys, golden["names"], ARRAYS["sequence|final"])
    for name, mask in final.items():
        assert torch.equal(sparse.masks[name], mask), name
    sums = {keys[name]: p.double().sum().item() for name, p in network.named_parameters()}
    assert sums == pytest.approx({key: golden["final_weight_sums"][key] for key in sums}, abs=1e-4)
    means = {keys[name]: p.double().sum().item() for name, p in ema.module.named_parameters()}
    assert means == pytest.approx({key: golden["ema_sums"][key] for key in means}, abs=1e-4)
