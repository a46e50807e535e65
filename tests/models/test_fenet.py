"""FE-Net's blocks against plain statements of them, and how they follow each other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftconv.models import create_model
from shiftconv.models.fenet import Bottleneck, FEBlock, fenet


def _norm(x):
    return F.batch_norm(x, None, None, training=True)


def _bottleneck(x, block, move):
    y = move(F.relu(_norm(block.conv1(x))))
    return _norm(block.conv2(y))


def _shifted(x, block):
    """By the definition of the sparse shift, one channel after the other."""
    y = torch.zeros_like(x)
    height, width = x.shape[2:]
    for c, (a, b) in enumerate(block.shift2.offset.detach().round().int().tolist()):
        padded = F.pad(x[:, c], [3, 3, 3, 3])
        y[:, c] = padded[:, 3 - a : 3 - a + height, 3 - b : 3 - b + width]
    return y


def _halved(x):
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return (x[:, :, :h:2, :w:2] + x[:, :, 1:h:2, :w:2] + x[:, :, :h:2, 1:w:2] + x[:, :, 1:h:2, 1:w:2]) / 4


def _scatter(model):
    for name, parameter in model.named_parameters():
        if name.endswith("offset"):
            nn.init.uniform_(parameter, -2.4, 2.4, generator=torch.Generator().manual_seed(0))
    return model.double()


@pytest.mark.parametrize("residual", [False, True])
def test_bottleneck(residual):
    block = _scatter(Bottleneck(4, 4 if residual else 6, 5, residual=residual))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = _bottleneck(x, block, lambda y: _shifted(y, block)) + (x if residual else 0)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("expand", "mid"), [("input", 24), ("output", 60)])
def test_what_an_expansion_multiplies(expand, mid):
    assert Bottleneck(4, 10, 6, expand=expand).conv1.out_channels == mid


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("downsample", [False, True])
def test_block(levels, downsample):
    block = _scatter(FEBlock(16, 24, levels, downsample, "input"))
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = 12 if levels == 3 else 14  # the first channel that is worked on
    y = x
    for unit in block.partial:
        kept, worked = y[:, :start], y[:, start:]
        moved = _bottleneck(worked, unit, lambda z, unit=unit: _shifted(z, unit))
        y = torch.cat([kept, moved + worked], dim=1)
        start -= 16 - start
    assert start == 0
    last = _halved if downsample else lambda z: _shifted(z, block.full)
    torch.testing.assert_close(block(x), _bottleneck(y, block.full, last))


def test_trunk():
    model = create_model("fenet_100", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    kinds = [[type(block).__name__ for block in model.get_submodule(f"layer{i}")] for i in range(1, 6)]
    assert kinds == [["Bottleneck"], ["Bottleneck"], ["FEBlock"], ["FEBlock"] * 2, ["FEBlock"] * 2]
    blocks = [m for m in model.modules() if isinstance(m, FEBlock)]
    assert [len(block.parts) for block in blocks] == [3, 4, 4, 4, 3]
    assert [isinstance(block.full.shift2, nn.AvgPool2d) for block in blocks] == [True, True, False, True, False]
    with torch.no_grad():
        y = model.bn1(F.conv2d(x, model.conv1.weight, stride=2, padding=1))
        assert y.min() < 0  # no ReLU here
        for i in range(1, 6):
            y = model.get_submodule(f"layer{i}")(y)
        y = F.relu(model.bn2(model.conv2(y))).mean((2, 3))
        torch.testing.assert_close(model(x), y @ model.linear.weight.T + model.linear.bias)
    assert model.head_drop.p == 0.2 and model.num_features == 1932


def test_shifts_start_as_the_taps_of_a_window():
    offset = create_model("fenet_100").layer1[0].shift2.offset.detach()  # 64 channels
    taps = {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert {tuple(row) for row in offset.int().tolist()} == taps and not offset.frac().any()
    assert all((offset[7 * i : 7 * i + 7] == offset[7 * i]).all() for i in range(9)) and not offset[63].any()


@pytest.mark.parametrize("width", [0.1, 1.1])
def test_widths_that_cannot_be_split(width):
    with pytest.raises(
        ValueError, match=f"width={width} gives {int(16 * width)} channels in the stem, expected an even"
    ):
        fenet(width)


def test_small_images_are_refused():
    model = create_model("fenet_100").eval()
    assert model(torch.zeros(1, 3, 31, 31)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"at least 31 pixels either way, got \[1, 3, 64, 30\]"):
        model(torch.zeros(1, 3, 64, 30))
