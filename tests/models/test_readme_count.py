"""The cost figures of the original utility, to the last digit, and the text that it prints."""

import json
from pathlib import Path

import pytest

from shiftconv.models.convert.readme_count import readme_count

CASES = json.loads((Path(__file__).parent / "golden" / "shiftresnet.json").read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("convention", ["readme", "head"])
def test_equals_the_original(case, convention):
    expected = CASES[case]
    cost = readme_count(expected["arch"], convention, **expected["args"])
    assert (cost.params, cost.flops) == (expected["params"], expected[convention])


def test_text_of_the_readme():
    assert readme_count("shiftresnet20", expansion=3).lines() == [
        "Parameters: (new) 95642 (original) 272474 (reduction) 2.85",
        "FLOPs: (new) 16581248 (original) 40960640 (reduction) 2.47",
    ]
    assert readme_count("resnet20", reduction=2.8, reduction_mode="block").lines() == [
        "==> resnet20 with reduction 2.80",
        "Parameters: (new) 96206 (original) 272474 (reduction) 2.83",
        "FLOPs: (new) 14197376 (original) 40960640 (reduction) 2.89",
    ]


def test_text_of_the_newest_version():
    cost = readme_count("shiftresnet20", "head", expansion=3)
    assert cost.lines()[1] == "FLOPs: (new) 17760896 (original) 42140288 (reduction) 2.37"
    cost = readme_count("resnet20", "head", reduction=2.8, reduction_mode="block")
    assert cost.lines()[2] == "FLOPs: (new) 15377024 (original) 42140288 (reduction) 2.74"
    assert readme_count("resnet110").lines()[1].endswith("(new) 253297280 (original) 253297280 (reduction) 1.00")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("resnet20", dict(convention="readmee"), ValueError, "unknown convention 'readmee'; did you mean 'readme'"),
        ("resnet18", {}, ValueError, "unknown model of the ShiftResNet study 'resnet18'; did you mean"),
        ("vit_tiny_patch16_224", {}, ValueError, "unknown model of the ShiftResNet study 'vit_tiny"),
        ("shiftresnet21", {}, ValueError, "study 'shiftresnet21'; did you mean"),
        ("resnet20", dict(expansion=3), TypeError, "resnet20 has no argument 'expansion'"),
        ("resnet20", dict(in_chans=1), ValueError, "a whole network for images of three channels"),
        ("resnet20", dict(features_only=True), ValueError, "a whole network for images of three channels"),
    ],
)
def test_bad_arguments(name, arguments, error, match):
    with pytest.raises(error, match=match):
        readme_count(name, **arguments)
