"""State dicts that no program wrote: whatever their keys and shapes are, the error is a ValueError of one line."""

import copy
import math
import random
import re

import pytest
import torch

from shiftconv.models import create_model
from shiftconv.models.convert import identify, load_checkpoint
from shiftconv.models.convert.layouts import LAYOUTS
from shiftconv.models.convert.translate import to_theirs

NAMED = {  # as narrow as can be
    "slak": ("slak_tiny", 0.05),
    "slak_split": ("slak_split_tiny", 0.05),
    "slak_weighted": ("slak_weighted_tiny", 0.05),
    "slak_shuffled": ("slak_shuffled_tiny", 0.1),
    "shiftwise_v1": ("shiftwise_v1_tiny", 0.1),
    "shiftwise": ("shiftwise_tiny", 0.1),
}


def named(layout, **arguments):
    name, width = NAMED[layout]
    return create_model(name, width=width, num_classes=5, **arguments)


def saved(weights, tmp_path):
    torch.save(weights, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def refused(call, *wanted):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 3000 and all(word in text for word in wanted), text


EXTENTS = (0, 1, 2, 3, 5, 7, 8, 51, 1000, 2**20, 2**31, 2**40)
KEYS = (
        "downsample_layers.0.0.weight", "stages.0.0.gamma", "stages.0.0.large_kernel.LoRA1.conv.weight", "head.weight",
        "stages.0.0.large_kernel.LoRA.weight", "stages.0.0.large_kernel.lkb_reparam.bias", "stages.0.0.dwconv.weight",
        "stages.1.0.pwconv2.0.bias", "stages.0.0.dwconv.bias", "stages.0.0.dwconv.lk_origin.bias", "norm0.weight",
        "stages.0.blocks.0.mix.merged.tall", "stages.0.blocks.0.mix.tall.weight", "stages.0.blocks.0.fc1.weight",
        "stages.0.blocks.0.conv_dw.bias", "stages.0.blocks.0.mix.tall_slots", "stages.0.blocks.0.mix.tall_weights.0",
        "stages.2.0.large_kernel.LoRAs.0.weight", "stages.0.blocks.1000000.gamma", "stem.0.weight", "stem.3.weight", "",
        "stages.0.0.large_kernel.LoRAs.99999999999999999999.weight", "linear.weight", ".", "stages..0.gamma",
)  # fmt: skip


@pytest.fixture(scope="module")
def genuine():
    """By layout, the state dicts that fuzzing starts from, without data."""
    weights = {}
    for layout in NAMED:
        network = named(layout)
        weights[layout] = to_theirs(network.state_dict(), network)
        weights[f"ours of {layout}"] = network.state_dict()
        if LAYOUTS[layout].merges and layout != "slak":
            weights[f"merged {layout}"] = to_theirs(network.state_dict(), network, merge=True)
    square = named("slak", decomposed=False)
    weights["merged slak"] = to_theirs(square.state_dict(), square, merge=True)
    with torch.device("meta"):
        network = create_model("unireplknet_a")
        weights["ours of unireplknet"] = network.state_dict()
        weights["unireplknet"] = to_theirs(network.state_dict(), network)
        weights["merged unireplknet"] = to_theirs(network.state_dict(), network, merge=True)
        network = create_model("convnext_tiny")
        weights["convnext"] = to_theirs(network.state_dict(), network)
    return {name: {key: value.to("meta") for key, value in each.items()} for name, each in weights.items()}


def broken(rng, weights, extents=EXTENTS):
    """A few keys dropped, renamed, added, or of another shape or type."""
    weights = dict(weights)
    for _ in range(rng.randint(1, 3)):
        first = [key for key in weights if re.match(r"stem|downsample|head|linear|stages\.0\.", key)]
        key = rng.choice(first if first and rng.random() < 0.6 else [*weights])
        alike = [other for other in weights if other.startswith(key.rpartition(".")[0])]
        what = rng.choice(["drop", "drop all", "rename", "add", "shape", "shape of all", "type"])
        if what in ("drop", "rename"):
            value = weights.pop(key)
            if what == "rename":
                weights[rng.choice(KEYS)] = value
        elif what == "drop all":
            weights = {k: v for k, v in weights.items() if k not in alike} or weights
        elif what == "type":
            weights[key] = weights[key].to(rng.choice([torch.int64, torch.bool, torch.float16]))
        else:
            keys = {"add": [rng.choice(KEYS)], "shape": [key], "shape of all": alike}[what]
            shape = [rng.choice(extents) for _ in range(rng.randint(0, 6))]
            while math.prod(n or 1 for n in shape) >= 2**55:
                shape.pop()
            weights |= dict.fromkeys(keys, torch.empty(shape, device="meta"))
    return weights


@pytest.fixture(scope="module")
def targets():
    """Networks, and their weights at first."""
    networks = {layout: named(layout) for layout in NAMED}
    return {layout: (network, copy.deepcopy(network.state_dict())) for layout, network in networks.items()}


FOUND = {  # where an error was anything but a ValueError: what was done to which file
    "shape of a norm": ("shiftwise", {"stages.0.0.norm.running_mean": (51, 1000, 5, 0)}),
    "scalar in place of a channel axis": ("shiftwise_v1", {"stages.1.0.pwconv1.weight": (16,)}),
    "bias of a merged kernel alone": ("slak_shuffled", {"stages.0.0.large_kernel.lkb_reparam.bias": (8,)}),
    "the same among our keys": ("ours of slak", {"stages.0.0.large_kernel.lkb_reparam.bias": ()}),
    "bias of a dilated kernel alone": ("slak", {"stages.0.0.dwconv.lk_origin.bias": (4,)}),
    "bias of a plain kernel alone": ("unireplknet", {"stages.0.0.dwconv.bias": ()}),
    "merged mlp of a convnext": ("convnext", {"stages.1.0.pwconv2.0.bias": (3, 3)}),
    "pieces in a slak": ("slak", {"stages.0.blocks.0.mix.tall_weights.0": (4,)}),
    "pieces without axes": ("slak", {"stages.0.blocks.0.mix.tall_weights.0": ()}),
    "one stripe in a slak_split": ("ours of slak_split", {"stages.0.blocks.0.mix.tall.weight": (7, 2, 51, 3)}),
    "a scalar stripe": ("ours of slak_split", {"stages.0.blocks.0.mix.tall.weight": ()}),
    "no wide stripe": ("slak", {"stages.2.4.large_kernel.LoRA2.conv.weight": None}),
    "short stripe": ("slak", {"stages.0.0.large_kernel.LoRA2.conv.weight": (4, 1, 5, 2)}),
    "stripe without axes": ("slak", {"stages.0.0.large_kernel.LoRA2.conv.weight": (5,)}),
    "table of shapes": ("ours of slak_split", {"stages.0.blocks.0.mix.tall_slots": (7, 1, 5, 51, 2)}),
    "classifier without axes": ("ours of slak_split", {"linear.weight": ()}),
    "convnext's classifier without axes": ("convnext", {"head.weight": ()}),
    "paths without axes": ("merged shiftwise", {"stages.0.0.large_kernel.LoRA.weight": ()}),
    "kernel without a bias": ("merged slak", {"stages.0.0.large_kernel.lkb_reparam.weight": None}),
    "even dilated kernel": ("merged unireplknet", {"stages.1.0.dwconv.lk_origin.weight": (80, 1, 2, 2)}),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_broke_once_is_refused_with_a_value_error(genuine, case):
    start, changes = FOUND[case]
    weights = genuine[start] | {k: torch.zeros(v) for k, v in changes.items() if v is not None}
    weights = {k: v for k, v in weights.items() if changes.get(k, ()) is not None}
    refused(lambda: identify(weights))


@pytest.mark.parametrize("case", [case for case, (start, _) in FOUND.items() if start.split()[-1] in NAMED])
@pytest.mark.parametrize("target", ["itself", "twin"])
def test_what_broke_once_loads_into_nothing(genuine, targets, case, target, tmp_path):
    start, changes = FOUND[case]
    layout = start.split()[-1]
    network, before = targets[layout if target == "itself" else "slak" if layout == "slak_split" else "slak_split"]
    network.load_state_dict(before)
    weights = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in genuine[start].items()}
    weights |= {k: torch.zeros(v) for k, v in changes.items() if v is not None}
    weights = {k: v for k, v in weights.items() if changes.get(k, ()) is not None}
    refused(lambda: load_checkpoint(network, saved(weights, tmp_path)), "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_types_that_are_no_weights_are_refused(genuine):
    key = "stages.2.3.large_kernel.lkb_reparam.bias"
    for dtype in (torch.bool, torch.int64):
        weights = genuine["merged slak"] | {key: genuine["merged slak"][key].to(dtype)}
        refused(lambda w=weights: identify(w))


@pytest.mark.parametrize("seed", range(25))
def test_identification_refuses_with_a_value_error(genuine, seed):
    rng = random.Random(seed)
    weights = broken(rng, genuine[rng.choice(sorted(genuine))])
    try:
        identity = identify(weights)
    except ValueError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000
    else:  # what was done to it made no difference, or another network
        assert identity.model


@pytest.mark.parametrize("seed", range(25))
def test_loading_refuses_with_a_value_error(genuine, targets, tmp_path, seed):
    """Into a network that the file is not from, or may be from."""
    rng = random.Random(seed)
    layout = rng.choice(sorted(name for name in genuine if "nirep" not in name and name != "convnext"))
    weights = broken(rng, genuine[layout], (0, 1, 2, 5, 7, 8))
    path = saved({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in weights.items()}, tmp_path)
    network, _ = targets[rng.choice(sorted(targets))]
    try:
        assert load_checkpoint(network, path) is network
    except ValueError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 3000
