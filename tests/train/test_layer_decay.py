"""Layer-wise rates are those of the authors, by the names of their own code."""

import json
from pathlib import Path

import pytest
import timm
from torch import nn

from shiftconv.models import create_model
from shiftconv.models.convert.layouts import LAYOUTS
from shiftconv.models.convert.translate import family_of
from shiftconv.train.layer_decay import layer_scales
from shiftconv.train.optim import create_optimizer, parameter_groups
from shiftconv.train.settings import Optim

GOLDEN = json.loads((Path(__file__).parent / "golden" / "layer_decay.json").read_text())


def slak(**more):
    return create_model("slak_tiny", width=1.0, num_classes=10, **more)


def by_their_names(net, values):
    """What belongs to each parameter of ours, under the name that the authors' code gives it."""
    theirs = LAYOUTS[family_of(net)].to_theirs(dict(net.named_parameters()))
    return {theirs[name]: value for name, value in values.items() if theirs[name] is not None}


@pytest.mark.parametrize("name", ["layerdecay_SLaK_tiny", "layerdecay_convnext_tiny"])
def test_levels_of_the_authors_classification(name):
    golden = GOLDEN[name]
    if "convnext" in name:
        net = slak(kernel_sizes=(7, 7, 7, 7), small_kernel_size=None, decomposed=False, branch_norm=False)
    else:
        net = slak()
    found = by_their_names(net, layer_scales(net, golden["layer_decay"], levels=golden["num_layers"]))
    expected = {key: golden["layer_decay"] ** (13 - level) for key, level in golden["layer_id"].items()}
    shared = found.keys() & expected.keys()
    assert len(shared) >= 140
    assert {key: found[key] for key in shared} == pytest.approx({key: expected[key] for key in shared})


@pytest.mark.parametrize("name", ["mmdecay_ade20k_slak_tiny", "mmdecay_coco_slak_tiny", "mmdecay_ade20k_sw_tiny"])
def test_levels_of_the_authors_downstream_tasks(name):
    golden = GOLDEN[name]
    net = create_model("shiftwise_tiny", num_classes=10) if "sw" in name else slak()
    by = "stages" if golden["decay_type"] == "stage_wise" else "blocks"
    found = by_their_names(net, layer_scales(net, 0.9, by, levels=golden["num_layers_cfg"]))
    expected = {
        key.removeprefix("backbone."): 0.9 ** (golden["num_layers_cfg"] + 1 - level)
        for key, level in golden["layer_id"].items()
    }
    shared = found.keys() & expected.keys()
    assert len(shared) >= 35
    assert {key: found[key] for key in shared} == pytest.approx({key: expected[key] for key in shared})


def test_without_a_number_the_levels_are_those_of_the_network():
    scales = layer_scales(slak(), 0.5)
    assert {scales[name] for name in scales if name.startswith(("norm", "linear"))} == {1.0}
    assert sorted(set(scales.values())) == [0.5**level for level in range(7, -1, -1)]
    assert scales["stem.0.weight"] == 0.5**7
    assert scales["stages.3.downsample.1.weight"] == scales["stages.3.blocks.2.norm.weight"] == 0.5


def test_a_network_of_timm():
    scales = layer_scales(timm.create_model("resnet18", num_classes=3), 0.9)
    assert scales["fc.weight"] == 1
    assert scales["conv1.weight"] == min(scales.values())


def test_the_optimiser_has_these_rates():
    net = slak()
    optim = Optim("adamw", lr=1e-3, weight_decay=0.05, decay_norms=False, layer_decay=0.7)
    scales = layer_scales(net, 0.7)
    names = {id(p): name for name, p in net.named_parameters()}
    seen = {}
    for group in create_optimizer(net, optim).param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = group["lr_scale"]
            assert (group["weight_decay"] == 0) == (p.ndim <= 1 or names[id(p)].endswith(".bias"))
    assert seen == pytest.approx(scales)


def test_what_trains_beside_the_network_has_the_full_rate():
    beside = nn.Conv2d(3, 4, 1)
    groups = parameter_groups(slak(), Optim(layer_decay=0.7), [beside])
    home = [group for group in groups if any(p is beside.weight for p in group["params"])]
    assert [group["lr_scale"] for group in home] == [1.0]


def test_bad_input():
    with pytest.raises(ValueError, match="Linear has no group_matcher, which layer decay asks"):
        layer_scales(nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match="needs at least 6 levels for LargeKernelNet, got 5"):
        layer_scales(slak(), 0.9, levels=5)
