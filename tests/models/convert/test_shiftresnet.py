"""The family's networks are recognised from their shapes; their arguments come back in the shortest form."""

import pytest
import torch

from shiftconv.models import create_model
from shiftconv.models.convert import identify


def empty(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments).state_dict()


PUBLISHED = [  # the networks of the authors' tables
    *[(f"shiftresnet{depth}", dict(expansion=e)) for depth in (20, 56, 110) for e in (1.0, 3.0, 6.0, 9.0)],
    *[("resnet20", dict(reduction=r, reduction_mode="block")) for r in (7.2, 2.8, 1.5, 0.98)],
    *[("resnet56", dict(reduction=r, reduction_mode="block")) for r in (7.6, 2.9, 1.5, 0.98)],
    *[("resnet110", dict(reduction=r, reduction_mode="block")) for r in (7.8, 2.9, 1.5, 0.98, 0.95)],
    *[("resnet20", dict(reduction=r, reduction_mode="net")) for r in (7.2, 2.8, 1.5)],
    *[("depthwiseresnet20", dict(reduction=r)) for r in (1.12, 0.38, 0.19, 0.125)],
    *[("depthwiseresnet56", dict(reduction=r, skip=False)) for r in (1.12, 0.37, 0.19, 0.124)],
    *[("shuffleresnet20", dict(reduction=r)) for r in (0.38, 0.13, 0.065, 0.04)],
    *[("mobileresnet110", dict(reduction=r)) for r in (1.1, 0.37, 0.19, 0.123)],
    *[("resnet20", dict()), ("resnet32", dict()), ("shiftresnet44", dict(expansion=2.5)), ("shuffleresnet56", dict())],
]
OTHERS = [
    ("shiftresnet20", dict(expansion=1.0, project_shortcuts=True)),
    ("resnet20", dict(reduction=2.8, reduction_mode="block", project_shortcuts=True)),
    ("resnet32", dict(reduction=0.25, reduction_mode="net")),
    ("shiftresnet20", dict(expansion=0.5, in_chans=1)),
    ("shiftresnet20", dict(expansion=1.0, global_pool="catavgmax")),
]


@pytest.mark.parametrize(("name", "arguments"), PUBLISHED + OTHERS, ids=str)
@pytest.mark.parametrize("classes", [10, 100, 0])
def test_arguments_come_back(name, arguments, classes):
    if not classes and "global_pool" in arguments:
        pytest.skip("no classifier tells the pooling")
    identity = identify(empty(name, num_classes=classes, **arguments))
    assert (identity.model, identity.model_args) == (name, {**arguments, "num_classes": classes})


def test_old_shortcuts_of_hardly_reduced_blocks():
    """Before 2018 a block had a convolution in its shortcut where its inside was narrower or wider than its input."""
    weights = dict(empty("resnet20", reduction=0.98, reduction_mode="block"))  # 16, 32 and 65 inside
    shortcut = {key.removeprefix("layer3.0."): value for key, value in weights.items() if "layer3.0.shortcut" in key}
    for block in ("layer3.1", "layer3.2"):
        weights |= {f"{block}.{key}": value for key, value in shortcut.items()}
        weights[f"{block}.shortcut.0.weight"] = torch.empty(64, 64, 1, 1, device="meta")
    arguments = dict(reduction=0.98, reduction_mode="block", project_shortcuts=True, num_classes=10)
    assert identify(weights).model_args == arguments


@pytest.mark.parametrize("family", ["shiftresnet20", "resnet20", "depthwiseresnet20", "shuffleresnet20"])
def test_any_argument_gives_one_of_the_same_network(family):
    name = "expansion" if family == "shiftresnet20" else "reduction"
    for value in (0.07, 0.31, 0.5, 0.77, 0.999, 1.003, 1.25, 2.0, 2.71828, 3.4):
        shapes = {key: value.shape for key, value in empty(family, **{name: value}).items()}
        identity = identify(empty(family, **{name: value}))
        assert {k: v.shape for k, v in empty(identity.model, **identity.model_args).items()} == shapes
        assert len(str(identity.model_args.get(name, 1.0))) <= len(str(value))


def changed(**changes):
    weights = dict(empty("resnet20", reduction=2.8, reduction_mode="block"))
    for key, shape in changes.items():
        weights.pop(key.replace("__", "."))
        if shape is not None:
            weights[key.replace("__", ".")] = torch.empty(shape, device="meta")
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(bn1__bias=None), r"nearest to resnet20\(reduction=2.8.*missing: bn1.bias"),
        (changed(layer1__0__conv1__weight=(6, 16, 3, 3)), r"no reduction gives widths \(6, 11, 22\)"),
        (
            changed(
                layer3__0__conv2__weight=(),
            ),
            "layer3.0.conv2.weight should be the weight of a convolution",
        ),
        (changed(layer2__0__conv2__weight=(30, 11, 3, 3)), r"widths \(16, 30, 64\), expected \(16, 32, 64\)"),
        (changed(linear__weight=(3,)), r"linear.weight \[3\] instead of \[3, 64\]"),
        (changed(conv1__weight=None), "no network of shiftconv has these 127 keys: bn1.weight"),
        ({}, "no network of shiftconv has these 0 keys"),
        ({"a": torch.ones(2)}, "1 keys: a"),
        ({k: v for k, v in empty("resnet20").items() if "layer2.2" not in k}, r"a resnet with \[3, 2, 3\] blocks"),
        (empty("resnet18"), "no network of shiftconv"),
    ],
)
def test_what_fits_no_network_is_described(weights, message):
    with pytest.raises(ValueError, match=message):
        identify(weights)
